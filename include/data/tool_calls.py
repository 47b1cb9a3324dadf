"""Tool calls of a turn (OpenAI's `tool_calls`, and the older `function_call`) in the form that chat templates take."""

from __future__ import annotations

from typing import Any

import orjson

from include.data.conversation import is_absent

CALL_KEYS = ("tool_calls", "function_call")


def read_calls(turn: dict[str, Any]) -> str | None:
    """Return the tool calls of a turn as a JSON list; None if the turn has none.

    In the list, arguments are objects: templates write them as JSON, so that a text would be quoted twice
    (https://huggingface.co/docs/transformers/chat_extras). Null keys are absent keys.

    Raises:
        ValueError: the calls are not as OpenAI's API writes them.
    """
    calls, call = turn.get("tool_calls"), turn.get("function_call")
    if isinstance(calls, str) and calls.strip():
        calls = _loads(calls, "tool_calls")
    if not is_absent(call):
        if not is_absent(calls):
            raise ValueError("both tool_calls and function_call")
        calls = [{"function": call if isinstance(call, dict) else _loads(call, "function_call")}]
    if is_absent(calls):
        return None
    if not isinstance(calls, list):
        raise ValueError("tool_calls is not a list")
    return orjson.dumps([_call(entry) for entry in calls]).decode()


def _call(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError("a tool call is not an object")
    function = entry.get("function") if entry.get("function") is not None else entry  # the call without its wrapper
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError("a tool call has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, "the arguments of a tool call") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a tool call are not an object")
    called = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    identifier = entry.get("id")
    return {"id": identifier, **called} if isinstance(identifier, str) else called


def _loads(text: Any, name: str) -> Any:
    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, TypeError):
        raise ValueError(f"{name}: no JSON") from None
