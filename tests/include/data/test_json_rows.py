"""JSON files of every form: what they hold decides, a bad row is one row, and what is left out is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from include.data.json_rows import CHUNK, json_rows
from tests.conftest import conversation

ROWS = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(5)]
TURNS = [row["conversations"] for row in ROWS]
TOOLS = {"messages": TURNS[0], "tools": [{"name": "look_up"}]}
PAIR = {"prompt": "Which?", "chosen": TURNS[0], "rejected": TURNS[1]}
DAMAGED = b"\xf0\x28"


def read(content: bytes, name: str = "a.json", split: str = "train") -> tuple[list[bytes], list[str]]:
    notes: list[str] = []
    return list(json_rows(io.BytesIO(content), split, notes.append, name.endswith("l"))), notes


def lines(*rows: Any) -> bytes:
    return b"\n".join(map(orjson.dumps, rows))


def indented(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (lines(*ROWS), ROWS),
        (b"\xef\xbb\xbf\r\n\n" + lines(*ROWS).replace(b"\n", b"\r\n\r\n"), ROWS),
        (lines(ROWS), ROWS),
        (indented(ROWS), ROWS),
        (b"\xef\xbb\xbf" + indented(ROWS), ROWS),
        (lines(*ROWS).replace(b"\n", b"\n, ").join((b"[", b"]")), ROWS),
        (b"\n".join(map(indented, ROWS)), ROWS),  # objects one after the other, over several lines each
        (lines(*TURNS), TURNS),  # each line is a conversation
        (lines(TURNS), TURNS),
        (indented(TURNS), TURNS),
        # one conversation alone
        (lines(ROWS[0]), ROWS[:1]),
        (indented(ROWS[0]), ROWS[:1]),
        (lines(TURNS[0]), TURNS[:1]),
        (indented(TURNS[0]), TURNS[:1]),
        (indented({"dialog": TURNS[0]}), TURNS[:1]),
        (lines(TOOLS), [TOOLS]),
        (lines(PAIR), [PAIR]),
        (lines({"instruction": "Add.", "output": "5"}), [{"instruction": "Add.", "output": "5"}]),
        # nothing, and what is no row
        (b"", []),
        (b"\n \n", []),
        (b"[]", []),
        (b"42", [42]),
        (b"[1, true, null]", [1, True, None]),
    ],
)
def test_the_rows_of_a_file_are_found_by_its_content(content: bytes, rows: list[Any], name: str) -> None:
    found, notes = read(content, name)
    assert [orjson.loads(row) for row in found] == rows
    assert all(b"\n" not in row for row in found)
    assert not [note for note in notes if not note.startswith("each value of the file's object is a row")]


@pytest.mark.parametrize("make", [orjson.dumps, indented])
@pytest.mark.parametrize(
    ("value", "split", "rows", "note"),
    [
        ({"tags": ["a"], "data": ROWS}, "train", ROWS, "the rows are the list 'data' of the file; not read: tags"),
        ({"none": [], "data": ROWS}, "train", ROWS, "the rows are the list 'data' of the file; not read: none"),
        ({"data": TURNS, "n": 5}, "train", TURNS, "the rows are the list 'data' of the file; not read: n"),
        ({"conversations": TURNS}, "train", TURNS, "the rows are the list 'conversations' of the file"),
        ({"test": ROWS[:2], "train": ROWS[2:]}, "train", ROWS[2:],
         "the rows are the list 'train' of the file; not read: test (2 rows)"),
        ({"test": ROWS[:2], "train": ROWS[2:]}, "test", ROWS[:2],
         "the rows are the list 'test' of the file; not read: train (3 rows)"),
        ({"sources": [{"url": "x"}], "data": ROWS}, "train", ROWS,
         "the rows are the list 'data' of the file; not read: sources (1 rows)"),
        (dict(zip("abcde", TURNS, strict=True)), "train", TURNS, "each value of the file's object is a row"),
        ({**dict(zip("abcde", ROWS, strict=True)), "version": 1}, "train", ROWS,
         "each value of the file's object is a row; not read: version"),
    ],
)  # fmt: skip
def test_what_is_taken_of_an_object_around_the_rows_is_said(
    value: Any, split: str, rows: list[Any], note: str, make: Any
) -> None:
    found, notes = read(make(value), split=split)
    assert [orjson.loads(row) for row in found] == rows
    assert notes == [note]


def test_several_lists_of_rows_of_which_none_is_the_split_are_refused() -> None:
    with pytest.raises(ValueError, match="several lists of rows, test, dev, and none has the name 'train'"):
        read(lines({"test": ROWS[:2], "dev": ROWS[2:]}))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "bad",
    [
        b"{'from': 1}", b'{"a": tru}', b"undefined", DAMAGED, b'{"a": "' + DAMAGED + b'"}', b'{"a": [1, 2}',
        b'{"a": "\\ud83d"}', b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)  # fmt: skip
def test_a_bad_row_is_one_row_in_lines_arrays_and_objects(bad: bytes, name: str) -> None:
    good = list(map(orjson.dumps, ROWS))
    rows = [*good[:3], bad, *good[3:]]
    for content in (b"\n".join(rows), b"[" + b", ".join(rows) + b"]", b'{"tags": [], "x": [' + b",".join(rows) + b"]}"):
        found, _ = read(content, name)
        assert found == rows, content
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(bad)


def test_a_first_line_that_is_cut_is_one_row() -> None:
    cut = orjson.dumps(ROWS[0])[:30]
    for name in ("a.json", "a.jsonl"):
        found, _ = read(cut + b"\n" + lines(*ROWS[1:]), name)
        assert found == [cut, *map(orjson.dumps, ROWS[1:])]


@pytest.mark.parametrize("content", [b"[1, 2", b'[{"a": 1}, {"a":', b'{"data": [{"a": 1}', b'{"a": 1, ', b'{"a"}'])
def test_a_text_that_ends_too_early_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="^not JSON"):
        read(content)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_nan_becomes_null_and_is_counted(word: str) -> None:
    with_nan = orjson.dumps(ROWS[1])[:-1] + f', "score": {word}}}'.encode()
    text = orjson.dumps(conversation("What is NaN?", "Not a number; not Infinity."))
    for content in (b"\n".join((text, with_nan, text)), b"[" + b",".join((text, with_nan, text)) + b"]"):
        found, notes = read(content, "a.jsonl")
        assert found[0] == found[2] == text
        assert orjson.loads(found[1]) == {**ROWS[1], "score": None}
        assert notes == ["NaN or Infinity was read as null in 1 rows"]


class Endless(io.RawIOBase):
    """A file of so many bytes that is made while it is read."""

    def __init__(self, size: int, begin: bytes, row: bytes):
        self.size, self.pieces, self.row, self.sent = size, begin, row, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.sent > self.size:
            return 0
        while len(self.pieces) < len(buffer):
            self.pieces += self.row
        buffer[:], self.pieces = self.pieces[: len(buffer)], self.pieces[len(buffer) :]
        self.sent += len(buffer)
        return len(buffer)


@pytest.mark.parametrize(("begin", "end"), [(b"", b"\n"), (b"[", b","), (b"[\n", b",\n")])
def test_lines_and_arrays_are_read_in_parts(begin: bytes, end: bytes) -> None:
    row = orjson.dumps(ROWS[0])
    file = Endless(1 << 40, begin, row + end)
    rows = json_rows(io.BufferedReader(file), "train", print, lines=True)  # type: ignore[type-var]
    for _ in range(50_000):
        assert next(rows) == row
    assert file.sent < 50_000 * len(row + end) + 8 * CHUNK


def test_the_small_files_of_the_wild_are_read(material: Path) -> None:
    expected = {
        "06-json-array-in-jsonl/36_array.jsonl": 24, "06-json-array-in-jsonl/36b_array1.jsonl": 24,
        "07-nan-in-a-side-column/27b_nan.jsonl": 24, "08-json-wrappers/10_single.json": 1,
        "08-json-wrappers/11_wrapper.json": 24, "08-json-wrappers/11b_splits.json": 12,
        "08-json-wrappers/11c_byid.json": 24, "39-json-arrays-with-one-bad-row/empty_list_first.json": 60,
        "39-json-arrays-with-one-bad-row/nan_array.json": 61, "39-json-arrays-with-one-bad-row/tags_first.json": 60,
        "39-json-arrays-with-one-bad-row/one_conversation.json": 1,
        "39-json-arrays-with-one-bad-row/surrogate_array.json": 61,
    }  # fmt: skip
    files = {name: (material / "cases" / name).read_bytes() for name in expected}
    assert {name: len(read(content, name)[0]) for name, content in files.items()} == expected
