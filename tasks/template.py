"""template: encode messages to token ids and loss masks, once; every later stage works with these ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from include.base_model import base_limits, fetch_base, untrained_tokens
from include.chat.chat_format import ChatFormat
from include.chat.preparation import EXCHANGE_TOO_LONG, TRUNCATED, conversations_of, prepare_file, with_rejected
from include.chat.tokenized import sum_up, write_rows
from include.chat.verification import verify_encoding
from include.data.conversation import Conversation
from include.data.expectations import PREPARED_ROWS, Suite
from include.data.parallel import in_order
from include.data.profile import histogram
from include.data.tables import read_table, write_table
from include.errors import BadData, BadRecipe
from include.pipeline.contracts import StandardizeOutput, TemplateOutput
from include.pipeline.sharding import PARTS, ShardedContext, Step, sharded
from include.pipeline.stage import Output, Result
from include.recipe import Recipe

TRAIN, HOLDOUT = TemplateOutput.TRAIN, TemplateOutput.HOLDOUT
FAULTS, LEFT_OUT_PARTS = f"{PARTS}/faults", f"{PARTS}/left_out"
VERIFIED_ROWS, SHOWN_ROWS = 256, 10


@Step
def verify_sample(context: ShardedContext, standardize: Output[StandardizeOutput]) -> dict[str, Any]:
    """Save the tokenizer with the chat template, and verify the ids on sampled rows from all files.

    Raises:
        BadRecipe: the template does not fit the base's vocabulary, it writes ids that have no embedding, or the ids
            differ from the tokenizer's own.
    """
    recipe = context.recipe
    chat = context.cache["chat"] = _chat(context)
    if chat.missing:
        context.progress(
            f"WARNING: {', '.join(chat.missing)} are not in the base's vocabulary and become ordinary tokens"
        )
    folder = fetch_base(recipe, context.store, tokenizer_only=True)
    limits, new_tokens = base_limits(folder), {**chat.new_tokens}
    written = {token: id for token, id in chat.written_tokens.items() if token not in new_tokens}
    if recipe.missing_special_tokens == "add" and limits.embeddings:
        new_tokens |= {token: id for token, id in written.items() if id >= limits.embeddings}
        written = {token: id for token, id in written.items() if token not in new_tokens}
    _check_embeddings(max(written.values(), default=0), limits.embeddings, recipe)
    untrained = untrained_tokens(recipe, folder, written)
    if recipe.missing_special_tokens == "add":
        new_tokens |= {token: written[token] for token in untrained}
        untrained = []
    if new_tokens:
        context.progress(f"the embeddings of {', '.join(new_tokens)} are trained, too")
    if untrained:
        context.progress(
            f"WARNING: {recipe.base_model} was never trained on {', '.join(untrained)}: all their embeddings are zero "
            "or equal, and an adapter does not change them. Set missing_special_tokens: add to train them, or choose "
            "another chat_template"
        )
    if limits.positions and recipe.max_seq_length > limits.positions:
        context.progress(
            f"WARNING: max_seq_length is {recipe.max_seq_length:,}, and {recipe.base_model} has {limits.positions:,} "
            f"positions: rows of more tokens are refused. Set max_seq_length to {limits.positions} or less"
        )
    chat.save(context.out / TemplateOutput.TOKENIZER)
    chosen = [f"{StandardizeOutput.MESSAGES}/{name}" for name in context.names[:: max(1, len(context.names) // 4)]]
    messages = context.fetch(standardize, *chosen)
    spread = _spread_rows([messages / name for name in chosen], recipe)
    verified = verify_encoding(chat, spread)
    if recipe.method == "dpo":
        verify_encoding(chat, [with_rejected(pair) for pair in spread])
    context.progress(f"encoding by {chat.encoder.name}; {verified} rows verified against the tokenizer's own ids")
    return {
        "verified_rows": verified, "encoder": chat.encoder.name,
        "missing_special_tokens": chat.missing, "untrained_special_tokens": untrained, "new_special_tokens": new_tokens,
        "base_embeddings": limits.embeddings and max(limits.embeddings, *(id + 1 for id in new_tokens.values()), 0),
         "base_positions": limits.positions, "stop_tokens": chat.stop_tokens,
        "template_sha256": hashlib.sha256(chat.template.source.encode()).hexdigest(),
    }  # fmt: skip


@Step
def encode(context: ShardedContext, names: list[str], standardize: Output[StandardizeOutput]) -> list[dict[str, Any]]:
    """Write ids and labels of the conversations; return counts per side and file, and samples of the first file."""
    recipe, proof = context.recipe, context.result_of(verify_sample)
    chat = context.cache.get("chat")
    if chat is None:
        chat = _chat(context)
        if proof["encoder"] != chat.encoder.name:
            chat.use_tokenizer_encoder()
    messages = (
        context.fetch(standardize, *(f"{StandardizeOutput.MESSAGES}/{name}" for name in names))
        / StandardizeOutput.MESSAGES
    )
    for folder in (TRAIN, HOLDOUT, FAULTS, LEFT_OUT_PARTS):
        (context.out / folder).mkdir(parents=True)
    found = list(in_order(lambda name: _encode(chat, messages / name, context.out, recipe), names))
    _check_embeddings(max(group["largest_id"] for group in found), proof["base_embeddings"], recipe)
    _check_positions(max(group["longest"] for group in found), proof["base_positions"], recipe)
    return found


@sharded(
    version=10,
    recipe_fields=(
        "method", "base_model", "base_revision", "chat_template", "chat_template_kwargs", "missing_special_tokens",
        "special_tokens_in_text",
        "max_seq_length", "on_too_long", "train_on", "check_limits",
    ),
    split_folder=StandardizeOutput.MESSAGES,
    steps=(verify_sample, encode),
)  # fmt: skip
def template(context: ShardedContext, standardize: Output[StandardizeOutput]) -> Result[TemplateOutput]:
    """Write `train/` and `holdout/` (an Arrow stream per file of messages: `row`, `input_ids`, `labels`; for preference
    rows `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`), `tokenizer/` with the chat template, `samples.txt` for
    people (trained text between » and «), `left_out.jsonl` (`row`, `reasons`, and the `turn` from 1 or the number of
    `tokens` where they say more; one line for each part that does not train) and `data_docs/` of the token checks.

    The checks run over all rows at once; they need some 50 bytes of memory per row.

    Raises:
        BadRecipe: see `verify_sample`; or a row has ids without embedding, or more tokens than the base has positions.
        BadData: a conversation breaks the rules of token ids and masks, or no row is short enough.
    """
    recipe = context.recipe
    pairs = recipe.method == "dpo"
    with Suite(
        "prepared_pairs" if pairs else "prepared_rows",
        PREPARED_ROWS,
        recipe.check_limits,
        context.out / TemplateOutput.DOCS,
    ) as suite:
        proof, groups = context.result_of(verify_sample), context.result_of(encode)
        faults = _faults_of_all(context)
        findings = suite.validate(faults)
    if findings.errors:
        raise BadData(
            findings.errors[0], "If check_limits does not set this limit, it is a bug of the template or of Retune"
        )
    train, holdout = (sum_up([group["sides"][side] for group in groups]) for side in (TRAIN, HOLDOUT))
    if not train["rows"] or not holdout["rows"]:
        raise BadData(
            f"of the {'training' if not train['rows'] else 'holdout'} rows none has at most "
            f"{recipe.max_seq_length:,} tokens (the shortest row has {faults['tokens'].min():,})",
            "Raise max_seq_length, or use shorter conversations",
        )
    samples = [sample for group in groups for sample in group["samples"]][:SHOWN_ROWS]
    (context.out / TemplateOutput.SAMPLES).write_text("\n".join(samples), encoding="utf-8")
    over, left_out = int(faults["tokens_over"].sum()), int(faults["left_out"].sum())
    reasons = _write_left_out(context)
    pieces = f" (pieces of {train['conversations']:,} conversations)" if train["rows"] > train["conversations"] else ""
    summary = (
        f"{train['tokens']:,} tokens in {train['rows']:,} rows{pieces}, {train['trained'] / train['tokens']:.0%} "
        f"trained; {over:,} too long, {left_out:,} left out"
    )
    if in_part := sum(count for reason, count in reasons.items() if reason in (TRUNCATED, EXCHANGE_TOO_LONG)):
        summary += f", {in_part:,} in part"
    for reason, count in reasons.items():
        context.progress(f"left out: {count:,} rows, {reason} (each in {TemplateOutput.LEFT_OUT})")
    quantiles = faults["tokens"].quantile([0, 0.25, 0.5, 0.75, 0.9, 0.99, 1], interpolation="lower")
    metadata = TemplateOutput.model_validate({
        "train": train, "holdout": holdout, "too_long": over, "left_out": left_out, "left_out_reasons": reasons,
        **proof,
        "lengths": {f"p{share * 100:.0f}": int(tokens) for share, tokens in quantiles.items()},
        "histogram": histogram(faults["tokens"].to_numpy()), "samples": samples,
        "checks": findings.checks, "docs": f"{TemplateOutput.DOCS}/{findings.page}",
    })  # fmt: skip
    return Result(summary, metadata)


def _chat(context: ShardedContext) -> ChatFormat:
    return ChatFormat.from_recipe(fetch_base(context.recipe, context.store, tokenizer_only=True), context.recipe)


def _check_embeddings(largest_id: int, embeddings: int | None, recipe: Recipe) -> None:
    if embeddings is not None and largest_id >= embeddings:
        raise BadRecipe(
            f"field 'base_model': the tokenizer of {recipe.base_model} gives the id {largest_id:,}, and the model has "
            f"only {embeddings:,} embeddings (ids 0 to {embeddings - 1:,})",
            "Use the tokenizer that belongs to this model, choose a chat_template without the added tokens, or resize "
            "the model's embeddings to its tokenizer",
        )


def _check_positions(longest: int, positions: int | None, recipe: Recipe) -> None:
    if positions is not None and longest > positions:
        raise BadRecipe(
            f"field 'max_seq_length': it is {recipe.max_seq_length:,}, and {recipe.base_model} has only {positions:,} "
            f"positions (max_position_embeddings); the longest row has {longest:,} tokens",
            f"Set max_seq_length to {positions} or less (on_too_long says what becomes of longer rows), or choose a "
            "base with a longer context",
        )


def _write_left_out(context: ShardedContext) -> dict[str, int]:
    """Write the list of rows that do not train; return the number of rows by their first reason."""
    folder = context.files_of(encode, LEFT_OUT_PARTS) / LEFT_OUT_PARTS
    first_reasons: dict[int, str] = {}
    with (context.out / TemplateOutput.LEFT_OUT).open("wb") as file:
        for name in context.names:
            content = (folder / name).read_bytes()
            file.write(content)
            for entry in map(orjson.loads, content.splitlines()):
                first_reasons.setdefault(entry["row"], entry["reasons"][0])
    return dict(Counter(first_reasons.values()).most_common())


def _faults_of_all(context: ShardedContext) -> Any:
    """Return the columns that the suite checks, as a frame with one line per row."""
    import numpy as np
    import pandas as pd

    folder = context.files_of(encode, FAULTS) / FAULTS
    tables = [read_table(folder / name) for name in context.names]
    return pd.DataFrame(
        {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names}
    )


def _encode(chat: ChatFormat, file: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Write what becomes of a file of messages; return its counts by side, and samples of the first file."""
    import pyarrow as pa

    prepared = prepare_file(chat, read_table(file), recipe)
    write_table(pa.table(prepared.faults), out / FAULTS / file.name)
    (out / LEFT_OUT_PARTS / file.name).write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in prepared.left_out))
    return {
        "sides": {
            side: write_rows(out / side / f"{file.stem}.arrow", prepared.batches[held])
            for side, held in ((TRAIN, False), (HOLDOUT, True))
        },
        "samples": prepared.samples(chat, SHOWN_ROWS) if file.stem == "00000" else [],
        "longest": prepared.longest,
        "largest_id": prepared.largest_id,
    }


def _spread_rows(files: list[Path], recipe: Recipe) -> list[Conversation]:
    """Return about VERIFIED_ROWS conversations, evenly spread over the files."""
    each = max(1, VERIFIED_ROWS // len(files))
    found: list[Conversation] = []
    for file in files:
        table = read_table(file)
        some = table.take(list(range(0, len(table), max(1, len(table) // each)))[:each])
        found += conversations_of(some, recipe)
    return found
