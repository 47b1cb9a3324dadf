"""template: messages become token ids and loss masks, once; every later stage works with these ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from include.chat import IGNORED, ChatFormat, Encoded
from include.errors import BadData
from include.expectations import PREPARED_ROWS
from include.expectations import validate as run_suite
from include.sources import ROWS_PER_GROUP, fetch_base
from include.stage import Job, Result, stage
from include.store import Artifact
from tasks.standardize import MESSAGES

TRAIN, HOLDOUT, TOKENIZER, SAMPLES, DOCS = "train.arrow", "holdout.arrow", "tokenizer", "samples.txt", "data_docs"
PROVED_ROWS, SHOWN_ROWS = 256, 10


@stage(
    version=1,
    uses=("base_model", "base_revision", "chat_template", "missing_special_tokens", "max_seq_length"),
)
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
    sides = _Side(job.out / TRAIN), _Side(job.out / HOLDOUT)
    contract, proved = _Contract(chat, job.recipe.max_seq_length), 0
    samples: list[str] = []
    for batch in pq.ParquetFile(standardize.local() / MESSAGES).iter_batches(ROWS_PER_GROUP):
        rows = batch.to_pylist()
        encoded = chat.encode([row["messages"] for row in rows])
        if proved < PROVED_ROWS:
            proved += chat.prove([row["messages"] for row in rows[: PROVED_ROWS - proved]])
        for row, tokens in zip(rows, encoded, strict=True):
            if contract.note(row["row"], row["messages"], tokens):
                sides[row["holdout"]].add(row["row"], tokens)
                if len(samples) < SHOWN_ROWS and not row["holdout"]:
                    samples.append(f"row {row['row']}\n{_readable(chat, tokens)}\n")
        for side in sides:
            side.flush()
    findings = run_suite(
        pd.DataFrame(contract.columns), PREPARED_ROWS, "prepared_rows",
        lambda rule: 1.0 if rule.severity == "critical" else 0.0, job.out / DOCS,
    )  # fmt: skip
    (job.out / SAMPLES).write_text("\n".join(samples), encoding="utf-8")
    if findings.broken:
        row = next(row for row, rules in findings.failed.items() if any(r.says == findings.broken[0] for r in rules))
        raise BadData(f"{findings.broken[0]} (first in row {row})", "This is a fault of the template or of Retune")
    train, holdout = (side.close() for side in sides)
    over = sum(contract.columns["tokens_over"])
    if not train["rows"] or not holdout["rows"]:
        raise BadData(
            f"of the {'training' if not train['rows'] else 'holdout'} rows none has at most "
            f"{job.recipe.max_seq_length:,} tokens (the shortest row has {min(contract.columns['tokens']):,})",
            "Raise max_seq_length, or use shorter conversations",
        )
    line = (
        f"{train['tokens']:,} tokens in {train['rows']:,} rows, {train['trained'] / train['tokens']:.0%} trained; "
        f"{over:,} too long"
    )
    facts = {
        "train": train, "holdout": holdout, "too_long": over, "proved_rows": proved,
        "missing_special_tokens": chat.missing, "stop_tokens": chat.stop_tokens,
        "lengths": _spread(contract.columns["tokens"]), "checks": findings.table,
        "template_sha256": hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest(),
    }  # fmt: skip
    return Result(line, facts)


@dataclass
class _Contract:
    """The facts about the prepared rows that the suite checks."""

    chat: ChatFormat
    longest: int
    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {
            key: [] for key in ("row", "tokens", "tokens_over", "trained", "bos_errors", "unended_turns")
        }
    )

    def note(self, row: int, messages: list[dict[str, str]], encoded: Encoded) -> bool:
        """Take down one row; whether it is short enough to be used."""
        ids, labels = encoded.ids, encoded.labels
        ends = set(self.chat.stop_tokens)
        ended = sum(
            label in ends and later == IGNORED for label, later in zip(labels, [*labels[1:], IGNORED], strict=True)
        )
        turns = sum(message["role"] == "assistant" for message in messages)
        bos = self.chat.tokenizer.bos_token_id
        bos_errors = 0 if bos is None else abs(ids.count(bos) - self.chat.bos_count)
        values = (
            row, len(ids), int(len(ids) > self.longest), sum(label != IGNORED for label in labels),
            bos_errors, 0 if self.chat.missing else turns - ended,
        )  # fmt: skip
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        return len(ids) <= self.longest


class _Side:
    """One Arrow stream that is written in groups of rows, with the digest of its ids."""

    def __init__(self, path: Any):
        import pyarrow as pa

        ints = pa.list_(pa.int32())
        self.schema = pa.schema([("row", pa.int64()), ("input_ids", ints), ("labels", ints)])
        self.writer = pa.ipc.new_stream(str(path), self.schema)
        self.digest, self.pending = hashlib.sha256(), []  # type: ignore[var-annotated]
        self.facts = {"rows": 0, "tokens": 0, "trained": 0}

    def add(self, row: int, encoded: Encoded) -> None:
        self.pending.append({"row": row, "input_ids": encoded.ids, "labels": encoded.labels})
        self.facts["rows"] += 1
        self.facts["tokens"] += len(encoded.ids)
        self.facts["trained"] += sum(label != IGNORED for label in encoded.labels)

    def flush(self) -> None:
        import pyarrow as pa

        batch = pa.RecordBatch.from_pylist(self.pending, schema=self.schema)
        for name in ("input_ids", "labels"):
            self.digest.update(batch[name].flatten().to_numpy().tobytes())
        self.writer.write_batch(batch)
        self.pending.clear()

    def close(self) -> dict[str, Any]:
        self.writer.close()
        return {**self.facts, "ids_sha256": self.digest.hexdigest()}


def _readable(chat: ChatFormat, encoded: Encoded) -> str:
    """The text of the ids, with the trained stretches between » and «."""
    parts, begin = [], 0
    trained = [label != IGNORED for label in encoded.labels]
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[begin]:
            text = chat.tokenizer.decode(encoded.ids[begin:end], skip_special_tokens=False)
            parts.append(f"»{text}«" if trained[begin] else text)
            begin = end
    return "".join(parts)


def _spread(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (0, 25, 50, 75, 90, 99, 100)}
