"""Columns of a row: which one holds the conversation, which add to it, which refuse the row, which are not used."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import orjson

from include.data.conversation import ParsedRow, Unreadable, is_absent, kind_of
from include.data.literals import read_literal
from include.data.turns import EMPTY_SYSTEM, UNSUPPORTED, content_of, role_of, text_of

CONVERSATION_COLUMNS = ("conversations", "messages", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
READ_COLUMNS = {*SYSTEM_COLUMNS, *TOOL_COLUMNS}
LABEL_COLUMNS = ("label", "labels", "kto_tag")
WEIGHT_COLUMNS = ("weight", "weights", "sample_weight", "sample_weights", "loss_weight", "loss_weights", "loss_scale")
TRAIN_COLUMNS = ("train", "training", "loss")


def turns_of(row: dict[str, Any], parsed: ParsedRow) -> tuple[list[Any], str]:
    """Return the turns in a row's first conversation column that has some, and the column's name.

    Raises:
        Unreadable: there is no such column, or it does not hold turns.
    """
    given = [name for name in CONVERSATION_COLUMNS if row.get(name) is not None]
    name = next((name for name in given if has_turns(row, name)), given[0] if given else "")
    if not name:
        raise Unreadable(f"no conversations column (it has: {', '.join(sorted(map(str, row)))})")
    turns = row[name]
    if isinstance(turns, str):
        turns = read_literal(turns, "conversation", parsed)
        if isinstance(turns, str):
            raise Unreadable("the conversation is a text, not a list of turns")
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list):
        turns = turns[0]
        parsed.repairs.append("conversation was nested in a list")
    if not isinstance(turns, list):
        raise Unreadable(f"the conversation is {kind_of(turns)}, not a list of turns")
    return turns, name


def has_turns(row: dict[str, Any], name: str) -> bool:
    """Return whether a column is there and not empty; an empty list may be written as a text."""
    return row.get(name) not in (None, [], "", "[]")


def with_system(turns: list[Any], row: dict[str, Any], parsed: ParsedRow) -> tuple[list[Any], int]:
    """Return the turns with the text of the system columns as their system turn, and the number of the first turn.

    A system turn of the conversation itself must have the same text. The number is 1, or 0 if the system turn is not
    in the file.
    """
    texts = []
    for name in SYSTEM_COLUMNS:
        if not is_absent(value := row.get(name)) and (text := text_of(value, f"column {name}", parsed)):
            texts.append(text)
    if not texts or not turns:
        return turns, 1
    if len({text.strip() for text in texts}) > 1:
        parsed.add_fault("system_conflicts", f"the columns {' and '.join(SYSTEM_COLUMNS)} differ")
    turn = {"role": "system", "content": texts[0]}
    if role_of(turns[0]) != "system":
        return [turn, *turns], 0
    if is_absent(own := content_of(turns[0])):
        parsed.add_repair(EMPTY_SYSTEM)
        return [turn, *turns[1:]], 1
    said = text_of(own, "turn 1", ParsedRow())
    if said is not None and said.strip() != texts[0].strip():
        parsed.add_fault("system_conflicts", "the system column and turn 1 differ")
    return turns, 1


def read_tools(row: dict[str, Any], parsed: ParsedRow) -> None:
    """Set the conversation's tools: a list of objects in a column, or its JSON text. An empty list means no tools."""
    lists = []
    for name in TOOL_COLUMNS:
        tools = row.get(name)
        if isinstance(tools, str) and tools.strip():
            tools = read_literal(tools, name, ParsedRow())  # a text is the usual form, and no repair
        if is_absent(tools):
            continue
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            parsed.add_fault("bad_tool_lists", f"column {name}: not a list of objects")
            continue
        lists.append(tools)
    if not lists:
        return
    if lists[0] != lists[-1]:
        parsed.add_fault("bad_tool_lists", f"the columns {' and '.join(TOOL_COLUMNS)} differ")
    parsed.faults["tool_lists"] = 1
    parsed.conversation.tools = orjson.dumps(lists[0]).decode()


def read_other_columns(row: dict[str, Any], used: set[str], parsed: ParsedRow) -> None:
    """Count the columns that change what should be learned as faults, and name those that are not used.

    Args:
        used: names of the columns that the conversation was read from.
    """
    for name, value in row.items():
        if value is None or name in used or name in READ_COLUMNS:
            continue
        is_known, label = _known(name)
        fault = _fault_of(name.lower(), value) if is_known else None
        if fault:
            parsed.add_fault(fault, f"the column {name[:60]}")
        elif fault is None and (name not in CONVERSATION_COLUMNS or has_turns(row, name)):
            parsed.faults["unused_columns"] += 1
            parsed.unused.append(label)


@lru_cache(maxsize=10_000)
def _known(name: str) -> tuple[bool, str]:
    """Return whether values of a column may refuse a row, and the column's name in lists; the same for most rows."""
    plain = name.lower()
    return plain in UNSUPPORTED or plain in (*LABEL_COLUMNS, *WEIGHT_COLUMNS, *TRAIN_COLUMNS), f"column {name[:60]}"


def _fault_of(name: str, value: Any) -> str | None:
    """Return the fault of a column's value; "" if the value changes nothing, None if the value is not understood."""
    if name in UNSUPPORTED:
        if is_absent(value):
            return ""
        return None if isinstance(value, bool) else UNSUPPORTED[name]
    text = str(value).strip().lower()  # a CSV file has only texts
    if name in LABEL_COLUMNS:
        return "labels" if isinstance(value, list) or text in ("true", "false") or _is_number(text) else None
    if name in WEIGHT_COLUMNS:
        return "" if is_absent(value) or text in ("1", "1.0", "true") else "row_weights"
    # one of TRAIN_COLUMNS
    if text in ("false", "0", "0.0"):
        return "row_weights"
    return "" if text in ("true", "1", "1.0") else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
