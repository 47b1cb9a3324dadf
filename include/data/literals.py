"""Lists and objects that a file has as texts: JSON, or what Python prints for them (pandas writes it into CSV)."""

from __future__ import annotations

import ast
import warnings
from typing import Any

import orjson

from include.data.conversation import ParsedRow


def read_literal(text: str, name: str, parsed: ParsedRow, json_is_usual: bool = False) -> Any:
    """Return the list or object that a text stands for, and name the repair; the text itself if it stands for none.

    Args:
        name: what the value is, for the repair.
        json_is_usual: JSON text is a usual form of this value, and no repair.
    """
    try:
        value = orjson.loads(text)
        repair = "" if json_is_usual else f"{name} was a JSON string"
    except orjson.JSONDecodeError:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd backslashes in the text
                literal = ast.literal_eval(text.strip())
            value = orjson.loads(orjson.dumps(literal))  # tuples become lists
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text
        repair = f"{name} was a Python literal"
    if not isinstance(value, list | dict):
        return text
    if repair:
        parsed.add_repair(repair)
    return value
