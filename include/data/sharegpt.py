"""Parse ShareGPT rows: the conversation of each row for training, and its faults for the data checks.

A row is one JSON document. The conversation is in the column `conversations`, `messages` or `conversation`; turns are
`from`/`value` or `role`/`content`; roles have aliases; preference rows have two answers. The parser repairs a row only
if no guess is needed, and names each repair. It counts every other fault, and the suite in
`include/data/expectations.py` decides about the row. Each column and key is used, or refuses the row, or is named as
unused; docs/data.md has the list.
"""

from __future__ import annotations

from typing import Any

import orjson

from include.data.alpaca import alpaca_turns
from include.data.columns import SYSTEM_COLUMNS, TOOL_COLUMNS, read_other_columns, read_tools, turns_of, with_system
from include.data.conversation import ParsedRow, Unreadable, to_columns
from include.data.preferences import add_rejected, pair_turns
from include.data.suspicious_text import as_lists, count_suspicious_text
from include.data.turns import read_turns


def parse_row(
    raw: bytes, alpaca: bool = False, merge_turns: bool = False, pairs: bool = False, reasoning: str = "keep"
) -> ParsedRow:
    """Parse one row, see `parse_rows`."""
    (row,), _ = parse_rows([raw], alpaca, merge_turns, pairs, reasoning)
    return row


def parse_rows(
    raw_rows: list[bytes], alpaca: bool, merge_turns: bool, pairs: bool = False, reasoning: str = "keep"
) -> tuple[list[ParsedRow], dict[str, Any]]:
    """Parse rows. Bad rows raise nothing: they have faults.

    Args:
        raw_rows: one JSON document per row; other bytes give the fault `unreadable`.
        alpaca: read the columns instruction, input and output (or response) as a conversation of one exchange.
        merge_turns: join consecutive turns of one role with an empty line between them.
        reasoning: "keep" the thoughts of answers, "drop" them, or "refuse" rows with thoughts.
        pairs: read preference rows: a prompt, a `chosen` and a `rejected` answer (see `pair_turns`).

    Returns:
        The parsed rows, and their conversations as Arrow columns: `roles` (joined by spaces), `contents` (lists of
        texts), `tools`, `rejected`, `masked` (lists of int32), `calls` and `thoughts` (JSON).
    """
    rows = [_parse(raw, alpaca, merge_turns, pairs, reasoning) for raw in raw_rows]
    columns = to_columns([row.conversation for row in rows])
    count_suspicious_text(columns["contents"], rows)
    if pairs:
        count_suspicious_text(as_lists(columns["rejected"]), rows)
    return rows, columns


def _parse(raw: bytes, alpaca: bool, merge_turns: bool, pairs: bool, reasoning: str) -> ParsedRow:
    parsed = ParsedRow()
    row = None
    try:
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise Unreadable(f"not JSON: {error}") from None
        if isinstance(row, list):  # a bare list of turns
            row = {"conversations": row}
        if not isinstance(row, dict):
            raise Unreadable(f"not an object but {type(row).__name__}")
        if pairs:
            turns, rejected_turns, used = pair_turns(row, parsed)
        elif alpaca:
            turns, used = alpaca_turns(row, parsed)
        else:
            turns, name = turns_of(row, parsed)
            used = {name}
    except Unreadable as reason:
        parsed.faults["unreadable"] = 1
        parsed.columns = tuple(sorted(map(str, row))) if isinstance(row, dict) else ()
        parsed.detail = str(reason)
        return parsed
    first = 1
    has_system = len(row) > 1 and not row.keys().isdisjoint(SYSTEM_COLUMNS)
    if has_system:
        turns, first = with_system(turns, row, parsed)
    read_turns(turns, parsed, merge_turns, first, reasoning)
    if pairs:
        other = ParsedRow()
        if has_system:
            rejected_turns, first = with_system(rejected_turns, row, other)
        read_turns(rejected_turns, other, merge_turns, first, reasoning)
        add_rejected(parsed, other)
    if len(row) > 1:
        if not row.keys().isdisjoint(TOOL_COLUMNS):
            read_tools(row, parsed)
        read_other_columns(row, used, parsed)
    return parsed
