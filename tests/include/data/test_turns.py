"""Turns: texts in parts, keys beside the text, and the order of turns of which one cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from include.data.conversation import Conversation, ParsedRow
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
        ({"content": "hi", "reasoning_content": 7}, "reasoning", "the key reasoning_content is not a text"),
        ({"content": "hi", "thoughts": "x"}, "reasoning", "the key thoughts"),
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


ANSWER = "The answer."


@pytest.mark.parametrize(
    ("turn", "repairs"),
    [
        ({"content": ANSWER, "reasoning_content": " I think. \n"}, []),
        ({"content": ANSWER, "thinking": "I think."}, []),
        ({"content": f"<think>\nI think.\n</think>\n\n{ANSWER}"}, ["reasoning in the text is read as reasoning"]),
        ({"content": f"I think.\n</think>\n\n{ANSWER}"}, ["reasoning in the text is read as reasoning"]),
        (
            {"content": f"<think>I think.</think>{ANSWER}", "reasoning": "I think."},
            ["reasoning in the text is read as reasoning"],
        ),
    ],
)
def test_the_reasoning_of_an_answer_is_kept_dropped_or_refused(turn: dict[str, Any], repairs: list[str]) -> None:
    question = {"role": "user", "content": "Why? <think>no</think>"}
    raw = json.dumps({"messages": [question, {"role": "assistant", **turn}]}).encode()
    kept, dropped, refused = (parse_row(raw, reasoning=choice) for choice in ("keep", "drop", "refuse"))
    assert (kept.conversation.contents, kept.conversation.thoughts) == (
        [question["content"], ANSWER],
        ((1, "I think."),),
    )
    assert {name for name, count in kept.faults.items() if count} == {"reasoning_turns"}
    assert kept.repairs == repairs
    assert (dropped.conversation.contents, dropped.conversation.thoughts) == ([question["content"], ANSWER], ())
    assert not any(dropped.faults.values())
    assert dropped.repairs == [*repairs, "reasoning dropped"]
    assert {name for name, count in refused.faults.items() if count} == {"reasoning"}


@pytest.mark.parametrize(
    ("turns", "detail"),
    [
        ([{"thinking": "A."}, {}], "turn 1: the key thinking of a turn of the role user"),
        (
            [{}, {"thinking": "A.", "reasoning": "B."}],
            "turn 2: the key reasoning and another one have different reasoning",
        ),
        ([{}, {"content": "\n<think>\nLet me see, and"}], "turn 2: the reasoning in the text does not end (</think>)"),
    ],
)
def test_reasoning_that_nobody_can_place_refuses_the_row(turns: list[dict[str, str]], detail: str) -> None:
    plain = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ANSWER}]
    found = parse_row(json.dumps({"messages": [p | turn for p, turn in zip(plain, turns, strict=True)]}).encode())
    assert found.faults["reasoning"] == 1
    assert found.detail == detail


@pytest.mark.parametrize("reasoning", ["keep", "drop", "refuse"])
def test_empty_reasoning_is_none(reasoning: str) -> None:
    question = {"role": "user", "content": "<think> Why?"}
    answer = {"role": "assistant", "content": f"<think>\n\n</think>\n\n{ANSWER}"}
    parsed = parse_row(json.dumps({"messages": [question, answer]}).encode(), reasoning=reasoning)
    assert (parsed.conversation.contents[1], parsed.conversation.thoughts) == (ANSWER, ())
    assert not any(parsed.faults.values())
    assert parsed.repairs == ["empty reasoning removed"]
    assert Conversation.of([question, answer]) == parsed.conversation


@pytest.mark.parametrize(
    "text", ["It writes <think> first.", "Close it with </think> and go on.", "<Thinking>A.</Thinking>B.",
             "<|begin_of_thought|>A.<|end_of_thought|>B."],
)  # fmt: skip
def test_a_tag_within_an_answer_is_text_and_refused_where_no_reasoning_may_be_left(text: str) -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]})
    kept, dropped, refused = (parse_row(raw.encode(), reasoning=choice) for choice in ("keep", "drop", "refuse"))
    assert (kept.conversation.contents[1], kept.conversation.thoughts) == (text, ())
    assert kept.faults["reasoning"] == 0
    assert dropped.faults["reasoning"] == refused.faults["reasoning"] == 1
    assert "in the text, which may be reasoning" in refused.detail


def test_preference_rows_with_reasoning_in_their_answers_are_refused_unless_it_is_dropped() -> None:
    row = {"prompt": "Why?", "chosen": f"<think>A.</think>{ANSWER}", "rejected": "No."}
    raw = json.dumps(row).encode()
    assert parse_row(raw, pairs=True).faults["reasoning"] == 1
    dropped = parse_row(raw, pairs=True, reasoning="drop")
    assert (dropped.conversation.contents[-1], dropped.conversation.rejected) == (ANSWER, "No.")
    assert not any(dropped.faults.values())
