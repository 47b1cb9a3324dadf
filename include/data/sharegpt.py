"""Parse ShareGPT rows: the conversation of each row for training, and its faults for the data checks.

A row is one JSON document. The conversation is in the column `conversations`, `messages` or `conversation`; turns are
`from`/`value` or `role`/`content`; roles have aliases; preference rows have two answers. The parser repairs a row only
if no guess is needed, and names each repair. It counts every other fault, and the suite in
`include/data/expectations.py` decides about the row.
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

from include.data.train_flags import TRAIN_FLAGS, read_train_flag

CONVERSATION_COLUMNS = ("conversations", "messages", "conversation")
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "function_call": "assistant",  # the assistant calls a tool
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
}
PLAIN_ROLES = {"system", "human", "gpt", "user", "assistant"}
TOOL_ROLES = {role for role, name in ROLES.items() if name == "tool"} | {"function_call"}
TURN_KEYS = {"from", "value", "role", "content", *TRAIN_FLAGS}
LONG_TURN = 100_000  # characters; a longer turn is probably not part of a conversation
ALLOWED_NEXT = {  # by role, "" at the start
    "": {"system", "user"}, "system": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"},
    "tool": {"assistant"},
}  # fmt: skip

# counted in each row; `include/data/expectations.py` has one rule for each
FAULTS = (
    "unreadable", "no_turns", "malformed_turns", "unknown_roles", "tool_turns", "tool_lists", "tool_calls",
    "bad_tool_lists", "non_text_values", "empty_values", "no_assistant", "first_speaker", "last_speaker",
    "order_errors", "long_turns", "unknown_keys", "special_token_text", "broken_characters", "control_characters",
    "unpaired_answers", "same_answers", "bad_train_flags", "all_masked", "masked_turns",
)  # fmt: skip

Message = dict[str, str]  # {role: system | user | assistant | tool, content: text}


@dataclass(slots=True)
class Conversation:
    """A conversation.

    Attributes:
        roles, contents: the role (system, user, assistant or tool) and the text of each turn.
        tools: JSON list of the tools that the assistant may call, or None.
        rejected: of a preference row the rejected answer; the last turn is then the chosen one. Otherwise None.
        masked: indices of the assistant turns that the loss does not count, ascending.
    """

    roles: tuple[str, ...] = ()
    contents: list[str] = field(default_factory=list)
    tools: str | None = None
    rejected: str | None = None
    masked: tuple[int, ...] = ()

    @classmethod
    def of(cls, messages: list[Message]) -> Conversation:
        """Make a conversation from role/content messages."""
        return cls(tuple(m["role"] for m in messages), [m["content"] for m in messages])

    @property
    def messages(self) -> list[Message]:
        """Return the turns as role/content messages."""
        return [{"role": role, "content": text} for role, text in zip(self.roles, self.contents, strict=True)]

    @property
    def digest(self) -> bytes:
        """Return the first 16 bytes of the content's sha256."""
        content: Any = self.messages if self.tools is None else [self.messages, self.tools]
        if self.rejected is not None:
            content = [content, self.rejected]
        if self.masked:  # without them the digest is as it was before there were masks, so that rows keep their side
            content = {"content": content, "masked": self.masked}
        return hashlib.sha256(orjson.dumps(content)).digest()[:16]


@dataclass(slots=True)
class ParsedRow:
    """One row after parsing.

    Attributes:
        faults: how often each of `FAULTS` occurs.
        conversation: the conversation; only valid if the row passes the checks.
        repairs: names of the repairs.
        detail: text for people that adds to the faults: why the row is unreadable, the unknown role, the value that
            is not a text; or "".
        columns: the columns of an unreadable row, sorted by name; for hints about the format.
    """

    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    conversation: Conversation = field(default_factory=Conversation)
    repairs: list[str] = field(default_factory=list)
    detail: str = ""
    columns: tuple[str, ...] = ()


class _Unreadable(Exception):
    pass


def parse_row(raw: bytes, alpaca: bool = False, merge_turns: bool = False, pairs: bool = False) -> ParsedRow:
    """Parse one row, see `parse_rows`."""
    (row,), _ = parse_rows([raw], alpaca, merge_turns, pairs)
    return row


