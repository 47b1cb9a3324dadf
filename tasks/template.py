"""template: messages become token ids and loss masks, once; every later stage works with these ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from include.chat import IGNORED, ChatFormat, Encoded
from include.errors import BadData
from include.expectations import PREPARED_ROWS
from include.expectations import validate as run_suite
from include.parallel import in_order
from include.recipe import Recipe
from include.sources import fetch_base
from include.stage import Job, Result, stage
from include.store import Artifact
from tasks.standardize import MESSAGES

TRAIN, HOLDOUT, TOKENIZER, SAMPLES, DOCS = "train.arrow", "holdout.arrow", "tokenizer", "samples.txt", "data_docs"
PROVED_ROWS, SHOWN_ROWS = 256, 10


@stage(
    version=2,
    uses=(
        "base_model", "base_revision", "chat_template", "missing_special_tokens", "max_seq_length", "on_too_long",
    ),
)  # fmt: skip
def template(job: Job, standardize: Artifact) -> Result:
    """Write `train.arrow` and `holdout.arrow` (Arrow streams: `row`, `input_ids`, `labels`), `tokenizer/` with the
    template in it, `samples.txt` for people (trained text between » and «) and `data_docs/` of the token checks.

    Raises:
        BadRecipe: the template does not fit the base's vocabulary.
        BadData: a conversation breaks the token contract, or no row is short enough.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    chat = ChatFormat(fetch_base(job.recipe, job.store, tokenizer_only=True), job.recipe)
    if chat.missing:
        job.say(f"WARNING: {', '.join(chat.missing)} are not in the base's vocabulary and become ordinary tokens")
    chat.tokenizer.save_pretrained(job.out / TOKENIZER)
    (job.out / TOKENIZER / "chat_template.jinja").write_text(chat.tokenizer.chat_template, encoding="utf-8")
    source = standardize.local() / MESSAGES
    proved = chat.prove(_spread_rows(source))
    job.say(f"encoding by {chat.encoder.name}; {proved} rows proved against the tokenizer's own ids")

    sides = _Side(job.out / TRAIN), _Side(job.out / HOLDOUT)
    frames: list[pd.DataFrame] = []
    samples: list[str] = []
    groups = range(pq.ParquetFile(source).num_row_groups)
    for group in in_order(lambda index: _encode_group(chat, source, index, job.recipe), groups):
        frames.append(pd.DataFrame(group.contract))
        for part in group.parts:
            for side, batch in zip(sides, part, strict=True):
                side.add(batch)
        if not samples:
            samples = _readable_rows(chat, group.parts[0][0])
    (job.out / SAMPLES).write_text("\n".join(samples), encoding="utf-8")
    contract = pd.concat(frames, ignore_index=True)
    findings = run_suite(
        contract, PREPARED_ROWS, "prepared_rows", lambda rule: 1.0 if rule.severity == "critical" else 0.0,
        job.out / DOCS,
    )  # fmt: skip
    if findings.broken:
        row = next(row for row, rules in findings.failed.items() if any(r.says == findings.broken[0] for r in rules))
        raise BadData(f"{findings.broken[0]} (first in row {row})", "This is a fault of the template or of Retune")
    train, holdout = (side.close() for side in sides)
    if not train["rows"] or not holdout["rows"]:
        raise BadData(
            f"of the {'training' if not train['rows'] else 'holdout'} rows none has at most "
            f"{job.recipe.max_seq_length:,} tokens (the shortest row has {contract['tokens'].min():,})",
            "Raise max_seq_length, or use shorter conversations",
        )
    over, left_out = int(contract["tokens_over"].sum()), int(contract["left_out"].sum())
    line = (
        f"{train['tokens']:,} tokens in {train['rows']:,} rows, {train['trained'] / train['tokens']:.0%} trained; "
        f"{over:,} too long, {left_out:,} left out"
    )
    quantiles = contract["tokens"].quantile([0, 0.25, 0.5, 0.75, 0.9, 0.99, 1], interpolation="lower")
    facts = {
        "train": train, "holdout": holdout, "too_long": over, "left_out": left_out,
        "proved_rows": proved, "encoder": chat.encoder.name,
        "missing_special_tokens": chat.missing, "stop_tokens": chat.stop_tokens,
        "lengths": {f"p{share * 100:.0f}": int(tokens) for share, tokens in quantiles.items()},
        "checks": findings.table,
        "template_sha256": hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest(),
    }  # fmt: skip
    return Result(line, facts)


@dataclass
class _Group:
    """A row group of messages, encoded.

    Attributes:
        contract: columns of the facts that the suite checks, one entry per row.
        parts: pairs of Arrow record batches, of training and of holdout rows: the rows themselves, then what too long
            ones were split into.
    """

    contract: dict[str, Any]
    parts: list[tuple[Any, Any]]


def _encode_group(chat: ChatFormat, source: Path, index: int, recipe: Recipe) -> _Group:
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.ParquetFile(source).read_row_group(index, use_threads=False)
    conversations = [orjson.loads(messages) for messages in table["messages"].to_pylist()]
    rows, holdout, longest = table["row"].to_numpy(), table["holdout"].to_numpy(), recipe.max_seq_length
    encoded = chat.encode(conversations)
    contract = {"row": rows, **_contract(chat, encoded, conversations, longest)}
    usable = contract["tokens_over"] == 0
    over = np.flatnonzero(~usable)
    used = usable.copy()  # rows of which something is used
    parts = []
    if len(over) and recipe.on_too_long == "truncate":
        encoded = encoded.cut(longest)
        usable = used = np.add.reduceat(encoded.trained.astype(np.int64), encoded.starts) > 0
    elif len(over) and recipe.on_too_long == "split":
        pieces = [(row, piece) for row in over for piece in _split(chat, conversations[row], longest)]
        if pieces:
            origin = np.array([row for row, _ in pieces])
            used[origin] = True
            parts.append((chat.encode([piece for _, piece in pieces]), rows[origin], holdout[origin], origin >= 0))
    parts.insert(0, (encoded, rows, holdout, usable))
    contract["left_out"] = (~used).astype(np.int64)
    return _Group(contract, [_two_sides(*part) for part in parts])


