"""Lists and objects that a file has as texts: JSON, or what Python prints for them (pandas writes it into CSV)."""

from __future__ import annotations

import ast
import warnings
from typing import Any

import orjson

from include.data.conversation import ParsedRow


def read_literal(text: str, name: str, parsed: ParsedRow) -> Any:
    """Return the value that a text stands for, and name the repair; the text itself if it stands for none.

    Args:
        name: what the value is, for the repair.
    """
    try:
        value = orjson.loads(text)
        form = "a JSON string"
    except orjson.JSONDecodeError:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd backslashes in the text
                literal = ast.literal_eval(text.strip())
            value = orjson.loads(orjson.dumps(literal))  # tuples become lists
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text
        form = "Python's text of a list"
    if not isinstance(value, list | dict):
        return text
    parsed.add_repair(f"{name} was {form}")
    return value