def parse_rows(
    raw_rows: list[bytes], alpaca: bool, merge_turns: bool, pairs: bool = False
) -> tuple[list[ParsedRow], dict[str, Any]]:
    """Parse rows. Bad rows raise nothing: they have faults.

    Args:
        raw_rows: one JSON document per row; other bytes give the fault `unreadable`.
        alpaca: read the columns instruction, input and output (or response) as a conversation of one exchange.
        merge_turns: join consecutive turns of one role with an empty line between them.
        pairs: read preference rows: a prompt, a `chosen` and a `rejected` answer (see `_pair`).

    Returns:
        The parsed rows, and their conversations as Arrow columns: `roles` (joined by spaces), `contents` (lists of
        texts), `tools`, `rejected`, `masked` (lists of int32).
    """
    rows = [_parse(raw, alpaca, merge_turns, pairs) for raw in raw_rows]
    columns = _columns([row.conversation for row in rows])
    _count_suspicious_text(columns["contents"], rows)
    if pairs:
        _count_suspicious_text(_as_lists(columns["rejected"]), rows)
    return rows, columns


def _parse(raw: bytes, alpaca: bool, merge_turns: bool, pairs: bool) -> ParsedRow:
    parsed = ParsedRow()
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
            turns, rejected_turns = _pair(row, parsed)
        else:
            turns = _alpaca_turns(row) if alpaca else _turns(row, parsed)
    except _Unreadable as reason:
        parsed.faults["unreadable"] = 1
        parsed.columns = tuple(sorted(map(str, row))) if isinstance(row, dict) else ()
        parsed.detail = str(reason)
        return parsed
    _read_turns(turns, parsed, merge_turns)
    if pairs:
        _read_rejected(rejected_turns, parsed, merge_turns)
    _read_tools(row.get("tools"), parsed)
    return parsed


def _turns(row: dict[str, Any], parsed: ParsedRow) -> list[Any]:
    turns = next((row[name] for name in CONVERSATION_COLUMNS if row.get(name) is not None), None)
    if turns is None:
        raise _Unreadable(f"no conversations column (it has: {', '.join(sorted(map(str, row)))})")
    if isinstance(turns, str):
        try:
            turns = orjson.loads(turns)
            parsed.repairs.append("conversation was a JSON string")
        except orjson.JSONDecodeError:
            raise _Unreadable("the conversation is a text, not a list of turns") from None
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list):
        turns = turns[0]
        parsed.repairs.append("conversation was nested in a list")
    if not isinstance(turns, list):
        raise _Unreadable(f"the conversation is {type(turns).__name__}, not a list of turns")
    return turns


