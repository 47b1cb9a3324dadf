"""Each column, key and part of a row is used, refuses the row with a reason that names it, or is named as unused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from include.data.conversation import ParsedRow
from include.data.expectations import RAW_ROWS
from include.data.sharegpt import parse_row

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TURNS = [USER, ASSISTANT]
CRITICAL = [rule.column for rule in RAW_ROWS if rule.severity == "critical"]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}


def parse(row: Any, **options: bool) -> ParsedRow:
    return parse_row(json.dumps(row).encode(), **options)


def refusals(parsed: ParsedRow) -> set[str]:
    return {name for name in CRITICAL if parsed.faults[name]}


def assistant(**keys: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ASSISTANT, **keys}]}


def asked(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ASSISTANT]}


USED: list[tuple[Any, list[str], list[str]]] = [  # row, texts of the turns, repairs
    ({"messages": TURNS, "system": "S"}, ["S", "hi", "ho"], []),
    ({"messages": TURNS, "system_prompt": "S", "system": None}, ["S", "hi", "ho"], []),
    ({"messages": [{"role": "system", "content": "S "}, *TURNS], "system": "S"}, ["S ", "hi", "ho"], []),
    (
        {"messages": [{"role": "system", "content": ""}, *TURNS], "system": "S"},
        ["S", "hi", "ho"], ["empty system turn left out"],
    ),
    ({"messages": [{"role": "system", "content": " "}, *TURNS]}, ["hi", "ho"], ["empty system turn left out"]),
    ({"messages": [{"role": "developer", "content": "D"}, *TURNS]}, ["D", "hi", "ho"], ["role alias"]),
    ({"conversations": [], "messages": TURNS}, ["hi", "ho"], []),
    ({"conversations": repr(TURNS)}, ["hi", "ho"], ["conversation was a Python literal"]),
    (asked([{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]), ["ab", "ho"], []),
    ({"messages": [{**USER, "from": None, "value": None}, ASSISTANT], "images": [], "label": None}, ["hi", "ho"], []),
]  # fmt: skip


@pytest.mark.parametrize(("row", "texts", "repairs"), USED)
def test_what_is_known_is_used(row: Any, texts: list[str], repairs: list[str]) -> None:
    parsed = parse(row)
    assert (parsed.conversation.contents, parsed.repairs, parsed.unused) == (texts, repairs, [])
    assert not refusals(parsed)


ALPACA = [
    ({"instruction": "", "input": "x", "output": "y"}, ["x", "y"]),
    ({"instruction": "Square.", "input": 0, "output": 0}, ["Square.\n\n0", "0"]),
    ({"instruction": "q", "input": "", "output": "y", "history": [["a", "b"]], "system": "S"},
     ["S", "a", "b", "q", "y"]),
    ({"instruction": "q", "output": "y", "history": "[('a', 'b')]"}, ["a", "b", "q", "y"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "texts"), ALPACA)
def test_alpaca_columns_are_joined(row: Any, texts: list[str]) -> None:
    parsed = parse(row, alpaca=True)
    assert parsed.conversation.contents == texts
    assert not refusals(parsed)
    assert not parsed.unused


def test_a_system_column_precedes_both_answers_of_a_pair() -> None:
    parsed = parse({"prompt": "q", "chosen": "y", "rejected": "n", "system": "S", "margin": 1}, pairs=True)
    assert (parsed.conversation.contents, parsed.conversation.rejected) == (["S", "q", "y"], "n")
    assert parsed.unused == ["column margin"]


REFUSED: list[tuple[Any, str, str]] = [  # row, the only reason, a part of the detail
    ({"messages": [{"role": "system", "content": "T"}, *TURNS], "system": "S"}, "system_conflicts", "system column"),
    ({"messages": TURNS, "system": "S", "system_prompt": "T"}, "system_conflicts", "system_prompt"),
    ({"messages": TURNS, "system": 3}, "non_text_values", "column system"),
    ({"messages": TURNS, "images": ["0.jpg"]}, "media", "column images"),
    (asked([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]), "media", "image_url"),
    (asked([{"type": "input_audio", "input_audio": {}}]), "media", "turn 1: a part input_audio"),
    (asked([{"type": "tool_use", "name": "f"}]), "non_text_values", "a part of the type 'tool_use'"),
    (asked([{"type": "thinking", "thinking": "hm"}]), "reasoning", "a part thinking"),
    (asked(None), "non_text_values", "turn 1: the value is not a text (null)"),
    ({"messages": ["hi", ASSISTANT]}, "malformed_turns", "turn 1"),
    ({"messages": [{"role": "alien", "content": "a"}, ASSISTANT]}, "unknown_roles", "alien"),
    ({"messages": [USER, {"role": "alien", "content": "a"}]}, "unknown_roles", "alien"),
    ({"messages": TURNS, "label": False}, "labels", "column label"),
    ({"messages": TURNS, "label": "True"}, "labels", "column label"),
    ({"messages": TURNS, "weight": 0.5}, "row_weights", "column weight"),
    (assistant(reasoning_content="I look."), "reasoning", "turn 2: key reasoning_content"),
    (assistant(thinking="I look."), "reasoning", "turn 2: key thinking"),
    ({"messages": TURNS, "functions": [{"name": "f"}]}, "tool_lists", ""),
    ({"messages": TURNS, "functions": [{"name": "f"}], "tools": [{"name": "g"}]}, "bad_tool_lists", "differ"),
]


@pytest.mark.parametrize(("row", "fault", "detail"), REFUSED)
def test_what_changes_the_learning_refuses_the_row_with_this_reason_alone(row: Any, fault: str, detail: str) -> None:
    parsed = parse(row)
    assert refusals(parsed) - ({"tool_lists"} if fault == "bad_tool_lists" else set()) == {fault}
    assert detail in parsed.detail


def test_other_columns_and_keys_are_named() -> None:
    parsed = parse({**assistant(mood="x", id=None, train=True), "source": "s", "id": 0, "label": "maths", "weight": 1})
    assert sorted(parsed.unused) == ["column id", "column label", "column source", "column weight", "turn key mood"]
    assert not refusals(parsed)


@pytest.mark.parametrize(
    "keys",
    [
        {"tool_calls": [{**CALL, "function": {"name": "look", "arguments": '{"at": 1}'}}]},
        {"tool_calls": [CALL], "function_call": None},
        {"function_call": {"name": "look", "arguments": '{"at": 1}'}},
        {"tool_calls": json.dumps([CALL])},
    ],
)
def test_calls_of_tools_are_read_in_every_form(keys: dict[str, Any]) -> None:
    parsed = parse(assistant(content=None, **keys))
    assert parsed.conversation.messages == [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert refusals(parsed) == {"tool_calls"}
    for bad in ([{"a": 1}], [{"function": {"name": "f", "arguments": "no JSON"}}], "text"):
        assert "bad_tool_calls" in refusals(parse(assistant(tool_calls=bad)))
    assert "bad_tool_calls" in refusals(parse({"messages": [{**USER, **keys}, ASSISTANT]}))


def test_null_keys_of_parquet_are_absent_keys(material: Path) -> None:
    folder = material / "cases" / "37-mixed-keys-in-parquet"
    columns = pq.read_table(folder / "mixed_keys.parquet").to_pylist()
    lines = (folder / "mixed_keys.jsonl").read_bytes().splitlines()
    assert [parse(row).conversation for row in columns] == [parse_row(line).conversation for line in lines]
    assert not any(refusals(parse(row)) or parse(row).unused for row in columns)


SIMPLE = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from(["", "x", "1", "[]"]))
VALUES = st.one_of(SIMPLE, st.lists(SIMPLE, max_size=2), st.dictionaries(st.sampled_from("ab"), SIMPLE, max_size=2))
COLUMNS = [
    "system", "system_prompt", "tools", "functions", "images", "image", "audios", "video", "label", "kto_tag", "weight",
    "sample_weight", "conversation", "history", "id", "source", "score", "",
]  # fmt: skip
KEYS = [
    "train", "loss", "weight", "loss_scale", "tool_calls", "function_call", "reasoning_content", "thinking", "images",
    "from", "value", "name", "id", "tool_call_id", "refusal", "",
]  # fmt: skip
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "thinking", "file", None]), "text": st.sampled_from(["p", None])},
    optional={"image_url": VALUES, "thinking": VALUES, "cache_control": VALUES},
)


@settings(max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(COLUMNS), st.sampled_from(KEYS), VALUES, st.sampled_from([0, 1]), PARTS, st.integers(0, 2))
def test_anything_beside_the_turns_is_used_refused_or_named(
    column: str, key: str, value: Any, turn: int, part: dict[str, Any], place: int
) -> None:
    turns = [dict(USER), dict(ASSISTANT)]
    row: dict[str, Any] = {"messages": turns}
    if place == 0:
        row[column], name, added = value, f"column {column}", value
    elif place == 1:
        turns[turn][key], name, added = value, f"turn key {key}", value
    else:
        turns[0]["content"], name, added = [{"type": "text", "text": "q"}, part], "", part  # type: ignore[assignment]
    parsed, plain = parse(row), parse({"messages": TURNS})
    if refusals(parsed):
        word = [column, "turn" if key == "from" else key, ""][place]
        assert word in parsed.detail or refusals(parsed) <= {
            "tool_lists",
            "tool_calls",
            "all_masked",
            "bad_train_flags",
        }
    elif place < 2:
        empty = added is None or added in ("", "[]", [], {})
        changed = parsed.conversation != plain.conversation
        followed = key in ("train", "loss", "weight") and added in (0, 1, True, False)  # as without a flag, or masked
        same = key in ("from", "value") and added in ("", None)
        assert empty or changed or name in parsed.unused or (place == 1 and (followed or same))
    else:
        assert parsed.conversation.contents[0] == "qp"
        left = [other for other in part if other not in ("type", "text") and part[other] is not None]
        assert {f"key {other} of a part" for other in left if other != "thinking"} <= set(parsed.unused)
