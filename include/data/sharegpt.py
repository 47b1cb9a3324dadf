"""Reading a ShareGPT row: what it looks like (for the checks) and the conversation in it (for training).

A row is one JSON document. Conversations stand under `conversations`, `messages` or `conversation`, turns are
`from`/`value` or `role`/`content`, roles have aliases; preference rows have two answers. What can be read without
guessing is repaired and counted; everything else stays visible in the features, and the suite in
`include/data/expectations.py` decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import orjson

COLUMNS = ("conversations", "messages", "conversation")
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "function_call": "assistant",  # what the assistant writes to call a tool
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
}
PLAIN_ROLES = {"system", "human", "gpt", "user", "assistant"}
TOOL_ROLES = {role for role, name in ROLES.items() if name == "tool"} | {"function_call"}
TURN_KEYS = {"from", "value", "role", "content"}
LONG_TURN = 100_000  # characters; more is rather a dump than something a person said
MAY_FOLLOW = {
    "": {"system", "user"}, "system": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"},
    "tool": {"assistant"},
}  # fmt: skip

# what is counted in a row; 0 is good, and the rules in `include/data/expectations.py` say what more means
FEATURES = (
    "unreadable", "no_turns", "malformed_turns", "unknown_roles", "tool_turns", "tool_lists", "tool_calls",
    "bad_tool_lists", "non_text_values", "empty_values", "no_assistant", "first_speaker", "last_speaker",
    "order_errors", "long_turns", "unknown_keys", "special_token_text", "broken_characters", "control_characters",
    "unpaired_answers", "same_answers",
)  # fmt: skip

Message = dict[str, str]  # {role: system | user | assistant | tool, content: text}


@dataclass(slots=True)
class Conversation:
    """Who says what, in turn; `tools` is a JSON list of what the assistant may call, or None.

    Of a preference row the last turn is the chosen answer, and `rejected` is what was liked less.
    """

    roles: tuple[str, ...] = ()
    contents: list[str] = field(default_factory=list)
    tools: str | None = None
    rejected: str | None = None

    @classmethod
    def of(cls, messages: list[Message]) -> Conversation:
        """A conversation of role/content messages."""
        return cls(tuple(m["role"] for m in messages), [m["content"] for m in messages])

    @property
    def messages(self) -> list[Message]:
        """The turns as role/content messages."""
        return [{"role": role, "content": said} for role, said in zip(self.roles, self.contents, strict=True)]

    @property
    def digest(self) -> bytes:
        """The first 16 bytes of the content's sha256."""
        content: Any = self.messages if self.tools is None else [self.messages, self.tools]
        if self.rejected is not None:
            content = [content, self.rejected]
        return hashlib.sha256(orjson.dumps(content)).digest()[:16]


@dataclass(slots=True)
class Reading:
    """One row as it was read.

    Attributes:
        features: how often each of `FEATURES` was seen.
        conversation: meaningful only for a row that passes the checks.
        repairs: what was put right, by name.
        problem: what exactly is wrong, as far as the features do not say it: why the row cannot be read at all, the
            type of what should be a text; or "".
        columns: the columns of a row that cannot be read, in order of their names; for hints.
    """

    features: dict[str, int]
    conversation: Conversation
    repairs: list[str]
    problem: str = ""
    columns: tuple[str, ...] = ()


class _Unreadable(Exception):
    pass


def read(raw: bytes, alpaca: bool = False, merge: bool = False, pairs: bool = False) -> Reading:
    """Read one row, see `read_all`."""
    (reading,), _ = read_all([raw], alpaca, merge, pairs)
    return reading


def read_all(rows: list[bytes], alpaca: bool, merge: bool, pairs: bool = False) -> tuple[list[Reading], dict[str, Any]]:
    """Read rows. Never raises: what is wrong with a row shows in its features.

    Args:
        rows: JSON documents, or what should be some.
        alpaca: read instruction, input and output (or response) as a conversation of one exchange.
        merge: join turns of one role that follow each other, with an empty line between them.
        pairs: read preference rows: a prompt, a `chosen` and a `rejected` answer (see `_pair`).

    Returns:
        The readings, and their conversations as Arrow columns: `roles` (joined by spaces), `contents` (list of texts),
        `tools`, `rejected`.
    """
    readings = [_read(raw, alpaca, merge, pairs) for raw in rows]
    columns = _columns([reading.conversation for reading in readings])
    _find_signs(columns["contents"], readings)
    if pairs:
        _find_signs(_listed(columns["rejected"]), readings)
    return readings, columns


def _read(raw: bytes, alpaca: bool, merge: bool, pairs: bool) -> Reading:
    reading = Reading(dict.fromkeys(FEATURES, 0), Conversation(), [])
    row = None
    try:
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise _Unreadable(f"not JSON: {error}") from None
        if isinstance(row, list):  # a bare list of turns
            row = {"conversations": row}
        if not isinstance(row, dict):
            raise _Unreadable(f"not an object but {type(row).__name__}")
        if pairs:
            turns, other_turns = _pair(row, reading)
        else:
            turns = _alpaca_turns(row) if alpaca else _turns(row, reading)
    except _Unreadable as problem:
        reading.features["unreadable"] = 1
        reading.columns = tuple(sorted(map(str, row))) if isinstance(row, dict) else ()
        reading.problem = str(problem)
        return reading
    _read_turns(turns, reading, merge)
    if pairs:
        _read_rejected(other_turns, reading, merge)
    _read_tools(row.get("tools"), reading)
    return reading


