"""template: messages become token ids and loss masks, once; every later stage works with these ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from include.base_model import fetch_base
from include.chat.chat_format import ChatFormat, Encoded
from include.chat.tokenized import IGNORED, answer_span, batch, pair_batch, sum_up, write_rows
from include.data.expectations import PREPARED_PAIRS, PREPARED_ROWS, Suite
from include.data.parallel import in_order
from include.data.profile import histogram
from include.data.sharegpt import Conversation, Message, conversations_in
from include.data.tables import read_table, write_table
from include.errors import BadData
from include.pipeline.contracts import StandardizeOutput, TemplateOutput
from include.pipeline.sharding import PARTS, ShardedContext, Step, sharded
from include.pipeline.stage import Output, Result
from include.recipe import Recipe

TRAIN, HOLDOUT = TemplateOutput.TRAIN, TemplateOutput.HOLDOUT
CONTRACT = f"{PARTS}/contract"
PROVED_ROWS, SHOWN_ROWS = 256, 10


@Step
def prove(context: ShardedContext, standardize: Output[StandardizeOutput]) -> dict[str, Any]:
    """The tokenizer with the template in it, and the proof of the ids on rows from all over the data.

    Raises:
        BadRecipe: the template does not fit the base's vocabulary, or the ids differ from the tokenizer's own.
    """
    chat = context.cache["chat"] = _chat(context)
    if chat.missing:
        context.progress(
            f"WARNING: {', '.join(chat.missing)} are not in the base's vocabulary and become ordinary tokens"
        )
    chat.save(context.out / TemplateOutput.TOKENIZER)
    chosen = [f"{StandardizeOutput.MESSAGES}/{name}" for name in context.names[:: max(1, len(context.names) // 4)]]
    messages = context.fetch(standardize, *chosen)
    spread = _spread_rows([messages / name for name in chosen])
    proved, otherwise = chat.prove(spread), chat.asked_otherwise(spread)
    context.progress(f"encoding by {chat.encoder.name}; {proved} rows proved against the tokenizer's own ids")
    if otherwise:
        context.progress(
            f"WARNING: {otherwise} of {len(spread)} rows are trained to answer after other tokens than a prompt "
            "ends in: look at the answers of the smoke test, or take another chat_template"
        )
    return {
        "proved_rows": proved, "prefix_mismatches": otherwise, "encoder": chat.encoder.name,
        "missing_special_tokens": chat.missing, "stop_tokens": chat.stop_tokens,
        "template_sha256": hashlib.sha256(chat.template.encode()).hexdigest(),
    }  # fmt: skip


@Step
def encode(context: ShardedContext, names: list[str], standardize: Output[StandardizeOutput]) -> list[dict[str, Any]]:
    """Ids and labels of the conversations; of each file the facts of its `sides` and, of the first, `samples`."""
    recipe, proof = context.recipe, context.result_of(prove)
    chat = context.cache.get("chat")
    if chat is None:
        chat = _chat(context)
        if proof["encoder"] != chat.encoder.name:
            chat.encode_by_tokenizer()
    messages = (
        context.fetch(standardize, *(f"{StandardizeOutput.MESSAGES}/{name}" for name in names))
        / StandardizeOutput.MESSAGES
    )
    for folder in (TRAIN, HOLDOUT, CONTRACT):
        (context.out / folder).mkdir(parents=True)
    way = _encode_pairs if recipe.method == "dpo" else _encode_group
    return list(in_order(lambda name: _encode(way, chat, messages / name, context.out, recipe), names))


@sharded(
    version=5,
    recipe_fields=(
        "method", "base_model", "base_revision", "chat_template", "missing_special_tokens", "special_tokens_in_text",
        "max_seq_length", "on_too_long", "check_limits",
    ),
    split_folder=StandardizeOutput.MESSAGES,
    steps=(prove, encode),
)  # fmt: skip
def template(context: ShardedContext, standardize: Output[StandardizeOutput]) -> Result[TemplateOutput]:
    """Write `train/` and `holdout/` (Arrow streams, one for each file of messages: `row`, `input_ids`, `labels`; of
    preference rows `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`), `tokenizer/` with the template in it,
    `samples.txt` for people (trained text between » and «) and `data_docs/` of the token checks.

    The checks are over all rows at once, by some 50 bytes for each.

    Raises:
        BadRecipe: see `prove`.
        BadData: a conversation breaks the token contract, or no row is short enough.
    """
    recipe = context.recipe
    pairs = recipe.method == "dpo"
    rules = (*PREPARED_ROWS, *PREPARED_PAIRS) if pairs else PREPARED_ROWS
    with Suite(
        "prepared_pairs" if pairs else "prepared_rows", rules, recipe.check_limits, context.out / TemplateOutput.DOCS
    ) as suite:
        proof, groups = context.result_of(prove), context.result_of(encode)
        contract = _contract_of_all(context)
        findings = suite.validate(contract)
    if findings.broken:
        raise BadData(findings.broken[0], "If no limit of the recipe says so, it is a fault of the template or Retune")
    train, holdout = (sum_up([group["sides"][side] for group in groups]) for side in (TRAIN, HOLDOUT))
    if not train["rows"] or not holdout["rows"]:
        raise BadData(
            f"of the {'training' if not train['rows'] else 'holdout'} rows none has at most "
            f"{recipe.max_seq_length:,} tokens (the shortest row has {contract['tokens'].min():,})",
            "Raise max_seq_length, or use shorter conversations",
        )
    samples = [sample for group in groups for sample in group["samples"]][:SHOWN_ROWS]
    (context.out / TemplateOutput.SAMPLES).write_text("\n".join(samples), encoding="utf-8")
    over, left_out = int(contract["tokens_over"].sum()), int(contract["left_out"].sum())
    summary = (
        f"{train['tokens']:,} tokens in {train['rows']:,} rows, {train['trained'] / train['tokens']:.0%} trained; "
        f"{over:,} too long, {left_out:,} left out"
    )
    quantiles = contract["tokens"].quantile([0, 0.25, 0.5, 0.75, 0.9, 0.99, 1], interpolation="lower")
    metadata = TemplateOutput.model_validate({
        "train": train, "holdout": holdout, "too_long": over, "left_out": left_out, **proof,
        "lengths": {f"p{share * 100:.0f}": int(tokens) for share, tokens in quantiles.items()},
        "histogram": histogram(contract["tokens"].to_numpy()), "samples": samples,
        "checks": findings.table, "docs": f"{TemplateOutput.DOCS}/{findings.page}",
    })  # fmt: skip
    return Result(summary, metadata)


def _chat(context: ShardedContext) -> ChatFormat:
    return ChatFormat(fetch_base(context.recipe, context.store, tokenizer_only=True), context.recipe)


def _contract_of_all(context: ShardedContext) -> Any:
    """The facts that the suite checks, as a frame with a line for each row."""
    import numpy as np
    import pandas as pd

    folder = context.files_of(encode, CONTRACT) / CONTRACT
    tables = [read_table(folder / name) for name in context.names]
    return pd.DataFrame(
        {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names}
    )


def _encode(way: Callable[..., _Group], chat: ChatFormat, file: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    import pyarrow as pa

    group = way(chat, file, out, recipe)
    write_table(pa.table(group.contract), out / CONTRACT / file.name)
    return {"sides": group.sides, "samples": group.samples}


@dataclass
class _Group:
    """A file of messages, encoded.

    Attributes:
        contract: columns of the facts that the suite checks, one entry per row.
        sides: for each side: rows, tokens, trained, and the sha256 of its ids and labels.
        samples: the first rows as people can read them.
    """

    contract: dict[str, Any]
    sides: dict[str, dict[str, Any]]
    samples: list[str]


def _encode_group(chat: ChatFormat, file: Path, out: Path, recipe: Recipe) -> _Group:
    import numpy as np

    table = read_table(file)
    conversations = list(conversations_in(table))
    rows, holdout, longest = table["row"].to_numpy(), table["holdout"].to_numpy(), recipe.max_seq_length
    encoded = chat.encode(conversations)
    contract = {"row": rows, **_contract(chat, encoded, conversations, longest)}
    usable = contract["tokens_over"] == 0
    over = np.flatnonzero(~usable)
    used = usable.copy()  # rows of which something is used
    parts = []
    if len(over) and recipe.on_too_long == "truncate":
        encoded = encoded.cut(longest)
        usable = used = np.logical_or.reduceat(encoded.trained, encoded.starts)
    elif len(over) and recipe.on_too_long == "split":
        pieces = [(row, piece) for row in over for piece in _split(chat, conversations[row], longest)]
        if pieces:
            origin = np.array([row for row, _ in pieces])
            used[origin] = True
            parts.append((chat.encode([piece for _, piece in pieces]), rows[origin], holdout[origin], origin >= 0))
    parts.insert(0, (encoded, rows, holdout, usable))
    kept = encoded.ends - encoded.starts
    contract["left_out"] = (~used).astype(np.int32)
    contract["kept_over"] = (usable & (kept > longest)).astype(np.int32)
    contract["cut"] = (usable & (kept < contract["tokens"])).astype(np.int32)
    if recipe.on_too_long == "truncate":
        contract["cut"] *= 0
    sides = {}
    for side, held in ((TRAIN, False), (HOLDOUT, True)):
        batches = [batch(e, r, np.flatnonzero(use & (h == held))) for e, r, h, use in parts]
        sides[side] = write_rows(out / side / f"{file.stem}.arrow", batches)
    shown = batch(encoded, rows, np.flatnonzero(usable)[:SHOWN_ROWS]) if file.stem == "00000" else None
    return _Group(contract, sides, [_readable(chat, row) for row in shown.to_pylist()] if shown else [])


def _encode_pairs(chat: ChatFormat, file: Path, out: Path, recipe: Recipe) -> _Group:
    import numpy as np

    table = read_table(file)
    conversations = list(conversations_in(table))
    rows, holdout = table["row"].to_numpy(), table["holdout"].to_numpy()
    others = [replace(c, contents=[*c.contents[:-1], str(c.rejected)]) for c in conversations]
    chosen, rejected = chat.encode(conversations), chat.encode(others)
    contracts = [_contract(chat, e, c, recipe.max_seq_length) for e, c in ((chosen, conversations), (rejected, others))]
    contract = {name: np.maximum(contracts[0][name], contracts[1][name]) for name in contracts[0]}
    usable = contract["tokens_over"] == 0
    used = np.flatnonzero(usable)
    contract.update(
        row=rows,
        left_out=(~usable).astype(np.int32),
        kept_over=np.zeros(len(rows), np.int32),  # a pair is used whole or not at all
        cut=np.zeros(len(rows), np.int32),
        prompt_errors=np.array([_prompts_differ(chosen, rejected, i) for i in range(len(rows))], np.int32),
    )
    sides = {}
    for side, held in ((TRAIN, False), (HOLDOUT, True)):
        batch = pair_batch(chosen, rejected, rows, used[holdout[used] == held])
        sides[side] = write_rows(out / side / f"{file.stem}.arrow", [batch])
    shown = pair_batch(chosen, rejected, rows, used[:SHOWN_ROWS]).to_pylist() if file.stem == "00000" else []
    samples = [
        f"row {row['row']}\n{chat.decode(row['prompt_ids'])}»{chat.decode(row['chosen_ids'])}«\n"
        f"rather than »{chat.decode(row['rejected_ids'])}«\n"
        for row in shown
    ]
    return _Group(contract, sides, samples)


def _prompts_differ(chosen: Encoded, rejected: Encoded, i: int) -> bool:
    one, other = (e.ids[e.starts[i] : e.starts[i] + answer_span(e, i)[0]] for e in (chosen, rejected))
    return one.tolist() != other.tolist()


def _split(chat: ChatFormat, conversation: Conversation, longest: int) -> list[Conversation]:
    """The conversation as several, cut before user turns, each with the system message and as long as may be.

    An exchange that alone is too long is left out.
    """
    messages = conversation.messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    exchanges: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)

    def joined(part: list[Message]) -> Conversation:
        return replace(Conversation.of([*system, *part]), tools=conversation.tools)

    def fits(part: list[Message]) -> bool:
        return len(chat.encode([joined(part)]).ids) <= longest

    pieces: list[Conversation] = []
    current: list[Message] = []
    for exchange in exchanges:
        if current and not fits([*current, *exchange]):
            pieces.append(joined(current))
            current = []
        if current or fits(exchange):
            current = [*current, *exchange]
    return [*pieces, joined(current)] if current else pieces


def _contract(chat: ChatFormat, encoded: Encoded, conversations: list[Conversation], longest: int) -> dict[str, Any]:
    """What the suite checks, for each conversation."""
    import numpy as np

    def count(places: Any) -> Any:
        """How many of the places (of tokens) are in each conversation."""
        return np.bincount(np.searchsorted(encoded.ends, places, "right"), minlength=len(tokens)).astype(np.int32)

    tokens = (encoded.ends - encoded.starts).astype(np.int32)
    followed = np.append(encoded.trained[1:], False)
    followed[encoded.ends - 1] = False  # the next conversation does not go on with this one's turn
    last = np.flatnonzero(encoded.trained & ~followed)  # of each trained stretch
    stretches = count(last)
    ended = count(last[np.isin(encoded.ids[last], chat.stop_tokens)])
    answers = {roles: roles.count("assistant") for roles in {c.roles for c in conversations}}
    turns = np.array([answers[c.roles] for c in conversations], np.int32)
    bos = chat.id_of("bos_token")
    return {
        "tokens": tokens,
        "tokens_over": (tokens > longest).astype(np.int32),
        "untrained": (stretches == 0).astype(np.int32),
        "bos_errors": tokens * 0 if bos is None else np.abs(count(np.flatnonzero(encoded.ids == bos)) - chat.bos_count),
        "unended_turns": tokens * 0 if chat.missing else turns - ended,
        "mask_errors": np.abs(stretches - turns),
    }


def _spread_rows(files: list[Path]) -> list[Conversation]:
    """Rows for the proof, from all over the files."""
    each = max(1, PROVED_ROWS // len(files))
    found: list[Conversation] = []
    for file in files:
        table = read_table(file)
        found += conversations_in(table.take(list(range(0, len(table), max(1, len(table) // each)))[:each]))
    return found


def _readable(chat: ChatFormat, row: dict[str, Any]) -> str:
    """A prepared row as text, with the trained stretches between » and «."""
    ids, trained = row["input_ids"], [label != IGNORED for label in row["labels"]]
    parts, begin = [], 0
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[begin]:
            text = chat.decode(ids[begin:end])
            parts.append(f"»{text}«" if trained[begin] else text)
            begin = end
    return f"row {row['row']}\n{''.join(parts)}\n"
