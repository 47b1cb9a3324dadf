"""Reading a ShareGPT row: what it looks like (for the checks) and the messages in it (for training).

A row is one JSON document. Conversations stand under `conversations`, `messages` or `conversation`, turns are
`from`/`value` or `role`/`content`, roles have aliases. What can be read without guessing is repaired and counted;
everything else stays visible in the features, and the suite in `include/expectations.py` decides.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import orjson

COLUMNS = ("conversations", "messages", "conversation")
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "ipython"}

Message = dict[str, str]  # {role: system | user | assistant, content: text}


@dataclass
class Reading:
    """One row as it was read.

    Attributes:
        features: flat facts for the checks; a fact that cannot be known (of a row that is no JSON, say) is None.
        messages: the conversation; meaningful only for a row that passes the checks.
        repairs: what was put right, by name.
    """

    features: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)


def read(raw: bytes, alpaca: bool = False) -> Reading:
    """Read one row. Never raises: what is wrong with the row shows in the features.

    Args:
        raw: one JSON document, or what should be one.
        alpaca: read instruction, input and output (or response) as a conversation of one exchange.
    """
    reading = Reading(
        dict.fromkeys(
            ("problem", "columns", "turns", "malformed_turns", "unknown_roles", "tool_roles", "non_text_values",
             "empty_values", "order_errors", "assistant_turns", "broken_characters", "special_token_text",
             "characters", "digest")
        )
    )  # fmt: skip
    turns = _conversation(raw, reading, alpaca)
    if turns is not None:
        _turns(turns, reading)
    return reading


def _conversation(raw: bytes, reading: Reading, alpaca: bool) -> list[Any] | None:
    """The list of turns, or None with the problem noted."""
    features = reading.features
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        features["problem"] = f"not JSON: {error}"
        return None
    if isinstance(row, list):  # a bare list of turns
        row = {"conversations": row}
    if not isinstance(row, dict):
        features["problem"] = f"not an object but {type(row).__name__}"
        return None
    features["columns"] = ", ".join(sorted(map(str, row)))
    if alpaca:
        return _alpaca_turns(row, reading)
    turns = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
    if turns is None:
        features["problem"] = f"no conversations column (it has: {features['columns']})"
        return None
    if isinstance(turns, str):
        try:
            turns = orjson.loads(turns)
            reading.repairs.append("conversation was a JSON string")
        except orjson.JSONDecodeError:
            features["problem"] = "the conversation is a text, not a list of turns"
            return None
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list):
        turns = turns[0]
        reading.repairs.append("conversation was nested in a list")
    if not isinstance(turns, list):
        features["problem"] = f"the conversation is {type(turns).__name__}, not a list of turns"
        return None
    return turns


def _alpaca_turns(row: dict[str, Any], reading: Reading) -> list[Any] | None:
    """Stanford Alpaca's columns as turns: the input, where there is one, stands below the instruction."""
    answer = row.get("output", row.get("response"))
    if "instruction" not in row or answer is None:
        reading.features["problem"] = f"no instruction and output columns (it has: {reading.features['columns']})"
        return None
    question, extra = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(extra, str) and extra.strip():
        question = f"{question}\n\n{extra}"
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _turns(turns: list[Any], reading: Reading) -> None:
    """Fill in the messages and the features that count over turns."""
    features, messages, repairs = reading.features, reading.messages, set(reading.repairs)
    malformed = unknown = tools = non_text = empty = 0
    for turn in turns:
        if not isinstance(turn, dict):
            malformed += 1
            continue
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if not isinstance(role, str):
            malformed += 1
            continue
        name = role.strip().lower()
        if name in TOOL_ROLES:
            tools += 1
        elif name not in ROLES:
            unknown += 1
        elif role not in ("system", "human", "gpt", "user", "assistant"):
            repairs.add("role alias")
        if not isinstance(text, str):
            non_text += 1
            continue
        if "\x00" in text:
            text = text.replace("\x00", "")
            repairs.add("NUL characters removed")
        if not text.strip():
            empty += 1
        messages.append({"role": ROLES.get(name, name), "content": text})
    if len(messages) > 1 and messages[-1]["role"] == "user" and messages[-2]["role"] == "assistant":
        messages.pop()
        repairs.add("last user turn without an answer removed")
    reading.repairs = sorted(repairs)
    text = "".join(m["content"] for m in messages)
    features.update(
        turns=len(turns),
        malformed_turns=malformed,
        unknown_roles=unknown,
        tool_roles=tools,
        non_text_values=non_text,
        empty_values=empty,
        order_errors=_order_errors([m["role"] for m in messages]),
        assistant_turns=sum(m["role"] == "assistant" for m in messages),
        broken_characters=text.count("\ufffd"),
        special_token_text="<|" in text or "</s>" in text or "[INST]" in text,
        characters=len(text),
        digest=hashlib.sha256(orjson.dumps(messages)).hexdigest()[:32],
    )


def _order_errors(roles: list[str]) -> int:
    """Turns that do not stand where they belong: [system] user assistant user assistant ..."""
    body = roles[1:] if roles[:1] == ["system"] else roles
    expected = ("user", "assistant")
    return sum(role != expected[i % 2] for i, role in enumerate(body)) + (len(body) % 2 if body else 0)