def _alpaca_turns(row: dict[str, Any]) -> list[Any]:
    """Return Stanford Alpaca's columns as turns. An input, if any, follows the instruction after an empty line."""
    answer = row.get("output", row.get("response"))
    if "instruction" not in row or answer is None:
        raise _Unreadable(f"no instruction and output columns (it has: {', '.join(sorted(map(str, row)))})")
    question, extra = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(extra, str) and extra.strip():
        question = f"{question}\n\n{extra}"
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _pair(row: dict[str, Any], parsed: ParsedRow) -> tuple[list[Any], list[Any]]:
    """Return the turns of a preference row with its chosen answer, and with its rejected answer.

    The two answers are texts, turns, or whole conversations that differ in the last turn only. If they are not whole
    conversations, the prompt is in a conversation column, in `prompt` (a text or turns), or in Alpaca's `instruction`
    and `input`.
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
    elif any(row.get(name) is not None for name in CONVERSATION_COLUMNS):
        prompt = _turns(row, parsed)
    elif row.get("prompt") is not None:
        prompt = _as_turns(row["prompt"], "user")
    elif "instruction" in row:
        prompt = _alpaca_turns({**row, "output": ""})[:-1]
    else:
        raise _Unreadable(f"no prompt {columns}")
    if len(chosen) != common + 1 or len(rejected) != common + 1:
        parsed.faults["unpaired_answers"] = 1
    return [*prompt, *chosen[common:]], [*prompt, *rejected[common:]]


def _as_turns(value: Any, role: str) -> list[Any]:
    if isinstance(value, list):
        return value
    return [value if isinstance(value, dict) else {"role": role, "content": value}]


def _read_rejected(turns: list[Any], parsed: ParsedRow, merge_turns: bool) -> None:
    """Add the rejected answer, and the faults and repairs of its conversation, to a row with the chosen answer."""
    other = ParsedRow()
    _read_turns(turns, other, merge_turns)
    chosen, rejected = parsed.conversation, other.conversation
    for name, count in other.faults.items():
        parsed.faults[name] = max(parsed.faults[name], count)
    parsed.repairs += [repair for repair in other.repairs if repair not in parsed.repairs]
    parsed.detail = parsed.detail or other.detail
    if chosen.roles != rejected.roles:
        parsed.faults["unpaired_answers"] = 1
    elif rejected.contents:
        last = len(chosen.contents) - 1
        parsed.faults["all_masked"] = int(last in chosen.masked or last in rejected.masked)
        parsed.faults["masked_turns"], chosen.masked = 0, ()  # only the two last answers are trained on in any case
        chosen.rejected = rejected.contents[-1]
        parsed.faults["same_answers"] = int(chosen.rejected == chosen.contents[-1])


def _read_turns(turns: list[Any], parsed: ParsedRow, merge_turns: bool) -> None:
    """Set the conversation, and count the faults of its turns."""
    faults, repairs = parsed.faults, parsed.repairs
    roles: list[str] = []
    contents: list[str] = []
    masked: list[int] = []
    numbers: list[int] = []  # of the turns in the file, from 1
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            faults["malformed_turns"] += 1
            parsed.detail = parsed.detail or f"turn {number}: not an object but {_kind(turn)}"
            continue
        alias = turn.get("from") or turn.get("role")
        text = turn["value"] if "value" in turn else turn.get("content")
        role = ROLES.get(alias) if isinstance(alias, str) else None
        if role is None or alias not in PLAIN_ROLES:
            if not isinstance(alias, str):
                faults["malformed_turns"] += 1
                parsed.detail = parsed.detail or f"turn {number}: no speaker"
                continue
            role = _resolve_alias(alias, parsed, number)
        mask = False
        if len(turn) > 2:
            mask = _is_masked(turn, role, parsed, number)
            faults["unknown_keys"] += not turn.keys() <= TURN_KEYS
            faults["tool_calls"] += bool(turn.get("tool_calls"))
        if not isinstance(text, str):
            faults["non_text_values"] += 1
            parsed.detail = parsed.detail or f"turn {number}: the value is not a text ({_kind(text)})"
            continue
        if "\x00" in text:
            text = text.replace("\x00", "")
            _add_repair(repairs, "NUL characters removed")
        if not text or text.isspace():
            faults["empty_values"] += 1
            parsed.detail = parsed.detail or f"turn {number}: the text is empty"
        if len(text) > LONG_TURN:
            faults["long_turns"] += 1
        if merge_turns and roles and roles[-1] == role:
            contents[-1] += "\n\n" + text
            _add_repair(repairs, "turns of one role merged")
            if mask != (len(contents) - 1 in masked):
                faults["bad_train_flags"] += 1
                parsed.detail = parsed.detail or f"turn {number}: merged with a turn that has another train flag"
            continue
        if mask:
            masked.append(len(contents))
        numbers.append(number)
        roles.append(role)
        contents.append(text)
    if len(roles) > 1 and roles[-1] == "user" and roles[-2] == "assistant":
        roles.pop()
        contents.pop()
        numbers.pop()
        repairs.append("last user turn without an answer removed")
    faults["no_turns"] = int(not turns)
    faults.update(_order_faults(tuple(roles)))
    if faults["order_errors"] and not parsed.detail:
        order = zip(numbers, pairwise(("", *roles)), strict=True)
        number, (before, role) = next((n, pair) for n, pair in order if pair[1] not in ALLOWED_NEXT.get(pair[0], ()))
        parsed.detail = f"turn {number}: {role} {f'after {before}' if before else 'at the start'}"
    faults["masked_turns"] = len(masked)
    faults["all_masked"] = int(len(masked) == roles.count("assistant") > 0)
    parsed.conversation = Conversation(tuple(roles), contents, masked=tuple(masked))


def _is_masked(turn: dict[str, Any], role: str, parsed: ParsedRow, number: int) -> bool:
    """Return whether the loss must not count an assistant turn; count flags that cannot be followed."""
    try:
        trained = read_train_flag(turn)
        if trained and role != "assistant":
            raise ValueError(f"a turn of the role {role} cannot be trained on")
    except ValueError as reason:
        parsed.faults["bad_train_flags"] += 1
        parsed.detail = parsed.detail or f"turn {number}: {reason}"
        return False
    return trained is False and role == "assistant"


def _kind(value: Any) -> str:
    """Return the JSON type of a value, for people."""
    kinds = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _resolve_alias(alias: str, parsed: ParsedRow, number: int) -> str:
    """Return the role of an alias, "?" if it is unknown; count tool roles and unknown ones, and name the repair."""
    plain = alias.strip().lower()
    role = ROLES.get(plain, "?")
    if plain in TOOL_ROLES:
        parsed.faults["tool_turns"] += 1
    elif role == "?":
        parsed.faults["unknown_roles"] += 1
        parsed.detail = parsed.detail or f"turn {number}: unknown role {alias[:60]!r}"
    if role != "?" and (alias != plain or plain not in PLAIN_ROLES | TOOL_ROLES):
        _add_repair(parsed.repairs, "role alias")
    return role


@lru_cache(maxsize=10_000)
def _order_faults(roles: tuple[str, ...]) -> dict[str, int]:
    """Count the faults of an order of roles."""
    counts = {
        "order_errors": sum(role not in ALLOWED_NEXT.get(before, ()) for before, role in pairwise(("", *roles))),
        "no_assistant": int("assistant" not in roles),
        "first_speaker": int(roles[:1] not in ((), ("system",), ("user",))),
        "last_speaker": int(roles[-1:] not in ((), ("assistant",))),
    }
    return {name: count for name, count in counts.items() if count}


def _count_suspicious_text(contents: Any, rows: list[ParsedRow]) -> None:
    """Count the patterns of `_SUSPICIOUS` in one pass over the texts: an Arrow array with one list of them per row."""
    texts = contents.values
    raw = texts.buffers()[2].to_pybytes() if texts.buffers()[2] else b""
    data, starts = np.frombuffer(raw, np.uint8), np.frombuffer(texts.buffers()[1], np.int64)
    candidates = np.flatnonzero(np.frombuffer(raw.translate(_STARTS_PATTERN), bool))
    first_bytes = data[candidates]
    for fault, pattern in _SUSPICIOUS:
        found = candidates[first_bytes == pattern[0]]
        for i, byte in enumerate(pattern[1:], 1):
            found = found[found < len(data) - i]
            found = found[data[found + i] == byte]
        text_index = np.searchsorted(starts, found, "right") - 1
        row_index = np.searchsorted(contents.offsets.to_numpy(), text_index, "right") - 1
        for row, count in zip(*(array.tolist() for array in np.unique(row_index, return_counts=True)), strict=True):
            rows[row].faults[fault] += count


_SUSPICIOUS = [  # fault and pattern
    ("special_token_text", b"<|"),
    ("special_token_text", b"</s>"),
    ("special_token_text", b"[INST]"),
    ("broken_characters", "\ufffd".encode()),
    *(("control_characters", bytes([b])) for b in (*range(32), 0x7F) if chr(b) not in "\t\n\r"),
]
_STARTS_PATTERN = bytes(any(pattern[0] == byte for _, pattern in _SUSPICIOUS) for byte in range(256))


def _add_repair(repairs: list[str], repair: str) -> None:
    if repair not in repairs:
        repairs.append(repair)


def _read_tools(tools: Any, parsed: ParsedRow) -> None:
    """Read the `tools` column: a list of objects, or its JSON text. An empty list, text or null means no tools."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError:
            tools = {}
    if tools is None or tools in ("", [], "[]") or (isinstance(tools, str) and not tools.strip()):
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        parsed.faults["bad_tool_lists"] = 1
        return
    parsed.faults["tool_lists"] = 1
    parsed.conversation.tools = orjson.dumps(tools).decode()


