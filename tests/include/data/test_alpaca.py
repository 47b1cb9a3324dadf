"""Alpaca rows: what becomes of each of their columns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from include.data.expectations import RAW_ROWS
from include.data.sharegpt import parse_row

CRITICAL = {rule.column for rule in RAW_ROWS if rule.severity == "critical"}


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.\n\n1 2", "3"]),
        ({"instruction": "Add.", "input": " ", "output": "3"}, ["Add.", "3"]),
        ({"instruction": "", "input": "1 and 2?", "output": "3"}, ["1 and 2?", "3"]),
        ({"instruction": None, "input": "1 and 2?", "output": None, "response": "3"}, ["1 and 2?", "3"]),
        ({"instruction": "Square.", "input": 0, "output": 0}, ["Square.\n\n0", "0"]),
        ({"instruction": "Square.", "input": 1.5, "output": "2.25"}, ["Square.\n\n1.5", "2.25"]),
        ({"instruction": "q", "output": "a", "history": [["b", "c"], ["d", "e"]]}, ["b", "c", "d", "e", "q", "a"]),
        ({"instruction": "q", "output": "a", "history": '[["b", "c"]]'}, ["b", "c", "q", "a"]),
        ({"instruction": "q", "output": "a", "history": "[['b', 'c']]"}, ["b", "c", "q", "a"]),
        ({"instruction": "q", "output": "a", "history": []}, ["q", "a"]),
        ({"instruction": "q", "output": "a", "history": None}, ["q", "a"]),
    ],
)
def test_columns_become_turns(row: dict[str, Any], contents: list[str]) -> None:
    parsed = parse_row(json.dumps(row).encode(), alpaca=True)
    assert parsed.conversation.contents == contents
    assert parsed.conversation.roles == ("user", "assistant") * (len(contents) // 2)
    assert not any(parsed.faults.values()) and not parsed.unused


@pytest.mark.parametrize(
    ("row", "fault", "detail"),
    [
        ({"instruction": "", "input": "", "output": "3"}, "empty_values", "turn 1: the text is empty"),
        (
            {"instruction": "q", "input": ["x"], "output": "3"},
            "non_text_values",
            "column input: the value is",
        ),
        ({"instruction": "q", "output": True}, "non_text_values", "column output: the value is not a text"),
        ({"instruction": "q", "output": "a", "history": "b"}, "bad_history", "column history: not a list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["b"]]}, "bad_history", "column history: entry 1 is not a"),
        ({"output": "a"}, "unreadable", "no instruction and output columns"),
        ({"instruction": "q", "output": None}, "unreadable", "no instruction and output columns"),
    ],
)
def test_columns_that_cannot_be_read_refuse_the_row(row: dict[str, Any], fault: str, detail: str) -> None:
    parsed = parse_row(json.dumps(row).encode(), alpaca=True)
    assert {name for name in CRITICAL if parsed.faults[name]} == {fault}
    assert parsed.detail.startswith(detail)


def test_a_preference_row_has_earlier_turns_too() -> None:
    row = {"instruction": "q", "input": 7, "chosen": "a", "rejected": "z", "history": [["b", "c"]]}
    parsed = parse_row(json.dumps(row).encode(), pairs=True)
    assert parsed.conversation.contents == ["b", "c", "q\n\n7", "a"] and not any(parsed.faults.values())


def test_a_second_answer_is_named_as_unused() -> None:
    row = {"instruction": "q", "output": "a", "response": "b", "text": "q a"}
    parsed = parse_row(json.dumps(row).encode(), alpaca=True)
    assert parsed.conversation.contents == ["q", "a"] and parsed.unused == ["column response", "column text"]
