"""Turns of a conversation: speakers and their aliases, texts and parts of texts, further keys, the order of roles."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any

from include.data.conversation import END_THINK, THINK, Conversation, ParsedRow, is_absent, kind_of, split_thoughts
from include.data.tool_calls import CALL_KEYS, read_calls
from include.data.train_flags import TRAIN_FLAGS, UNREAD_FLAGS, read_train_flag

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "function_call": "assistant",  # the assistant calls a tool
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
}
PLAIN_ROLES = {"system", "human", "gpt", "user", "assistant"}
TOOL_ROLES = {role for role, name in ROLES.items() if name == "tool"} | {"function_call"}
LONG_TURN = 100_000  # characters; a longer turn is probably not part of a conversation
ALLOWED_NEXT = {  # by role, "" at the start
    "": {"system", "user"}, "system": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}  # fmt: skip
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")  # of an answer, in their order
# in the text of an answer, where reasoning must not be left
THOUGHT_MARKUP = re.compile(r"</?think(?:ing)?>|<\|(?:begin|end)_of_thought\|>", re.IGNORECASE)
# the flags and the thoughts have readers of their own
READ_KEYS = {"from", "value", "role", "content", *TRAIN_FLAGS, *UNREAD_FLAGS, *THOUGHT_KEYS}
TEXT_PARTS = {None, "text", "input_text", "output_text"}
EMPTY_SYSTEM = "empty system turn left out"
# names of columns, keys and types of parts that change what should be learned, but are not read, with their fault
UNSUPPORTED = {
    **{
        name: "media"
        for kind in ("image", "video", "audio")
        for name in (kind, f"{kind}s", f"{kind}_url", f"{kind}_urls", f"{kind}_path", f"{kind}_paths", f"input_{kind}")
    },
    **dict.fromkeys((*THOUGHT_KEYS, "thoughts"), "reasoning"),
}
TURN_FAULTS = {**UNSUPPORTED, **dict.fromkeys(("tools", "functions"), "bad_tool_lists")}


def read_turns(turns: list[Any], parsed: ParsedRow, merge_turns: bool, first: int = 1, reasoning: str = "keep") -> None:
    """Set the conversation of a row, and count the faults of its turns.

    Args:
        merge_turns, reasoning: see `parse_rows`.
        first: number of the first turn in messages.
    """
    faults = parsed.faults
    roles: list[str] = []
    contents: list[str] = []
    masked: list[int] = []
    calls: list[tuple[int, str]] = []
    thoughts: list[tuple[int, str]] = []
    numbers: list[int] = []  # of the turns in the file, from 1
    order_known = True
    for number, turn in enumerate(turns, first):
        if not isinstance(turn, dict):
            order_known = False
            parsed.add_fault("malformed_turns", f"turn {number}: not an object but {kind_of(turn)}")
            continue
        alias = turn.get("from") or turn.get("role")
        text = turn.get("value")
        if text is None:
            text = turn.get("content")
        role = ROLES.get(alias) if isinstance(alias, str) else None
        if role is None or alias not in PLAIN_ROLES:
            if not isinstance(alias, str):
                order_known = False
                parsed.add_fault("malformed_turns", f"turn {number}: no speaker")
                continue
            role = _resolve_alias(alias, parsed, number)
            order_known = order_known and role != "?"
        mask, called = False, None
        if len(turn) > 2 or type(text) is not str:
            mask = _is_masked(turn, role, parsed, number)
            called = _read_keys(turn, role, parsed, number)
            if text is None and called is not None:
                text = "" if called else None
            else:
                text = text_of(text, f"turn {number}", parsed)
            if text is None:  # the row is refused, but the turn keeps its place in the order
                roles.append(role)
                contents.append("")
                numbers.append(number)
                continue
        thought = ""
        if len(turn) > 2 or (role == "assistant" and (reasoning != "keep" or THINK in text or END_THINK in text)):
            thought, text = _read_thoughts(turn, role, text, parsed, number, reasoning)
        if "\x00" in text:
            text = text.replace("\x00", "")
            parsed.add_repair("NUL characters removed")
        if not text or text.isspace():
            if role == "system":
                parsed.add_repair(EMPTY_SYSTEM)
                continue
            if called is not None:  # a text is not needed beside calls, and the row is refused where they are bad
                text = ""
            else:
                parsed.add_fault("empty_values", f"turn {number}: the text is empty")
        if len(text) > LONG_TURN:
            faults["long_turns"] += 1
        apart = called or thought or _ends_in(calls, contents)
        if merge_turns and roles and roles[-1] == role != "tool" and not apart:
            contents[-1] += "\n\n" + text
            parsed.add_repair("turns of one role merged")
            if mask != (len(contents) - 1 in masked):
                parsed.add_fault("bad_train_flags", f"turn {number}: merged with a turn that has another train flag")
            continue
        if mask:
            masked.append(len(contents))
        if called:
            calls.append((len(contents), called))
        if thought:
            thoughts.append((len(contents), thought))
        numbers.append(number)
        roles.append(role)
        contents.append(text)
    if len(roles) > 1 and roles[-1] == "user" and roles[-2] == "assistant":
        roles.pop()
        contents.pop()
        numbers.pop()
        parsed.repairs.append("last user turn without an answer removed")
    faults["no_turns"] = int(not turns)
    if order_known:
        faults.update(_order_faults(tuple(roles)))
        if faults["order_errors"] and not parsed.detail:
            parsed.detail = _first_disorder(roles, numbers)
    faults["masked_turns"], faults["reasoning_turns"] = len(masked), len(thoughts)
    faults["all_masked"] = int(len(masked) == roles.count("assistant") > 0)
    parsed.conversation = Conversation(
        tuple(roles), contents, masked=tuple(masked), calls=tuple(calls), thoughts=tuple(thoughts)
    )


def content_of(turn: dict[str, Any]) -> Any:
    """Return a turn's value or content; a null is as good as no key."""
    return turn["value"] if turn.get("value") is not None else turn.get("content")


