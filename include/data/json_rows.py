r"""Rows of JSON files: one JSON document a line, one array, or one object around the rows.

What a file holds decides, not its name: a `.jsonl` file may hold an array, and a `.json` file JSON lines. Lines and
arrays are read in parts, so that memory does not grow with the file. An element that is not JSON is yielded as it is,
and `validate` refuses that row only. `NaN` and `Infinity`, which Python writes and JSON does not have, become null.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

import orjson

from include.data.columns import CONVERSATION_COLUMNS

CHUNK = 1 << 20  # characters
MAX_LINE = 8 << 20  # bytes; a longer first line is not looked at as a line
PAIR_COLUMNS = {"chosen", "rejected"}
NOT_JSON = (b"NaN", b"Infinity")

_decode = json.JSONDecoder().raw_decode
_space = re.compile(r"[ \t\r\n]*")
_tokens = re.compile(r'"(?:[^"\\]++|\\.)*+"|[{}\[\],"]', re.DOTALL)


class NoRows(ValueError):
    """A file whose rows cannot be told, or that holds something else.

    Args:
        what: what it is or has, after "it".
        remedy: what to do.
    """

    def __init__(self, what: str, remedy: str):
        super().__init__(what)
        self.remedy = remedy


class NoSplit(NoRows):
    """A file without the list of rows that is asked for. Which recipe field asks for it, the caller knows."""

    def __init__(self, what: str):
        super().__init__(what, "Name a list of rows that the file has")


def json_rows(
    file: BinaryIO, split: str, note: Callable[[str], None], lines: bool, named_split: bool = False
) -> Iterator[bytes]:
    """Yield the rows of a JSON file as JSON documents.

    Args:
        file: its content, as UTF-8 with or without a byte order mark.
        split: the list to take if an object has several lists of rows.
        note: is told which part of an object was taken, and how many rows had `NaN`.
        lines: whether the file's name says JSON lines. A first line that is not JSON is then a bad row, unless it looks
            like the beginning of a longer text.
        named_split: whether the file must be an object with a list `split`.

    Raises:
        NoSplit: the file is an object with several lists of rows, and none is `split`; or no list is, and one must be.
        ValueError: the text ends inside an array or object.
    """
    head = file.readline(MAX_LINE).removeprefix(codecs.BOM_UTF8)
    while head.endswith(b"\n") and not head.strip():
        head = file.readline(MAX_LINE)
    following = file.readline() if head.endswith(b"\n") else b""
    while following.endswith(b"\n") and not following.strip():
        following = file.readline()
    one_text = not following.strip() or (not _is_json(head) and (_goes_on(head) or not (lines or _is_json(following))))
    if named_split and not (one_text and head.lstrip()[:1] == b"{"):
        raise NoSplit(f"has no lists of rows with names, and so no split '{split}'")
    if one_text and head.lstrip()[:1] in (b"[", b"{"):
        text = _Text(chain([head, following], iter(lambda: file.read(CHUNK), b"")))
        rows = _documents(text, split, note, named_split)
    else:
        rows = (line.strip() for line in chain([head, following], file) if line.strip())
    count = 0
    try:
        for row in rows:
            if any(word in row for word in NOT_JSON):
                row, changed = _without_nan(row)
                count += changed
            yield row
    finally:  # also if the reader wants no more rows
        if count:
            note(f"NaN or Infinity was read as null in {count:,} rows")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _goes_on(line: bytes) -> bool:
    """Return whether a first line that is not JSON is the beginning of a longer text, and not a damaged row."""
    if line.rstrip()[-1:] in (b"{", b"[", b",", b":"):
        return True
    try:
        element = _parsed(next(_Text([line]).elements(), None)) if line.lstrip()[:1] == b"[" else None
    except ValueError:
        return False
    return isinstance(element, dict) and not _is_turn(element)


def _without_nan(row: bytes) -> tuple[bytes, bool]:
    """Return a row with null for NaN and Infinity, and whether it had them; a row that is still not JSON unchanged."""
    try:
        orjson.loads(row)
    except orjson.JSONDecodeError:
        try:
            return orjson.dumps(json.loads(row, parse_constant=lambda _: None)), True
        except (ValueError, RecursionError, TypeError):
            pass
    return row, False


class _Text:
    """A JSON text that is read in parts."""

    def __init__(self, parts: Iterable[bytes]):
        self.parts, self.text, self.at, self.ended = iter(parts), "", 0, False
        # bytes that are not UTF-8 are written back as they were, so that only their row is refused
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def grow(self) -> bool:
        """Read at least as much again as is not used up yet; return False at the end."""
        if self.ended:
            return False
        parts, size = [self.text[self.at :]], 0
        wanted = max(CHUNK, len(parts[0]))
        while size < wanted and not self.ended:
            part = next(self.parts, None)
            self.ended = part is None
            parts.append(self.decoder.decode(part or b"", self.ended))
            size += len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return True

    def peek(self) -> str:
        """Return the next character that is no space, or an empty string at the end."""
        while True:
            self.at = _space.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def take(self, *characters: str) -> bool:
        """Skip the next character if it is one of these; return whether it was."""
        found = self.peek() in characters
        self.at += found
        return found

    def value(self) -> str:
        """Take one value, up to where it ends or, if it is not JSON, to the comma or bracket that must follow it.

        Raises:
            ValueError: the text ends inside the value.
        """
        self.peek()
        while True:
            try:
                end: int | None = _decode(self.text, self.at)[1]
            except (ValueError, RecursionError):
                end = _end_of_damaged(self.text, self.at)
            if end is not None and (end < len(self.text) or self.ended):
                value, self.at = self.text[self.at : end], end
                return value
            if not self.grow():
                raise ValueError(f"not JSON: it ends inside the value that begins with {self.text[self.at :][:60]!r}")

    def elements(self) -> Iterator[str]:
        """Take an array; yield its elements.

        Raises:
            ValueError: the text ends inside the array.
        """
        self.take("[")
        while not self.take("]"):
            if not self.take(","):
                if not self.peek():
                    raise ValueError("not JSON: it ends inside an array")
                yield self.value()

    def members(self) -> Iterator[tuple[str, str | list[str]]]:
        """Take an object; yield its keys and values, an array as the list of its elements.

        Raises:
            ValueError: the text ends inside the object, or has no key where one must be.
        """
        self.take("{")
        while not self.take("}"):
            if self.take(","):
                continue
            if self.peek() != '"':
                raise ValueError("not JSON: it ends inside an object" if not self.peek() else self._no_key())
            key = self.value()
            if not self.take(":"):
                raise ValueError(self._no_key())
            yield json.loads(key), list(self.elements()) if self.peek() == "[" else self.value()

    def _no_key(self) -> str:
        return f"not JSON: no key and value at {self.text[self.at :][:60]!r}"


def _end_of_damaged(text: str, start: int) -> int | None:
    """Return where a value that is not JSON ends: at its last bracket, or before the next comma or bracket."""
    opened: list[str] = []
    for token in _tokens.finditer(text, start):
        mark = token.group()
        if mark in ("{", "["):
            opened.append(mark)
        elif mark in ("}", "]"):
            opener = "{" if mark == "}" else "["
            if opener not in opened:
                return max(token.start(), start + 1)
            while opened.pop() != opener:
                pass  # a bracket that was not closed
            if not opened:
                return token.end()
        elif mark == "," and not opened:
            return max(token.start(), start + 1)
        elif mark == '"':  # a text without its end
            return None
    return None


def _documents(text: _Text, split: str, note: Callable[[str], None], named_split: bool) -> Iterator[bytes]:
    """Yield the rows of arrays and objects that stand one after the other."""
    first = True
    while opening := text.peek():
        if opening == "[":
            elements = text.elements()
            start = list(_until_json(elements))
            if start and _is_turn(_parsed(start[-1])):  # one conversation alone
                yield _compact(_array(chain(start, elements)))
            else:
                yield from map(_compact, chain(start, elements))
        elif opening == "{":
            members = list(text.members())
            if first and not text.peek():
                yield from _rows_of_object(members, split, note, named_split)
            else:
                yield _compact(_object(members))
        else:
            yield _compact(text.value())
        first = False


def _until_json(elements: Iterator[str]) -> Iterator[str]:
    """Yield elements up to the first one that is JSON."""
    for element in elements:
        yield element
        if _parsed(element) is not None:
            return


def _rows_of_object(
    members: list[tuple[str, str | list[str]]], split: str, note: Callable[[str], None], named_split: bool
) -> Iterator[bytes]:
    """Yield the rows of a file that is one object: one of its lists, its values, or the object itself."""
    conversations = [key for key, value in members if _is_conversation(value)]
    lists = {key: value for key, value in members if isinstance(value, list) and _has_rows(value)}
    trainable = [key for key, rows in lists.items() if any(_is_row(_parsed(row)) for row in rows[:10])]
    if named_split and split not in lists:
        has = f"; its lists of rows are: {', '.join(lists)}" if lists else ""
        raise NoSplit(f"has no list of rows with the name '{split}'{has}")
    known = set(conversations) >= PAIR_COLUMNS or not set(conversations).isdisjoint(CONVERSATION_COLUMNS)
    if trainable or (lists and not conversations):
        name = _choose(lists, trainable, split)
        others = [f"{key} ({len(lists[key]):,} rows)" if key in lists else key for key, _ in members if key != name]
        note(f"the rows are the list '{name}' of the file" + (f"; not read: {', '.join(others)}" if others else ""))
        yield from map(_compact, lists[name])
        return
    by_key = [(key, value) for key, value in members if key in conversations or _is_row(_parsed(value))]
    if known or not by_key or len(by_key) == 1 < len(members):
        yield _compact(_object(members))
        return
    others = [key for key, _ in members if key not in dict(by_key)]
    note("each value of the file's object is a row" + (f"; not read: {', '.join(others)}" if others else ""))
    yield from (_compact(value if isinstance(value, str) else _array(value)) for _, value in by_key)


def _choose(lists: dict[str, list[str]], trainable: list[str], split: str) -> str:
    if split in lists:
        return split
    if len(candidates := trainable or list(lists)) == 1:
        return candidates[0]
    raise NoSplit(f"has several lists of rows, {', '.join(candidates)}, and none has the name '{split}'")


def _has_rows(elements: list[str]) -> bool:
    """Return whether an array is a list of objects, or of lists of turns, and not one conversation."""
    kinds = [value for element in elements[:10] if (value := _parsed(element)) is not None]
    return any((isinstance(kind, dict) and not _is_turn(kind)) or _is_conversation(kind) for kind in kinds)


def _is_row(value: Any) -> bool:
    columns = (*CONVERSATION_COLUMNS, "instruction", "prompt", "chosen")
    return _is_conversation(value) or (isinstance(value, dict) and any(column in value for column in columns))


def _is_conversation(value: Any) -> bool:
    """Return whether a value, or the list of an array's elements, is a list of turns."""
    if not isinstance(value, list) or not value:
        return False
    return all(_is_turn(_parsed(turn) if isinstance(turn, str) else turn) for turn in value)


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return ("from" in value and "value" in value) or ("role" in value and ("content" in value or "tool_calls" in value))


def _parsed(text: Any) -> Any:
    """Return the value of a JSON text, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _array(elements: Iterable[str]) -> str:
    return f"[{','.join(elements)}]"


def _object(members: list[tuple[str, str | list[str]]]) -> str:
    pairs = (f"{json.dumps(key)}:{value if isinstance(value, str) else _array(value)}" for key, value in members)
    return f"{{{','.join(pairs)}}}"


def _compact(text: str) -> bytes:
    """Return a JSON text without the spaces between its parts; a text that is not JSON as it is."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return orjson.dumps(orjson.loads(raw))
    except (orjson.JSONDecodeError, TypeError):
        return raw