def _columns(conversations: list[Conversation]) -> dict[str, Any]:
    import pyarrow as pa

    offsets = [0]
    for conversation in conversations:
        offsets.append(offsets[-1] + len(conversation.contents))
    contents = pa.array([text for conversation in conversations for text in conversation.contents], pa.large_string())
    return {
        "roles": pa.array([" ".join(c.roles) for c in conversations], pa.string()),
        "contents": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), contents),
        "tools": pa.array([c.tools for c in conversations], pa.string()),
        "rejected": pa.array([c.rejected for c in conversations], pa.large_string()),
        "masked": pa.array([c.masked for c in conversations], pa.list_(pa.int32())),
    }


def _as_lists(texts: Any) -> Any:
    """Convert an Arrow array of texts and nulls to lists of one text and of none."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(texts.is_valid().to_numpy(zero_copy_only=False))])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), texts.drop_null())


def conversations_in(table: Any) -> Iterator[Conversation]:
    """Yield the conversations of an Arrow table with the columns of `parse_rows`."""
    texts = table["contents"].combine_chunks().flatten().to_pylist()
    split_roles: dict[str, tuple[str, ...]] = {}
    begin = 0
    others = (table[name].to_pylist() for name in ("tools", "rejected", "masked"))
    for joined, tools, rejected, masked in zip(table["roles"].to_pylist(), *others, strict=True):
        roles = split_roles.get(joined)
        if roles is None:
            roles = split_roles[joined] = tuple(joined.split(" ")) if joined else ()
        yield Conversation(roles, texts[begin : begin + len(roles)], tools, rejected, tuple(masked))
        begin += len(roles)