def role_of(turn: Any) -> str:
    """Return the role of a turn, "?" if it has none."""
    alias = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
    return ROLES.get(alias.strip().lower(), "?") if isinstance(alias, str) else "?"


def text_of(value: Any, place: str, parsed: ParsedRow) -> str | None:
    """Return a content as text, the texts of its parts joined; None, and a fault, if it is not a text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        parsed.add_fault("non_text_values", f"{place}: the value is not a text ({kind_of(value)})")
        return None
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict):
            parsed.add_fault("non_text_values", f"{place}: the value is a list with {kind_of(part)} in it")
            return None
        kind, text = part.get("type"), part.get("text")
        others = [key for key, given in part.items() if key not in ("type", "text") and given is not None]
        strange = next((key for key in (kind, *others) if isinstance(key, str) and key in UNSUPPORTED), None)
        if strange:
            parsed.add_fault(UNSUPPORTED[strange], f"{place}: a part of the type {strange}")
            return None
        if not (kind is None or isinstance(kind, str)) or kind not in TEXT_PARTS or not isinstance(text, str):
            parsed.add_fault("non_text_values", f"{place}: a part that is not a text (type {str(kind)[:60]})")
            return None
        parsed.unused += [f"part key {key[:60]}" for key in others]
        texts.append(text)
    return "".join(texts)


def _read_keys(turn: dict[str, Any], role: str, parsed: ParsedRow, number: int) -> str | None:
    """Read a turn's keys besides speaker and text.

    Returns:
        The turn's tool calls as a JSON list; None if it has none, "" if the keys refuse the row.
    """
    place, refused = f"turn {number}", False
    for key, value in turn.items():
        if key in READ_KEYS or value is None or key in CALL_KEYS:
            continue
        fault = TURN_FAULTS.get(key)
        if fault is None or isinstance(value, bool):
            parsed.faults["unknown_keys"] += 1
            parsed.unused.append(f"turn key {key[:60]}")
        elif not is_absent(value):
            parsed.add_fault(fault, f"{place}: the key {key}")
            refused = True
    speakers = [alias for alias in (turn.get("from"), turn.get("role")) if alias not in (None, "")]
    if len(speakers) == 2 and role_of({"from": speakers[0]}) != role_of({"from": speakers[1]}):
        parsed.add_fault("malformed_turns", f"{place}: from and role differ")
    if turn.get("value") is not None and turn.get("content") is not None and turn["value"] != turn["content"]:
        parsed.add_fault("malformed_turns", f"{place}: value and content differ")
    try:
        called = read_calls(turn)
        if called and role != "assistant":
            raise ValueError(f"a turn of the role {role} cannot call tools")
    except ValueError as reason:
        key = next(key for key in CALL_KEYS if not is_absent(turn.get(key)))
        parsed.add_fault("bad_tool_calls", f"{place}: {key}: {reason}")
        return ""
    parsed.faults["tool_calls"] += called is not None
    return "" if refused else called


def _read_thoughts(
    turn: dict[str, Any], role: str, text: str, parsed: ParsedRow, number: int, reasoning: str
) -> tuple[str, str]:
    """Return the thoughts of a turn, "" if it has none or the recipe drops them, and its text without them."""
    found, keys = (
        split_thoughts(text) if role == "assistant" else None,
        [k for k in THOUGHT_KEYS if not is_absent(turn.get(k))],
    )
    texts = {turn[key].strip() for key in keys if isinstance(turn[key], str)} | ({found[0]} if found else set()) - {""}
    place = f"turn {number}: {f'the key {keys[0]}' if keys else 'reasoning in the text'}"
    if any(not isinstance(turn[key], str) for key in keys):
        parsed.add_fault("reasoning", f"{place} is not a text")
    elif keys and role != "assistant":
        parsed.add_fault("reasoning", f"{place} of a turn of the role {role}")
    elif len(texts) > 1:
        parsed.add_fault("reasoning", f"{place} and another one have different reasoning")
    elif role == "assistant" and not found and text.lstrip().startswith(THINK):
        parsed.add_fault("reasoning", f"turn {number}: the reasoning in the text does not end ({END_THINK})")
    elif texts and reasoning == "refuse":
        parsed.add_fault("reasoning", place)
    elif texts:
        if found:
            parsed.add_repair("reasoning in the text is read as reasoning")
        if reasoning == "drop":
            parsed.add_repair("reasoning dropped")
        return "" if reasoning == "drop" else texts.pop(), found[1] if found else text
    elif found:
        parsed.add_repair("empty reasoning removed")
        return "", found[1]
    elif role == "assistant" and reasoning != "keep" and (stray := THOUGHT_MARKUP.search(text)):
        parsed.add_fault("reasoning", f"turn {number}: {stray[0]} in the text, which may be reasoning")
    return "", text


def _ends_in(calls: list[tuple[int, str]], contents: list[str]) -> bool:
    """Return whether the last turn calls tools."""
    return bool(calls) and calls[-1][0] == len(contents) - 1


def _is_masked(turn: dict[str, Any], role: str, parsed: ParsedRow, number: int) -> bool:
    """Return whether the loss must not count an assistant turn; count flags that cannot be followed."""
    try:
        trained = read_train_flag(turn)
        if trained and role != "assistant":
            raise ValueError(f"a turn of the role {role} cannot be trained on")
    except ValueError as reason:
        parsed.add_fault("bad_train_flags", f"turn {number}: {reason}")
        return False
    return trained is False and role == "assistant"


def _resolve_alias(alias: str, parsed: ParsedRow, number: int) -> str:
    """Return the role of an alias, "?" if it is unknown; count tool roles and unknown ones, and name the repair."""
    plain = alias.strip().lower()
    role = ROLES.get(plain, "?")
    if plain in TOOL_ROLES:
        parsed.faults["tool_turns"] += 1
    elif role == "?":
        parsed.add_fault("unknown_roles", f"turn {number}: unknown role {alias[:60]!r}")
    if role != "?" and (alias != plain or plain not in PLAIN_ROLES | TOOL_ROLES):
        parsed.add_repair("role alias")
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


def _first_disorder(roles: list[str], numbers: list[int]) -> str:
    """Return the first turn that stands in the wrong place, for people."""
    turn = next(i for i, (one, role) in enumerate(pairwise(("", *roles))) if role not in ALLOWED_NEXT.get(one, ()))
    return f"turn {numbers[turn]}: {roles[turn]} " + (f"after {roles[turn - 1]}" if turn else "at the start")
