"""Alpaca rows: instruction, input and output as one exchange, after the exchanges of `history`."""

from __future__ import annotations

from typing import Any

import orjson

from include.data.conversation import ParsedRow, Unreadable, is_absent, kind_of
from include.data.literals import read_literal

QUESTION_COLUMNS = ("instruction", "input", "history")
ANSWER_COLUMNS = ("output", "response")


def alpaca_turns(row: dict[str, Any], parsed: ParsedRow) -> tuple[list[Any], set[str]]:
    """Return Stanford Alpaca's columns as turns, and the names of the columns that are used.

    Raises:
        Unreadable: the row has no question or no answer.
    """
    name = next((name for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    if name is None or all(row.get(column) is None for column in ("instruction", "input")):
        raise Unreadable(f"no instruction and output columns (it has: {', '.join(sorted(map(str, row)))})")
    answer = {"role": "assistant", "content": _text_of(row[name], name, parsed)}
    return [*alpaca_prompt(row, parsed), answer], {*QUESTION_COLUMNS, name}


def alpaca_prompt(row: dict[str, Any], parsed: ParsedRow) -> list[Any]:
    """Return the turns before the answer. An input, if any, follows the instruction after an empty line."""
    parts = [_text_of(row.get(name), name, parsed) for name in ("instruction", "input")]
    question = None if None in parts else "\n\n".join(text for text in parts if text and text.strip())
    return [*_earlier_turns(row.get("history"), parsed), {"role": "user", "content": question}]


def _text_of(value: Any, column: str, parsed: ParsedRow) -> str | None:
    """Return a value of a column as text: a number as JSON writes it, "" for null; None, and a fault, for others."""
    if isinstance(value, str):
        return value
    if is_absent(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        parsed.add_fault("non_text_values", f"column {column}: the value is not a text ({kind_of(value)})")
        return None
    return orjson.dumps(value).decode()


def _earlier_turns(history: Any, parsed: ParsedRow) -> list[Any]:
    """Return the turns of a list of pairs of a question and an answer, which may be written as a text."""
    if isinstance(history, str) and history.strip():
        history = read_literal(history, "history", parsed)
    if is_absent(history):
        return []
    if not isinstance(history, list):
        parsed.add_fault("bad_history", f"column history: not a list of pairs ({kind_of(history)})")
        return []
    turns: list[Any] = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            parsed.add_fault("bad_history", f"column history: entry {number} is not a question and an answer")
            return []
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns
