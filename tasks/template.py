"""template: encode messages to token ids and loss masks, once; every later stage works with these ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from include.base_model import fetch_base
from include.chat.chat_format import ChatFormat
from include.chat.splitting import split_conversation
from include.chat.tokenized import IGNORED, batch, pair_batch, sum_up, write_rows
from include.chat.verification import count_prefix_mismatches, pair_contract, token_contract, verify_encoding
from include.data.expectations import PREPARED_PAIRS, PREPARED_ROWS, Suite
from include.data.parallel import in_order
from include.data.profile import histogram
from include.data.sharegpt import Conversation, conversations_in
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
    """Save the tokenizer with the chat template, and verify the ids on sampled rows from all files.

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
    proved, mismatches = verify_encoding(chat, spread), count_prefix_mismatches(chat, spread)
    context.progress(f"encoding by {chat.encoder.name}; {proved} rows proved against the tokenizer's own ids")
    if mismatches:
        context.progress(
            f"WARNING: in {mismatches} of {len(spread)} sampled rows the training prefix differs from the inference "
            "prompt: check the answers of the smoke test, or choose another chat_template"
        )
    return {
        "proved_rows": proved, "prefix_mismatches": mismatches, "encoder": chat.encoder.name,
        "missing_special_tokens": chat.missing, "stop_tokens": chat.stop_tokens,
        "template_sha256": hashlib.sha256(chat.template.source.encode()).hexdigest(),
    }  # fmt: skip


@Step
def encode(context: ShardedContext, names: list[str], standardize: Output[StandardizeOutput]) -> list[dict[str, Any]]:
    """Write ids and labels of the conversations; return counts per side and file, and samples of the first file."""
    recipe, proof = context.recipe, context.result_of(prove)
    chat = context.cache.get("chat")
    if chat is None:
        chat = _chat(context)
        if proof["encoder"] != chat.encoder.name:
            chat.use_tokenizer_encoder()
    messages = (
        context.fetch(standardize, *(f"{StandardizeOutput.MESSAGES}/{name}" for name in names))
        / StandardizeOutput.MESSAGES
    )
    for folder in (TRAIN, HOLDOUT, CONTRACT):
        (context.out / folder).mkdir(parents=True)
    encode_file = _encode_pairs if recipe.method == "dpo" else _encode_group
    return list(in_order(lambda name: _encode(encode_file, chat, messages / name, context.out, recipe), names))


@sharded(
    version=7,
    recipe_fields=(
        "method", "base_model", "base_revision", "chat_template", "missing_special_tokens", "special_tokens_in_text",
        "max_seq_length", "on_too_long", "check_limits",
    ),
    split_folder=StandardizeOutput.MESSAGES,
    steps=(prove, encode),
)  # fmt: skip
def template(context: ShardedContext, standardize: Output[StandardizeOutput]) -> Result[TemplateOutput]:
    """Write `train/` and `holdout/` (an Arrow stream per file of messages: `row`, `input_ids`, `labels`; for preference
    rows `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`), `tokenizer/` with the chat template, `samples.txt` for
    people (trained text between » and «) and `data_docs/` of the token checks.

    The checks run over all rows at once; they need some 50 bytes of memory per row.

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
    if findings.errors:
        raise BadData(
            findings.errors[0], "If check_limits does not set this limit, it is a bug of the template or of Retune"
        )
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
        "checks": findings.checks, "docs": f"{TemplateOutput.DOCS}/{findings.page}",
    })  # fmt: skip
    return Result(summary, metadata)


def _chat(context: ShardedContext) -> ChatFormat:
    return ChatFormat.from_recipe(fetch_base(context.recipe, context.store, tokenizer_only=True), context.recipe)


def _contract_of_all(context: ShardedContext) -> Any:
    """Return the columns that the suite checks, as a frame with one line per row."""
    import numpy as np
    import pandas as pd

    folder = context.files_of(encode, CONTRACT) / CONTRACT
    tables = [read_table(folder / name) for name in context.names]
    return pd.DataFrame(
        {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names}
    )


def _encode(
    encode_file: Callable[..., _Group], chat: ChatFormat, file: Path, out: Path, recipe: Recipe
) -> dict[str, Any]:
    import pyarrow as pa

    group = encode_file(chat, file, out, recipe)
    write_table(pa.table(group.contract), out / CONTRACT / file.name)
    return {"sides": group.sides, "samples": group.samples}


@dataclass
class _Group:
    """One encoded file of messages.

    Attributes:
        contract: the columns that the suite checks, one entry per row.
        sides: rows, tokens, trained tokens, and the sha256 of ids and labels, by side.
        samples: the first rows as text.
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
    contract = {"row": rows, **token_contract(chat, encoded, conversations, longest)}
    usable = contract["tokens_over"] == 0
    over = np.flatnonzero(~usable)
    used = usable.copy()  # rows that are used, whole or in part
    parts = []
    if len(over) and recipe.on_too_long == "truncate":
        encoded = encoded.truncate(longest)
        usable = used = np.logical_or.reduceat(encoded.loss_mask, encoded.starts)
    elif len(over) and recipe.on_too_long == "split":
        pieces = [(row, piece) for row in over for piece in split_conversation(chat, conversations[row], longest)]
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
    with_rejected = [replace(c, contents=[*c.contents[:-1], str(c.rejected)]) for c in conversations]
    chosen, rejected = chat.encode(conversations), chat.encode(with_rejected)
    contract = pair_contract(chat, chosen, rejected, conversations, recipe.max_seq_length)
    usable = contract["tokens_over"] == 0
    used = np.flatnonzero(usable)
    contract.update(
        row=rows,
        left_out=(~usable).astype(np.int32),
        kept_over=np.zeros(len(rows), np.int32),  # a pair is used whole or not at all
        cut=np.zeros(len(rows), np.int32),
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


def _spread_rows(files: list[Path]) -> list[Conversation]:
    """Return about PROVED_ROWS conversations, evenly spread over the files."""
    each = max(1, PROVED_ROWS // len(files))
    found: list[Conversation] = []
    for file in files:
        table = read_table(file)
        found += conversations_in(table.take(list(range(0, len(table), max(1, len(table) // each)))[:each]))
    return found


def _readable(chat: ChatFormat, row: dict[str, Any]) -> str:
    """Return a prepared row as text, with the trained parts between » and «."""
    ids, trained = row["input_ids"], [label != IGNORED for label in row["labels"]]
    parts, begin = [], 0
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[begin]:
            text = chat.decode(ids[begin:end])
            parts.append(f"»{text}«" if trained[begin] else text)
            begin = end
    return f"row {row['row']}\n{''.join(parts)}\n"
