"""Parse ShareGPT rows: the conversation of each row for training, and its faults for the data checks.

A row is one JSON document. The conversation is in the column `conversations`, `messages` or `conversation`; turns are
`from`/`value` or `role`/`content`; roles have aliases; preference rows have two answers. The parser repairs a row only
if no guess is needed, and names each repair. It counts every other fault, and the suite in
`include/data/expectations.py` decides about the row. What is not used is named, too. A null is as good as no key.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import orjson

from include.data.alpaca import alpaca_turns
from include.data.columns import MEDIA, SYSTEM_COLUMNS, read_columns, system_of, turns_of
from include.data.content_parts import REASONING, join_parts
from include.data.conversation import Conversation, ParsedRow, Unreadable, is_absent, kind_of, to_columns
from include.data.preferences import add_rejected, pair_turns
from include.data.suspicious_text import as_lists, count_suspicious_text
from include.data.tool_calls import CALL_KEYS, read_calls
from include.data.train_flags import TRAIN_FLAGS, UNREAD_FLAGS, read_train_flag

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),  # OpenAI's newer name
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "function_call": "assistant",  # the assistant calls a tool
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
}
PLAIN_ROLES = {"system", "human", "gpt", "user", "assistant"}
TOOL_ROLES = {role for role, name in ROLES.items() if name == "tool"} | {"function_call"}
UNKNOWN = "?"  # the role of a turn whose speaker cannot be read
# keys of turns that are read elsewhere: by `_parse`, by `read_train_flag`, by `read_calls`
READ_KEYS = {"from", "value", "role", "content", *TRAIN_FLAGS, *UNREAD_FLAGS, *CALL_KEYS}
LONG_TURN = 100_000  # characters; a longer turn is probably not part of a conversation
ALLOWED_NEXT = {  # by role, "" at the start
    "": {"system", "user"}, "system": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}  # fmt: skip


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
        alpaca: read the columns instruction, input and output (or response) as a conversation of one exchange, after
            the exchanges of `history`.
        merge_turns: join consecutive turns of one role with an empty line between them.
        pairs: read preference rows: a prompt, a `chosen` and a `rejected` answer (see `include.data.preferences`).

    Returns:
        The parsed rows, and their conversations as Arrow columns (see `include.data.conversation`): `roles` (joined by
        spaces), `contents` (lists of texts), `tools`, `rejected`, `masked` (lists of int32), `calls` (JSON text).
    """
    rows = [_parse(raw, alpaca, merge_turns, pairs) for raw in raw_rows]
    columns = to_columns([row.conversation for row in rows])
    count_suspicious_text(columns["contents"], rows)
    if pairs:
        count_suspicious_text(as_lists(columns["rejected"]), rows)
    return rows, columns


def _parse(raw: bytes, alpaca: bool, merge_turns: bool, pairs: bool) -> ParsedRow:
    parsed, rejected = ParsedRow(), None
    row = None
    try:
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise Unreadable(f"not JSON: {error}") from None
        if isinstance(row, list):  # a bare list of turns
            row = {"conversations": row}
        if not isinstance(row, dict):
            raise Unreadable(f"not an object but {type(row).__name__}")
        if pairs:
            turns, rejected, used = pair_turns(row, parsed)
        elif alpaca:
            turns, used = alpaca_turns(row, parsed)
        else:
            turns, name = turns_of(row, parsed)
            used = {name}
    except Unreadable as reason:
        parsed.faults["unreadable"] = 1
        parsed.columns = tuple(sorted(map(str, row))) if isinstance(row, dict) else ()
        parsed.detail = str(reason)
        return parsed
    first = 1
    if not row.keys().isdisjoint(SYSTEM_COLUMNS) and (system := system_of(row, parsed)):
        turns, first = _with_system(turns, system, parsed)
        rejected = rejected and _with_system(rejected, system, parsed)[0]
    _read_turns(turns, parsed, merge_turns, first)
    if rejected is not None:
        other = ParsedRow()
        _read_turns(rejected, other, merge_turns, first)
        add_rejected(parsed, other)
    if len(row) > len(used):
        read_columns(row, used, parsed)
    return parsed


def _with_system(turns: list[Any], system: str, parsed: ParsedRow) -> tuple[list[Any], int]:
    """Put the text of a system column before the turns, unless a system turn says the same.

    Returns:
        The turns, and the number of the first one in messages; the first turn of the row has the number 1.
    """
    opening = turns[0] if turns and isinstance(turns[0], dict) else {}
    alias = opening.get("from") or opening.get("role")
    if isinstance(alias, str) and ROLES.get(alias.strip().lower()) == "system":
        other = ParsedRow()
        _read_turns(turns[:1], other, merge_turns=False)
        said = other.conversation.contents
        if said and said[0].strip() == system.strip():
            return turns, 1
        if said:
            parsed.add_fault("system_conflicts", "turn 1: the system turn and the system column differ")
            return turns, 1
    return [{"role": "system", "content": system}, *turns], 0


