"""Columns of a row: used, refused with a reason that names the column, or named as unused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from include.data.conversation import ParsedRow
from include.data.expectations import RAW_ROWS
from include.data.sharegpt import parse_row

CRITICAL = {rule.column for rule in RAW_ROWS if rule.severity == "critical"}
ASKED, TOLD = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}
TURNS, NO = [ASKED, TOLD], {"from": "gpt", "value": "no"}


def parse(row: Any, **options: bool) -> ParsedRow:
    return parse_row(json.dumps(row).encode(), **options)


def refusals(parsed: ParsedRow) -> list[str]:
    return [name for name in CRITICAL if parsed.faults[name]]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"conversations": TURNS, "system": "Be brief."}, {}),
        ({"messages": TURNS, "system_prompt": "Be brief."}, {}),
        ({"messages": TURNS, "system": "", "system_prompt": "Be brief."}, {}),
        ({"messages": TURNS, "system": [{"type": "text", "text": "Be brief."}]}, {}),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *TURNS], "system": "Be brief.\n"}, {}),
        ({"conversations": [{"from": "system", "value": ""}, *TURNS], "system": "Be brief."}, {}),
        ({"instruction": "hi", "output": "ho", "system": "Be brief."}, {"alpaca": True}),
        ({"prompt": "hi", "chosen": "ho", "rejected": "no", "system": "Be brief."}, {"pairs": True}),
        (
            {"chosen": TURNS, "rejected": [ASKED, {"from": "gpt", "value": "no"}], "system": "Be brief."},
            {"pairs": True},
        ),
    ],
)
def test_a_system_column_becomes_the_system_turn(row: Any, options: dict[str, bool]) -> None:
    parsed = parse(row, **options)
    assert parsed.conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    assert not refusals(parsed) and not parsed.unused


@pytest.mark.parametrize(
    ("more", "fault", "detail"),
    [
        ({"system": 7}, "non_text_values", "column system: the value is not a text (a number)"),
        ({"system": "a", "system_prompt": "b"}, "system_conflicts", "the columns system and system_prompt differ"),
        ({"tools": "no list"}, "bad_tool_lists", "column tools: not a list of objects"),
        ({"functions": ["f"]}, "bad_tool_lists", "column functions: not a list of objects"),
        ({"tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "bad_tool_lists", "tools and functions differ"),
        ({"images": ["0.jpg"]}, "media", "the column images"),
        ({"video": "0.mp4"}, "media", "the column video"),
        ({"Audio": {"path": "0.mp3"}}, "media", "the column Audio"),
        ({"label": False}, "labels", "the column label"),
        ({"label": True}, "labels", "the column label"),
        ({"label": "False"}, "labels", "the column label"),
        ({"kto_tag": True}, "labels", "the column kto_tag"),
        ({"weight": 0.5}, "row_weights", "the column weight"),
        ({"sample_weight": "2"}, "row_weights", "the column sample_weight"),
        ({"label": "2"}, "labels", "the column label"),
        ({"train": False}, "row_weights", "the column train"),
        ({"train": "False"}, "row_weights", "the column train"),
        ({"train": 0}, "row_weights", "the column train"),
        ({"thinking": "Well."}, "reasoning", "the column thinking"),
    ],
)
def test_a_column_that_changes_what_should_be_learned_refuses_the_row(
    more: dict[str, Any], fault: str, detail: str
) -> None:
    parsed = parse({"conversations": TURNS, **more})
    assert {*refusals(parsed)} - {"tool_lists"} == {fault}
    assert detail in parsed.detail
    assert not parsed.unused


def test_a_system_text_other_than_the_conversations_own_refuses_the_row() -> None:
    parsed = parse({"conversations": [{"from": "system", "value": "a"}, *TURNS], "system": "b"})
    assert refusals(parsed) == ["system_conflicts"]


@pytest.mark.parametrize(
    "more",
    [
        {"images": [], "audio": None, "label": None, "weight": 1, "sample_weight": "1.0", "train": True, "loss": "1"},
        {"messages": [], "conversation": None, "tools": [], "functions": "[]", "system": " "},
        {"system": None, "tools": None, "id": None},
    ],
)
def test_columns_that_say_nothing_are_not_named(more: dict[str, Any]) -> None:
    parsed = parse({"conversations": TURNS, **more})
    assert [*parsed.conversation.contents] == ["hi", "ho"]
    assert not any(parsed.faults.values()) and not parsed.unused


def test_other_columns_are_named() -> None:
    row = {"conversations": TURNS, "messages": [ASKED], "id": 7, "label": "cooking", "thinking": True, "history": []}
    parsed = parse(row)
    assert not refusals(parsed)
    assert parsed.unused == [f"column {name}" for name in ("messages", "id", "label", "thinking", "history")]
    assert parsed.faults["unused_columns"] == 5
    pair = {"prompt": "x", "chosen": TURNS, "rejected": [ASKED, NO], "score_chosen": 7.5}
    assert parse(pair, pairs=True).unused == ["column prompt", "column score_chosen"]


def test_functions_are_tools() -> None:
    functions = [{"name": "look", "parameters": {}}]
    for row in ({"functions": functions}, {"functions": json.dumps(functions), "tools": None}, {"tools": functions}):
        parsed = parse({"messages": TURNS, **row})
        assert parsed.conversation.tools == '[{"name":"look","parameters":{}}]'
        assert refusals(parsed) == ["tool_lists"], "unless the template renders tools"


def test_turns_that_python_printed_are_read() -> None:
    printed = "[{'from': 'human', 'value': \"it's\"}, {'from': 'gpt', 'value': None, 'content': 'ho'}]"
    parsed = parse({"conversations": printed})
    assert parsed.conversation.contents == ["it's", "ho"]
    assert parsed.repairs == ["conversation was Python's text of a list"]
    for text in ("[" * 5000, "__import__('os')", "[{'a': {1}}]", "array([1])"):
        assert parse({"conversations": text}).faults["unreadable"]
    pair = {"prompt": "hi", "chosen": str([{"role": "assistant", "content": "ho"}]), "rejected": "[{'not': 'turns'}]"}
    parsed = parse(pair, pairs=True)
    assert (parsed.conversation.contents[-1], parsed.conversation.rejected) == ("ho", "[{'not': 'turns'}]")
    assert parsed.repairs == ["chosen was Python's text of a list"]
