"""A conversation, and a row after parsing: the conversation, its faults for the data checks, its repairs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

# counted in each row; `include/data/expectations.py` has one rule for each
FAULTS = (
    "unreadable", "no_turns", "malformed_turns", "unknown_roles", "tool_turns", "tool_lists", "tool_calls",
    "bad_tool_calls", "bad_tool_lists", "media", "labels", "row_weights", "reasoning", "system_conflicts",
    "bad_history", "non_text_values", "empty_values", "no_assistant", "first_speaker", "last_speaker",
    "order_errors", "long_turns", "unknown_keys", "unused_columns", "special_token_text", "broken_characters",
    "control_characters", "unpaired_answers", "same_answers", "bad_train_flags", "all_masked", "masked_turns",
    "reasoning_turns",
)  # fmt: skip

THINK, END_THINK = "<think>", "</think>"  # how DeepSeek R1, Qwen3 and the templates after them write thoughts

Message = dict[str, Any]  # {role: system | user | assistant | tool, content: text}, and tool_calls where there are some


@dataclass(slots=True)
class Conversation:
    """A conversation.

    Attributes:
        roles, contents: the role (system, user, assistant or tool) and the text of each turn.
        tools: JSON list of the tools that the assistant may call, or None.
        rejected: of a preference row the rejected answer; the last turn is then the chosen one. Otherwise None.
        masked: indices of the assistant turns that the loss does not count, ascending.
        calls: for each assistant turn that calls tools its index, and its `tool_calls` as a JSON list, in the form
            that chat templates take (https://huggingface.co/docs/transformers/chat_extras); ascending. The text of
            such a turn may be empty.
        thoughts: for each assistant turn with thoughts (also called reasoning) its index and their text; ascending.
    """

    roles: tuple[str, ...] = ()
    contents: list[str] = field(default_factory=list)
    tools: str | None = None
    rejected: str | None = None
    masked: tuple[int, ...] = ()
    calls: tuple[tuple[int, str], ...] = ()
    thoughts: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(cls, messages: list[Message]) -> Conversation:
        """Make a conversation from role/content messages."""
        calls = [(i, orjson.dumps(m["tool_calls"]).decode()) for i, m in enumerate(messages) if m.get("tool_calls")]
        thoughts = {i: m["reasoning_content"] for i, m in enumerate(messages) if m.get("reasoning_content")}
        contents = [m["content"] or "" for m in messages]
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and (found := split_thoughts(contents[i])):
                thoughts[i], contents[i] = found
        thought = tuple(sorted((i, text) for i, text in thoughts.items() if text))
        return cls(tuple(m["role"] for m in messages), contents, calls=tuple(calls), thoughts=thought)

    @property
    def messages(self) -> list[Message]:
        """Return the turns as role/content messages."""
        found: list[Message] = [
            {"role": role, "content": text} for role, text in zip(self.roles, self.contents, strict=True)
        ]
        for turn, calls in self.calls:
            found[turn]["tool_calls"] = orjson.loads(calls)
        for turn, thoughts in self.thoughts:
            found[turn]["reasoning_content"] = thoughts
        return found

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
        unused: what is not used, once for each time that it occurs: `column x`, `turn key x`, `part key x`.
    """

    faults: dict[str, int] = field(default_factory=dict.fromkeys(FAULTS, 0).copy)
    conversation: Conversation = field(default_factory=Conversation)
    repairs: list[str] = field(default_factory=list)
    detail: str = ""
    columns: tuple[str, ...] = ()
    unused: list[str] = field(default_factory=list)

    def add_fault(self, name: str, detail: str) -> None:
        """Count a fault; keep its detail if it is the row's first one."""
        self.faults[name] += 1
        self.detail = self.detail or detail

    def add_repair(self, repair: str) -> None:
        """Name a repair, once."""
        if repair not in self.repairs:
            self.repairs.append(repair)


class Unreadable(Exception):
    """A row cannot be read as a conversation; the text says why."""


def split_thoughts(content: str) -> tuple[str, str] | None:
    """Return the thoughts and the answer of a text that begins with `<think>...</think>`, or None; "" for thoughts that
    are empty, as in the answers of models that may think or not.

    The begin may be missing, as in answers of models whose prompt opens it; then a line ends behind `</think>`.
    """
    found = re.match(rf"\s*{THINK}(.*?){END_THINK}(.*)", content, re.DOTALL)
    if not found:
        found = re.match(rf"((?:(?!{THINK}).)*?){END_THINK}[ \t]*(\n.*|$)", content, re.DOTALL)
    return (found[1].strip(), found[2].strip("\n")) if found else None


def kind_of(value: Any) -> str:
    """Return the JSON type of a value, for people."""
    kinds = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def is_absent(value: Any) -> bool:
    """Return whether a value is as good as none: null, or an empty text, list or object."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and value.isspace())


def to_columns(conversations: list[Conversation]) -> dict[str, Any]:
    """Return conversations as Arrow columns; `conversations_in` reads them."""
    import pyarrow as pa

    offsets = [0]
    for conversation in conversations:
        offsets.append(offsets[-1] + len(conversation.contents))
    contents = pa.array([text for conversation in conversations for text in conversation.contents], pa.large_string())
    calls = [orjson.dumps(c.calls).decode() if c.calls else None for c in conversations]
    text = pa.large_string()
    return {
        "roles": pa.array([" ".join(c.roles) for c in conversations], pa.string()),
        "contents": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), contents),
        "tools": pa.array([c.tools for c in conversations], pa.string()),
        "rejected": pa.array([c.rejected for c in conversations], pa.large_string()),
        "masked": pa.array([c.masked for c in conversations], pa.list_(pa.int32())),
        "calls": pa.array(calls, pa.large_string()),
        "thoughts": pa.array([orjson.dumps(c.thoughts).decode() if c.thoughts else None for c in conversations], text),
    }


def conversations_in(table: Any) -> Iterator[Conversation]:
    """Yield the conversations of an Arrow table with the columns of `to_columns`."""
    texts = table["contents"].combine_chunks().flatten().to_pylist()
    split_roles: dict[str, tuple[str, ...]] = {}
    begin = 0
    others = (table[name].to_pylist() for name in ("tools", "rejected", "masked", "calls", "thoughts"))
    for joined, tools, rejected, masked, calls, thoughts in zip(table["roles"].to_pylist(), *others, strict=True):
        roles = split_roles.get(joined)
        if roles is None:
            roles = split_roles[joined] = tuple(joined.split(" ")) if joined else ()
        pairs = [tuple((turn, text) for turn, text in orjson.loads(of)) if of else () for of in (calls, thoughts)]
        yield Conversation(roles, texts[begin : begin + len(roles)], tools, rejected, tuple(masked), *pairs)
        begin += len(roles)