def _turns(row: dict[str, Any], reading: Reading) -> list[Any]:
    turns = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
    if turns is None:
        raise _Unreadable(f"no conversations column (it has: {', '.join(sorted(map(str, row)))})")
    if isinstance(turns, str):
        try:
            turns = orjson.loads(turns)
            reading.repairs.append("conversation was a JSON string")
        except orjson.JSONDecodeError:
            raise _Unreadable("the conversation is a text, not a list of turns") from None
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list):
        turns = turns[0]
        reading.repairs.append("conversation was nested in a list")
    if not isinstance(turns, list):
        raise _Unreadable(f"the conversation is {type(turns).__name__}, not a list of turns")
    return turns


def _alpaca_turns(row: dict[str, Any]) -> list[Any]:
    """Stanford Alpaca's columns as turns: the input, where there is one, stands below the instruction."""
    answer = row.get("output", row.get("response"))
    if "instruction" not in row or answer is None:
        raise _Unreadable(f"no instruction and output columns (it has: {', '.join(sorted(map(str, row)))})")
    question, extra = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(extra, str) and extra.strip():
        question = f"{question}\n\n{extra}"
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _pair(row: dict[str, Any], reading: Reading) -> tuple[list[Any], list[Any]]:
    """The turns of a preference row with its chosen answer, and with its rejected one.

    The two are texts, turns, or whole conversations that differ in their last turn; otherwise the prompt stands in a
    column of turns, in `prompt` (a text or turns), or in Alpaca's `instruction` and `input`.
    """
    columns = f"(it has: {', '.join(sorted(map(str, row)))})"
    if row.get("chosen") is None or row.get("rejected") is None:
        raise _Unreadable(f"no chosen and rejected answers {columns}")
    chosen, rejected = (_as_turns(row[name], "assistant") for name in ("chosen", "rejected"))
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if common:
        prompt = chosen[:common]
    elif any(row.get(name) is not None for name in COLUMNS):
        prompt = _turns(row, reading)
    elif row.get("prompt") is not None:
        prompt = _as_turns(row["prompt"], "user")
    elif "instruction" in row:
        prompt = _alpaca_turns({**row, "output": ""})[:-1]
    else:
        raise _Unreadable(f"no prompt {columns}")
    if len(chosen) != common + 1 or len(rejected) != common + 1:
        reading.features["unpaired_answers"] = 1
    return [*prompt, *chosen[common:]], [*prompt, *rejected[common:]]


def _as_turns(said: Any, role: str) -> list[Any]:
    return said if isinstance(said, list) else [said if isinstance(said, dict) else {"role": role, "content": said}]


def _read_rejected(turns: list[Any], reading: Reading, merge: bool) -> None:
    """Add what there is in the conversation with the rejected answer to the reading of the other one."""
    other = Reading(dict.fromkeys(FEATURES, 0), Conversation(), [])
    _read_turns(turns, other, merge)
    chosen, rejected = reading.conversation, other.conversation
    for name, count in other.features.items():
        reading.features[name] = max(reading.features[name], count)
    reading.repairs += [repair for repair in other.repairs if repair not in reading.repairs]
    reading.problem = reading.problem or other.problem
    if chosen.roles != rejected.roles:
        reading.features["unpaired_answers"] = 1
    elif rejected.contents:
        chosen.rejected = rejected.contents[-1]
        reading.features["same_answers"] = int(chosen.rejected == chosen.contents[-1])


def _read_turns(turns: list[Any], reading: Reading, merge: bool) -> None:
    """Fill in the conversation and the features that count over turns."""
    features, repairs = reading.features, reading.repairs
    roles: list[str] = []
    contents: list[str] = []
    for turn in turns:
        if not isinstance(turn, dict):
            features["malformed_turns"] += 1
            continue
        role = turn.get("from") or turn.get("role")
        said = turn["value"] if "value" in turn else turn.get("content")
        name = ROLES.get(role) if isinstance(role, str) else None
        if name is None or role not in PLAIN_ROLES:
            if not isinstance(role, str):
                features["malformed_turns"] += 1
                continue
            name = _unusual_role(role, reading)
        if len(turn) > 2:
            features["unknown_keys"] += not turn.keys() <= TURN_KEYS
            features["tool_calls"] += bool(turn.get("tool_calls"))
        if not isinstance(said, str):
            features["non_text_values"] += 1
            reading.problem = reading.problem or f"turn {len(contents)} says {orjson.dumps(said).decode()[:60]}"
            continue
        if "\x00" in said:
            said = said.replace("\x00", "")
            _repaired(repairs, "NUL characters removed")
        if not said or said.isspace():
            features["empty_values"] += 1
        if len(said) > LONG_TURN:
            features["long_turns"] += 1
        if merge and roles and roles[-1] == name:
            contents[-1] += "\n\n" + said
            _repaired(repairs, "turns of one role merged")
            continue
        roles.append(name)
        contents.append(said)
    if len(roles) > 1 and roles[-1] == "user" and roles[-2] == "assistant":
        roles.pop()
        contents.pop()
        repairs.append("last user turn without an answer removed")
    order = tuple(roles)
    if not turns:
        features["no_turns"] = 1
    if wrong := _wrong_order(order):
        features.update(wrong)
    reading.conversation = Conversation(order, contents)


