"""Turns: texts in parts, keys beside the text, and the order of turns of which one cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from include.data.conversation import ParsedRow
from include.data.expectations import RAW_ROWS
from include.data.sharegpt import parse_row

CRITICAL = {rule.column for rule in RAW_ROWS if rule.severity == "critical"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def parse(*turns: Any, **options: bool) -> ParsedRow:
    return parse_row(json.dumps({"messages": turns}).encode(), **options)


def refusals(parsed: ParsedRow) -> list[str]:
    return [name for name in CRITICAL if parsed.faults[name]]


def text(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        ([text("hi")], "hi"),
        ([text("hi"), text(" there")], "hi there"),
        ([{"type": "input_text", "text": "hi"}], "hi"),
        ([{"text": "hi", "image_url": None}], "hi"),
    ],
)
def test_text_parts_are_joined(parts: list[Any], joined: str) -> None:
    parsed = parse({"role": "user", "content": parts}, ASSISTANT)
    assert parsed.conversation.contents == [joined, "ho"]
    assert not any(parsed.faults.values()) and not parsed.unused
    assert parse({"role": "user", "content": [text("a", id=1)]}, ASSISTANT).unused == ["part key id"]


PICTURE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("turn", "fault", "detail"),
    [
        ({"content": [text("hi"), PICTURE]}, "media", "a part of the type image_url"),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "media", "a part of the type input_audio"),
        ({"content": [{"text": "hi", "video": "x"}]}, "media", "a part of the type video"),
        ({"content": [{"type": "thinking", "thinking": "x"}]}, "reasoning", "a part of the type thinking"),
        ({"content": [{"type": "tool_use"}]}, "non_text_values", "a part that is not a text (type tool_use)"),
        ({"content": [text(7)]}, "non_text_values", "a part that is not a text (type text)"),
        ({"content": ["hi"]}, "non_text_values", "the value is a list with a text in it"),
        ({"content": []}, "non_text_values", "the value is not a text (a list)"),
        ({"content": None}, "non_text_values", "the value is not a text (null)"),
        ({"content": None, "image": "x"}, "media", "the key image"),
        ({"content": "hi", "images": ["x"]}, "media", "the key images"),
        ({"content": "hi", "reasoning_content": "x"}, "reasoning", "the key reasoning_content"),
        ({"content": "hi", "thinking": "x"}, "reasoning", "the key thinking"),
        ({"content": "hi", "tools": [{"name": "f"}]}, "bad_tool_lists", "the key tools"),
        ({"content": "hi", "value": "ha"}, "malformed_turns", "value and content differ"),
        ({"content": "hi", "from": "system"}, "malformed_turns", "from and role differ"),
    ],
)
@pytest.mark.parametrize("speaker", ["user", "assistant"])
def test_a_turn_that_cannot_be_read_refuses_the_row_for_this_reason_alone(
    speaker: str, turn: dict[str, Any], fault: str, detail: str
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]
    number = 1 if speaker == "user" else 2
    turns[number] = {"role": speaker, **turn}
    if turn.get("from"):
        turns[number] = {**turn, "role": speaker, "from": "alien"}
    parsed = parse(*turns)
    found = {*refusals(parsed)} - ({"unknown_roles"} if turn.get("from") else set())
    assert found == {fault}
    assert detail in parsed.detail or "unknown role 'alien'" in parsed.detail


def test_an_unknown_speaker_says_nothing_about_the_order() -> None:
    assert refusals(parse({"role": "alien", "content": "hi"}, ASSISTANT)) == ["unknown_roles"]
    assert refusals(parse({"content": "hi"}, ASSISTANT)) == ["malformed_turns"]
    assert refusals(parse("hi", ASSISTANT)) == ["malformed_turns"]
    assert set(refusals(parse(ASSISTANT, ASSISTANT))) == {"order_errors", "first_speaker"}


def test_null_keys_are_absent_keys() -> None:
    first = {"from": "human", "value": "hi", "role": None, "content": None, "images": None, "tool_calls": None}
    second = {"from": None, "value": None, "role": "assistant", "content": "ho", "name": None, "weight": None}
    parsed = parse(first, second)
    assert parsed.conversation.messages == [USER, ASSISTANT]
    assert not any(parsed.faults.values()) and not parsed.unused


def test_developer_is_system_and_an_empty_system_turn_is_left_out() -> None:
    parsed = parse({"role": "developer", "content": "Be brief."}, USER, ASSISTANT)
    assert parsed.conversation.roles == ("system", "user", "assistant") and parsed.repairs == ["role alias"]
    for empty in ("", " \n"):
        parsed = parse({"role": "system", "content": empty}, USER, ASSISTANT)
        assert parsed.conversation.messages == [USER, ASSISTANT]
        assert parsed.repairs == ["empty system turn left out"] and not any(parsed.faults.values())


def test_keys_that_are_not_used_are_named_and_flags_are_not() -> None:
    parsed = parse({**USER, "name": "Anna"}, {**ASSISTANT, "id": 7, "train": True, "weight": 1, "images": []})
    assert parsed.unused == ["turn key name", "turn key id"] and not refusals(parsed)
    assert parsed.faults["unknown_keys"] == 2


def test_a_tool_may_answer_several_calls_in_a_row() -> None:
    answers = [{"role": "tool", "content": str(i)} for i in range(2)]
    calls = [{"function": {"name": "f", "arguments": "{}"}}] * 2
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    for merge in (False, True):
        parsed = parse(USER, called, *answers, ASSISTANT, merge_turns=merge)
        assert not parsed.faults["order_errors"]
        assert parsed.conversation.roles == ("user", "assistant", "tool", "tool", "assistant")