def _read_turns(turns: list[Any], parsed: ParsedRow, merge_turns: bool, first: int = 1) -> None:
    """Set the conversation, and count the faults of its turns.

    A turn that cannot be read keeps its place, so that the checks of order say nothing wrong about the others.

    Args:
        first: the number of the first turn in messages.
    """
    faults, repairs = parsed.faults, parsed.repairs
    roles: list[str] = []
    contents: list[str] = []
    masked: list[int] = []
    calls: list[tuple[int, str]] = []
    numbers: list[int] = []  # of the turns in the file
    for number, turn in enumerate(turns, first):
        role, text, mask, called = UNKNOWN, None, False, None
        if not isinstance(turn, dict):
            parsed.add_fault("malformed_turns", f"turn {number}: not an object but {kind_of(turn)}")
        else:
            alias = turn.get("from") or turn.get("role")
            text = turn.get("value")
            if text is None:
                text = turn.get("content")
            if isinstance(alias, str):
                role = ROLES[alias] if alias in PLAIN_ROLES else _resolve_alias(alias, parsed, number)
            else:
                parsed.add_fault("malformed_turns", f"turn {number}: no speaker")
            if len(turn) > 2 or not isinstance(text, str):
                mask = _is_masked(turn, role, parsed, number)
                called = read_calls(turn, role, parsed, number)
                _read_other_keys(turn, parsed, number)
                text = _text_of(text, called, role, parsed, number)
        if text is None:  # it cannot be read, which is counted
            if not (merge_turns and roles and roles[-1] == role):
                numbers.append(number)
                roles.append(role)
                contents.append("")
            continue
        if "\x00" in text:
            text = text.replace("\x00", "")
            parsed.add_repair("NUL characters removed")
        if not text or text.isspace():
            if role == "system":
                parsed.add_repair("empty system turn left out")
                continue
            if called is None:
                parsed.add_fault("empty_values", f"turn {number}: the text is empty")
            else:
                text = ""
        if len(text) > LONG_TURN:
            faults["long_turns"] += 1
        if merge_turns and roles and roles[-1] == role and not (called or (calls and calls[-1][0] == len(roles) - 1)):
            contents[-1] += "\n\n" + text
            parsed.add_repair("turns of one role merged")
            if mask != (len(contents) - 1 in masked):
                parsed.add_fault("bad_train_flags", f"turn {number}: merged with a turn that has another train flag")
            continue
        if mask:
            masked.append(len(contents))
        if called is not None:
            calls.append((len(contents), called))
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
        number, (before, role) = next((n, pair) for n, pair in order if _is_out_of_order(*pair))
        parsed.detail = f"turn {number}: {role} {f'after {before}' if before else 'at the start'}"
    if masked:
        faults["masked_turns"] = len(masked)
        faults["all_masked"] = int(len(masked) == roles.count("assistant") > 0)
    parsed.conversation = Conversation(tuple(roles), contents, masked=tuple(masked), calls=tuple(calls))


def _is_masked(turn: dict[str, Any], role: str, parsed: ParsedRow, number: int) -> bool:
    """Return whether the loss must not count an assistant turn; count flags that cannot be followed."""
    try:
        trained = read_train_flag(turn)
        if trained and role not in ("assistant", UNKNOWN):
            raise ValueError(f"a turn of the role {role} cannot be trained on")
    except ValueError as reason:
        parsed.add_fault("bad_train_flags", f"turn {number}: {reason}")
        return False
    return trained is False and role == "assistant"


def _read_other_keys(turn: dict[str, Any], parsed: ParsedRow, number: int) -> None:
    """Count keys that change what should be learned, and name those that are not used."""
    for key, value in turn.items():
        if value is None or key in READ_KEYS:
            continue
        if key in REASONING or key in MEDIA:
            if not is_absent(value):
                parsed.add_fault("reasoning" if key in REASONING else "media", f"turn {number}: key {key}")
        else:
            parsed.faults["unknown_keys"] += 1
            parsed.unused.append(f"turn key {key[:60]}")
    for key, other in (("role", "from"), ("content", "value")):  # where a turn has both, the second is read
        value = turn.get(key)
        if turn.get(other) and value is not None and value != turn[other]:
            parsed.faults["unknown_keys"] += 1
            parsed.unused.append(f"turn key {key}")


def _text_of(value: Any, called: str | None, role: str, parsed: ParsedRow, number: int) -> str | None:
    """Return a turn's text; None if the value is not one, which is counted.

    Args:
        called: the turn's calls; a turn with calls, as the system's turn, needs no text.
    """
    if isinstance(value, str):
        return value
    if is_absent(value) and (called is not None or role == "system"):
        return ""
    if isinstance(value, list):
        return join_parts(value, parsed, number)
    parsed.add_fault("non_text_values", f"turn {number}: the value is not a text ({kind_of(value)})")
    return None


def _resolve_alias(alias: str, parsed: ParsedRow, number: int) -> str:
    """Return the role of an alias, or `UNKNOWN`; count tool roles and unknown ones, and name the repair."""
    plain = alias.strip().lower()
    role = ROLES.get(plain, UNKNOWN)
    if plain in TOOL_ROLES:
        parsed.faults["tool_turns"] += 1
    elif role == UNKNOWN:
        parsed.add_fault("unknown_roles", f"turn {number}: unknown role {alias[:60]!r}")
    if role != UNKNOWN and (alias != plain or plain not in PLAIN_ROLES | TOOL_ROLES):
        parsed.add_repair("role alias")
    return role


def _is_out_of_order(before: str, role: str) -> bool:
    return UNKNOWN not in (before, role) and role not in ALLOWED_NEXT[before]


@lru_cache(maxsize=10_000)
def _order_faults(roles: tuple[str, ...]) -> dict[str, int]:
    """Count the faults of an order of roles."""
    counts = {
        "order_errors": sum(_is_out_of_order(before, role) for before, role in pairwise(("", *roles))),
        "no_assistant": int("assistant" not in roles and UNKNOWN not in roles),
        "first_speaker": int(roles[:1] not in ((), ("system",), ("user",), (UNKNOWN,))),
        "last_speaker": int(roles[-1:] not in ((), ("assistant",), (UNKNOWN,))),
    }
    return {name: count for name, count in counts.items() if count}
