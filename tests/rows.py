"""Rows of datasets in tests: as files of each format, and as the data stages leave them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from include.chat.tokenized import load_rows
from include.data.conversation import Conversation, conversations_in
from include.data.tables import read_table
from tests.conftest import conversation

ROWS = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(40)]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def messages(standardized: Any) -> dict[int, Conversation]:
    """Return the conversations that `standardize` wrote, by row."""
    found = {}
    for file in sorted((standardized.local() / "messages").iterdir()):
        table = read_table(file)
        found.update(zip(table["row"].to_pylist(), conversations_in(table), strict=True))
    return found


def prepared_rows(prepared: Any) -> list[dict[str, Any]]:
    """Return the rows that `template` wrote: those for training, then those that are held out."""
    return [row for side in ("train", "holdout") for row in load_rows(prepared.files(side))]


def listed(validated: Any, name: str) -> dict[int, dict[str, Any]]:
    """Return the entries of the quarantine, or of the list of repaired rows, by row."""
    entries = [json.loads(line) for line in (validated.local() / name).read_text().splitlines()]
    return {entry["row"]: entry for entry in entries}


def parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def csv(rows: list[Any]) -> bytes:
    quoted = ['"' + json.dumps(row["conversations"]).replace('"', '""') + '"' for row in rows]
    return ("conversations\n" + "\n".join(quoted) + "\n").encode()
