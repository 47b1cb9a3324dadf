"""Tool calls as OpenAI's API writes them, in the form that chat templates take."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from include.data.tool_calls import read_calls

FUNCTION = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("turn", "identifier"),
    [
        ({"tool_calls": [{"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}, "7"),
        ({"tool_calls": [{"id": None, "function": FUNCTION}]}, None),
        ({"tool_calls": [FUNCTION], "function_call": None}, None),
        ({"tool_calls": '[{"function": {"name": "f", "arguments": {"x": 1}}}]'}, None),
        ({"function_call": {"name": "f", "arguments": '{"x": 1}'}, "tool_calls": []}, None),
        ({"function_call": '{"name": "f", "arguments": {"x": 1}}'}, None),
    ],
)
def test_arguments_become_objects(turn: dict[str, Any], identifier: str | None) -> None:
    expected = {"id": identifier} if identifier else {}
    assert orjson.loads(read_calls(turn) or "") == [{**expected, "type": "function", "function": FUNCTION}]


@pytest.mark.parametrize("turn", [{}, {"tool_calls": None}, {"tool_calls": []}, {"tool_calls": " "}])
def test_empty_calls_are_none(turn: dict[str, Any]) -> None:
    assert read_calls(turn) is None


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"tool_calls": 0}, "tool_calls is not a list"),
        ({"tool_calls": "f(1)"}, "tool_calls: no JSON"),
        ({"tool_calls": ["f"]}, "a tool call is not an object"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "a tool call has no function with a name"),
        ({"tool_calls": [{"name": "f", "arguments": "x=1"}]}, "the arguments of a tool call: no JSON"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "the arguments of a tool call are not an object"),
        ({"tool_calls": [FUNCTION], "function_call": FUNCTION}, "both tool_calls and function_call"),
    ],
)
def test_other_calls_are_refused(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_calls(turn)