def _split(chat: ChatFormat, messages: list[dict[str, str]], longest: int) -> list[list[dict[str, str]]]:
    """The conversation as several, cut between exchanges, each with the system message and as long as may be.

    An exchange that alone is too long is left out.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(system) :]

    def fits(part: list[dict[str, str]]) -> bool:
        return len(chat.encode([[*system, *part]]).ids) <= longest

    pieces: list[list[dict[str, str]]] = []
    current: list[dict[str, str]] = []
    for exchange in (body[i : i + 2] for i in range(0, len(body), 2)):
        if current and not fits([*current, *exchange]):
            pieces.append([*system, *current])
            current = []
        if current or fits(exchange):
            current = [*current, *exchange]
    return [*pieces, [*system, *current]] if current else pieces


def _two_sides(encoded: Encoded, rows: Any, holdout: Any, usable: Any) -> tuple[Any, Any]:
    import numpy as np

    train, held_out = (_batch(encoded, rows, np.flatnonzero(usable & side)) for side in (~holdout, holdout))
    return train, held_out


def _contract(
    chat: ChatFormat, encoded: Encoded, conversations: list[list[dict[str, str]]], longest: int
) -> dict[str, Any]:
    """What the suite checks, for each conversation."""
    import numpy as np

    def count(flags: Any) -> Any:
        return np.add.reduceat(flags.astype(np.int64), encoded.starts) if len(flags) else np.zeros(0, np.int64)

    tokens = encoded.ends - encoded.starts
    followed = np.append(encoded.trained[1:], False)
    followed[encoded.ends - 1] = False  # the next conversation does not go on with this one's turn
    ended = count(encoded.trained & ~followed & np.isin(encoded.ids, chat.stop_tokens))
    turns = np.array([sum(m["role"] == "assistant" for m in messages) for messages in conversations])
    bos = chat.tokenizer.bos_token_id
    return {
        "tokens": tokens,
        "tokens_over": (tokens > longest).astype(np.int64),
        "trained": count(encoded.trained),
        "bos_errors": np.abs(count(encoded.ids == bos) - chat.bos_count) if bos is not None else tokens * 0,
        "unended_turns": tokens * 0 if chat.missing else turns - ended,
    }


def _batch(encoded: Encoded, rows: Any, chosen: Any) -> Any:
    """An Arrow record batch of the chosen conversations: `row`, `input_ids`, `labels`."""
    import numpy as np
    import pyarrow as pa

    keep = np.zeros(len(rows), bool)
    keep[chosen] = True
    lengths = encoded.ends - encoded.starts
    flat = np.repeat(keep, lengths)
    offsets = pa.array(np.concatenate([[0], lengths[chosen].cumsum()]).astype(np.int32))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values[flat])) for values in (encoded.ids, encoded.labels)]
    return pa.RecordBatch.from_arrays([pa.array(rows[chosen]), *lists], ["row", "input_ids", "labels"])


class _Side:
    """One Arrow stream, written batch by batch, with the digest of its ids and labels."""

    def __init__(self, path: Path):
        import pyarrow as pa

        ints = pa.list_(pa.int32())
        schema = pa.schema([("row", pa.int64()), ("input_ids", ints), ("labels", ints)])
        self.writer = pa.ipc.new_stream(str(path), schema)
        self.digest = hashlib.sha256()
        self.facts = {"rows": 0, "tokens": 0, "trained": 0}

    def add(self, batch: Any) -> None:
        labels = batch["labels"].flatten().to_numpy()
        for values in (batch["input_ids"].flatten().to_numpy(), labels):
            self.digest.update(values.tobytes())
        self.facts["rows"] += len(batch)
        self.facts["tokens"] += len(labels)
        self.facts["trained"] += int((labels != IGNORED).sum())
        self.writer.write_batch(batch)

    def close(self) -> dict[str, Any]:
        self.writer.close()
        return {**self.facts, "ids_sha256": self.digest.hexdigest()}


def _spread_rows(source: Path) -> list[list[dict[str, str]]]:
    """Rows for the proof, from all over the file."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(source)
    groups = range(0, file.num_row_groups, max(1, file.num_row_groups // 4))
    each = PROVED_ROWS // len(groups)
    found: list[bytes] = []
    for group in groups:
        column = file.read_row_group(group, ["messages"], use_threads=False)["messages"]
        found += column.take(list(range(0, len(column), max(1, len(column) // each)))[:each]).to_pylist()
    return [orjson.loads(messages) for messages in found]


def _readable_rows(chat: ChatFormat, batch: Any) -> list[str]:
    return [
        f"row {row['row']}\n{_readable(chat, row['input_ids'], row['labels'])}\n"
        for row in batch.slice(0, SHOWN_ROWS).to_pylist()
    ]


def _readable(chat: ChatFormat, ids: list[int], labels: list[int]) -> str:
    """The text of the ids, with the trained stretches between » and «."""
    parts, begin = [], 0
    trained = [label != IGNORED for label in labels]
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[begin]:
            text = chat.tokenizer.decode(ids[begin:end], skip_special_tokens=False)
            parts.append(f"»{text}«" if trained[begin] else text)
            begin = end
    return "".join(parts)
