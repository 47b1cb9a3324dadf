"""The columns of a row: which one has the conversation, which ones add to it, refuse it, or are not used."""

from __future__ import annotations

from typing import Any

from include.data.conversation import ParsedRow, Unreadable, is_absent, kind_of
from include.data.literals import read_literal
from include.data.tool_calls import TOOL_COLUMNS, read_tools

CONVERSATION_COLUMNS = ("conversations", "messages", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
MEDIA = {"image", "images", "video", "videos", "audio", "audios"}  # also keys of turns
LABELS = {"label", "labels", "kto_tag"}  # whether the answer was liked
WEIGHTS = {"weight", "weights", "sample_weight", "sample_weights", "loss_weight", "loss_weights", "loss_scale"}
READ_COLUMNS = {*SYSTEM_COLUMNS, *TOOL_COLUMNS}
SPECIAL_COLUMNS = {*MEDIA, *LABELS, *WEIGHTS, *CONVERSATION_COLUMNS}
YES_OR_NO = {"true", "false", "0", "1", "0.0", "1.0"}


def turns_of(row: dict[str, Any], parsed: ParsedRow) -> tuple[list[Any], str]:
    """Return the turns of the first conversation column that is not empty, and the column's name.

    Raises:
        Unreadable: no column has a list of turns.
    """
    for name in CONVERSATION_COLUMNS:
        turns = row.get(name)
        if turns and turns != "[]":
            break
    else:
        empty = next((name for name in CONVERSATION_COLUMNS if row.get(name) is not None), None)
        if empty is None:
            raise Unreadable(f"no conversations column (it has: {', '.join(sorted(map(str, row)))})")
        name, turns = empty, row[empty]
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


def system_of(row: dict[str, Any], parsed: ParsedRow) -> str | None:
    """Return the text of the system columns, or None; count a value that is not a text, and two different texts."""
    system = None
    for name in SYSTEM_COLUMNS:
        value = row.get(name)
        if is_absent(value):
            continue
        if not isinstance(value, str):
            parsed.add_fault("non_text_values", f"column {name}: the value is not a text ({kind_of(value)})")
        elif system is not None and value != system:
            parsed.add_fault("system_conflicts", f"the columns {' and '.join(SYSTEM_COLUMNS)} differ")
        else:
            system = value
    return system


def read_columns(row: dict[str, Any], used: set[str], parsed: ParsedRow) -> None:
    """Read the columns beside the conversation: tools; columns that refuse the row; the others are not used.

    Args:
        used: the columns that the conversation is read from.
    """
    if not row.keys().isdisjoint(TOOL_COLUMNS):
        read_tools(row, parsed)
    for name, value in row.items():
        if value is None or name in used or name in READ_COLUMNS:
            continue
        if name not in SPECIAL_COLUMNS:  # most columns, so that this comes first
            parsed.unused.append("column " + name[:60])
        elif name in MEDIA:
            if not is_absent(value):
                parsed.add_fault("media", f"column {name}")
        elif name in LABELS and _is_label(value):
            parsed.add_fault("labels", f"column {name}")
        elif name in WEIGHTS and not is_absent(value) and not _is_one(value):
            parsed.add_fault("row_weights", f"column {name}")
        elif name not in CONVERSATION_COLUMNS or not is_absent(value):
            parsed.unused.append(f"column {name[:60]}")


def _is_label(value: Any) -> bool:
    """Return whether a value says yes or no, also as a number or a text (in a CSV file), or is a list of such."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_label, value))
    return str(value).strip().lower() in YES_OR_NO


def _is_one(value: Any) -> bool:
    """Return whether a weight changes nothing: it is 1, as in a row without a weight."""
    try:
        return not isinstance(value, list | dict) and float(value) == 1
    except ValueError:
        return False