def _unusual_role(role: str, reading: Reading) -> str:
    written, role = role, role.strip().lower()
    name = ROLES.get(role, "?")
    if role in TOOL_ROLES:
        reading.features["tool_turns"] += 1
    elif name == "?":
        reading.features["unknown_roles"] += 1
        reading.problem = reading.problem or f"a role is {written[:60]!r}"
    if name != "?" and (written != role or role not in PLAIN_ROLES | TOOL_ROLES):
        _repaired(reading.repairs, "role alias")
    return name


@lru_cache(maxsize=10_000)
def _wrong_order(roles: tuple[str, ...]) -> dict[str, int]:
    """What is wrong with an order of roles, as features."""
    found = {
        "order_errors": sum(role not in MAY_FOLLOW.get(before, ()) for before, role in pairwise(("", *roles))),
        "no_assistant": int("assistant" not in roles),
        "first_speaker": int(roles[:1] not in ((), ("system",), ("user",))),
        "last_speaker": int(roles[-1:] not in ((), ("assistant",))),
    }
    return {name: count for name, count in found.items() if count}


def _find_signs(contents: Any, readings: list[Reading]) -> None:
    """Count the signs of trouble in texts by a pass over the bytes of all of them."""
    texts = contents.values
    raw = texts.buffers()[2].to_pybytes() if texts.buffers()[2] else b""
    data, starts = np.frombuffer(raw, np.uint8), np.frombuffer(texts.buffers()[1], np.int64)
    places = np.flatnonzero(np.frombuffer(raw.translate(_BEGINS_A_SIGN), bool))
    begins = data[places]
    for feature, sign in _SIGNS:
        found = places[begins == sign[0]]
        for i, byte in enumerate(sign[1:], 1):
            found = found[found < len(data) - i]
            found = found[data[found + i] == byte]
        text = np.searchsorted(starts, found, "right") - 1
        rows, counts = np.unique(np.searchsorted(contents.offsets.to_numpy(), text, "right") - 1, return_counts=True)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            readings[row].features[feature] += count


_SIGNS = [
    ("special_token_text", b"<|"),
    ("special_token_text", b"</s>"),
    ("special_token_text", b"[INST]"),
    ("broken_characters", "\ufffd".encode()),
    *(("control_characters", bytes([b])) for b in (*range(32), 0x7F) if chr(b) not in "\t\n\r"),
]
_BEGINS_A_SIGN = bytes(any(sign[0] == byte for _, sign in _SIGNS) for byte in range(256))


def _repaired(repairs: list[str], how: str) -> None:
    if how not in repairs:
        repairs.append(how)


def _read_tools(tools: Any, reading: Reading) -> None:
    """The row's `tools` column: a list of objects, or the JSON text of one; an empty one counts as none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError:
            tools = {}
    if tools is None or tools in ("", [], "[]") or (isinstance(tools, str) and not tools.strip()):
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        reading.features["bad_tool_lists"] = 1
        return
    reading.features["tool_lists"] = 1
    reading.conversation.tools = orjson.dumps(tools).decode()


def _columns(conversations: list[Conversation]) -> dict[str, Any]:
    import pyarrow as pa

    offsets = [0]
    for conversation in conversations:
        offsets.append(offsets[-1] + len(conversation.contents))
    contents = pa.array([said for conversation in conversations for said in conversation.contents], pa.large_string())
    return {
        "roles": pa.array([" ".join(c.roles) for c in conversations], pa.string()),
        "contents": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), contents),
        "tools": pa.array([c.tools for c in conversations], pa.string()),
        "rejected": pa.array([c.rejected for c in conversations], pa.large_string()),
    }


def _listed(texts: Any) -> Any:
    """An Arrow array of texts and nulls as lists of one and no text."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(texts.is_valid().to_numpy(zero_copy_only=False))])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), texts.drop_null())


def conversations_in(table: Any) -> Iterator[Conversation]:
    """The conversations of an Arrow table with the columns of `read_all`."""
    texts = table["contents"].combine_chunks().flatten().to_pylist()
    known: dict[str, tuple[str, ...]] = {}
    at = 0
    others = (table[name].to_pylist() for name in ("tools", "rejected"))
    for joined, tools, rejected in zip(table["roles"].to_pylist(), *others, strict=True):
        roles = known.get(joined)
        if roles is None:
            roles = known[joined] = tuple(joined.split(" ")) if joined else ()
        yield Conversation(roles, texts[at : at + len(roles)], tools, rejected)
        at += len(roles)
