"""Calls of tools and lists of tools, in the form that chat templates take.

The form: https://huggingface.co/docs/transformers/chat_extras. A call is `{"type": "function", "function": {"name":
..., "arguments": {...}}}`, with an `id` where the row has one.
"""

from __future__ import annotations

from typing import Any

import orjson

from include.data.conversation import ParsedRow, is_absent, kind_of
from include.data.literals import read_literal

CALL_KEYS = ("tool_calls", "function_call")  # the second is OpenAI's older key of one call
TOOL_COLUMNS = ("tools", "functions")  # the second is OpenAI's older name


def read_calls(turn: dict[str, Any], role: str, parsed: ParsedRow, number: int) -> str | None:
    """Return a turn's calls as a JSON list, or None; count calls that cannot be read.

    Args:
        number: the turn's number in messages.
    """
    found: list[Any] = []
    for key in CALL_KEYS:
        value = turn.get(key)
        if isinstance(value, str) and not is_absent(value):
            value = read_literal(value, key, parsed, json_is_usual=True)
        if is_absent(value):
            continue
        values = value if isinstance(value, list) else [value]
        calls = [_call(entry, parsed) for entry in values]
        if role not in ("assistant", "?") or (found and found != calls) or not all(calls):
            problem = f"only the assistant calls tools, not {role}" if all(calls) else "not a name with arguments"
            parsed.add_fault("bad_tool_calls", f"turn {number}: {key}: {problem}")
            return None
        found = calls
    if not found:
        return None
    parsed.add_fault("tool_calls", "")
    return orjson.dumps(found).decode()


def _call(entry: Any, parsed: ParsedRow) -> dict[str, Any] | None:
    """Return a call in the templates' form; None if it has no name, or arguments that are not an object."""
    call = entry.get("function") if isinstance(entry, dict) and entry.get("function") is not None else entry
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments")
    if isinstance(arguments, str) and not is_absent(arguments):
        arguments = read_literal(arguments, "arguments of a call", parsed, json_is_usual=True)
    arguments = {} if is_absent(arguments) else arguments
    if not isinstance(arguments, dict):
        return None
    for part, known in ((entry, {"function", "id", "type", *call}), (call, {"name", "arguments", "id", "type"})):
        parsed.unused += [f"key {key[:60]} of a call" for key, value in part.items()
                          if key not in known and value is not None]  # fmt: skip
    made = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
    return made if entry.get("id") is None else {**made, "id": entry["id"]}


def read_tools(row: dict[str, Any], parsed: ParsedRow) -> None:
    """Read the columns of tools: lists of objects, or their JSON text. An empty list, text or null means no tools."""
    for column in TOOL_COLUMNS:
        tools = row.get(column)
        if isinstance(tools, str) and not is_absent(tools):
            tools = read_literal(tools, column, parsed, json_is_usual=True)
        if is_absent(tools) and not isinstance(tools, dict):
            continue
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            parsed.add_fault("bad_tool_lists", f"column {column}: not a list of objects ({kind_of(tools)})")
            return
        text = orjson.dumps(tools).decode()
        if parsed.conversation.tools not in (None, text):
            parsed.add_fault("bad_tool_lists", "the columns tools and functions differ")
            return
        parsed.faults["tool_lists"] = 1
        parsed.conversation.tools = text
