"""Preference rows: one prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

from include.data.alpaca import QUESTION_COLUMNS, alpaca_prompt
from include.data.columns import CONVERSATION_COLUMNS, has_turns, turns_of
from include.data.conversation import ParsedRow, Unreadable
from include.data.literals import read_literal
from include.data.turns import content_of


def pair_turns(row: dict[str, Any], parsed: ParsedRow) -> tuple[list[Any], list[Any], set[str]]:
    """Return the turns of a preference row with its chosen answer, those with its rejected answer, the used columns.

    The two answers are texts, turns, or whole conversations that differ in the last turn only. If they are not whole
    conversations, the prompt is in a conversation column, in `prompt` (a text or turns), or in Alpaca's columns.

    Raises:
        Unreadable: the row has no prompt, or not two answers.
    """
    columns = f"(it has: {', '.join(sorted(map(str, row)))})"
    if row.get("chosen") is None or row.get("rejected") is None:
        raise Unreadable(f"no chosen and rejected answers {columns}")
    chosen, rejected = (_as_turns(row, name, "assistant", parsed) for name in ("chosen", "rejected"))
    used = {"chosen", "rejected"}
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if common:
        prompt = chosen[:common]
        if row.get("prompt") in (prompt, content_of(prompt[-1]) if isinstance(prompt[-1], dict) else None):
            used.add("prompt")  # it is the same prompt
    elif any(has_turns(row, name) for name in CONVERSATION_COLUMNS):
        prompt, name = turns_of(row, parsed)
        used.add(name)
    elif row.get("prompt") is not None:
        prompt = _as_turns(row, "prompt", "user", parsed)
        used.add("prompt")
    elif row.get("instruction") is not None or row.get("input") is not None:
        prompt = alpaca_prompt(row, parsed)
        used.update(QUESTION_COLUMNS)
    else:
        raise Unreadable(f"no prompt {columns}")
    if len(chosen) != common + 1 or len(rejected) != common + 1:
        parsed.faults["unpaired_answers"] = 1
    return [*prompt, *chosen[common:]], [*prompt, *rejected[common:]], used


def add_rejected(parsed: ParsedRow, other: ParsedRow) -> None:
    """Add the rejected answer to a row with the chosen one.

    Args:
        other: the same row, read with the rejected answer. Its faults and repairs become those of the row, too.
    """
    chosen, rejected = parsed.conversation, other.conversation
    for name, count in other.faults.items():
        parsed.faults[name] = max(parsed.faults[name], count)
    for repair in other.repairs:
        parsed.add_repair(repair)
    parsed.detail = parsed.detail or other.detail
    parsed.unused = [*(Counter(parsed.unused) | Counter(other.unused)).elements()]
    last = len(chosen.contents) - 1
    if chosen.roles != rejected.roles:
        parsed.faults["unpaired_answers"] = 1
    elif any(turn == last for turn, _ in (*chosen.calls, *rejected.calls)):
        parsed.add_fault("bad_tool_calls", "a chosen or rejected answer calls tools")
    elif any(turn == last for turn, _ in (*chosen.thoughts, *rejected.thoughts)):
        parsed.add_fault("reasoning", "a chosen or rejected answer has reasoning; drop it with reasoning: drop")
    elif rejected.contents:
        parsed.faults["all_masked"] = int(last in chosen.masked or last in rejected.masked)
        parsed.faults["masked_turns"], chosen.masked = 0, ()  # only the two last answers are trained on in any case
        chosen.rejected = rejected.contents[-1]
        parsed.faults["same_answers"] = int(chosen.rejected == chosen.contents[-1])


def _as_turns(row: dict[str, Any], name: str, role: str, parsed: ParsedRow) -> list[Any]:
    """Return a column's turns: a list of them, one of them, or a text. Turns may be written as a text, too."""
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        # an answer in the form of a list of turns stays a text unless it is one
        trial = ParsedRow()
        turns = read_literal(value, name, trial)
        if isinstance(turns, list) and all(
            isinstance(turn, dict) and ("role" in turn or "from" in turn) and ("content" in turn or "value" in turn)
            for turn in turns
        ):
            for repair in trial.repairs:
                parsed.add_repair(repair)
            return turns
    if isinstance(value, list):
        return value
    return [value if isinstance(value, dict) else {"role": role, "content": value}]
