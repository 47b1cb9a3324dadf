"""Holdout rows with other rows' questions: the answer stays, all that comes before the first one is another row's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from include.chat.tokenized import IGNORED, load_rows, write_rows
from include.evaluation.prompt_control import SHUFFLED_ROWS, write_with_shuffled_prompts


def holdout(folder: Path, conversations: list[tuple[list[int], list[int]]]) -> Path:
    """Prepared rows of a question and a trained answer each, in two files."""
    rows = [
        {"row": 10 * i, "input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}
        for i, (asked, said) in enumerate(conversations)
    ]
    schema = pa.schema({"row": pa.int64(), "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
    folder.mkdir()
    half = len(rows) // 2
    for name, part in (("00000", rows[:half]), ("00001", rows[half:])):
        write_rows(folder / f"{name}.arrow", pa.Table.from_pylist(part, schema).to_batches())
    return folder


def written(
    tmp_path: Path, conversations: list[Any], most: int = 500, longest: int = 100
) -> tuple[int, list[int], Any]:
    count, places = write_with_shuffled_prompts(
        holdout(tmp_path / "in", conversations), tmp_path / "out", most, longest
    )
    return count, places, load_rows(tmp_path / "out").to_list()


def test_each_answer_gets_the_nearest_other_question(tmp_path: Path) -> None:
    data = [([1, 2], [50]), ([1, 2, 3, 4, 5, 6], [51, 52]), ([1, 9], [53, 54, 55])]
    count, places, rows = written(tmp_path, data)
    assert (count, places, len(rows)) == (3, [0, 1, 2], 6)
    assert [row["input_ids"] for row in rows[:3]] == [asked + said for asked, said in data]
    assert [row["input_ids"] for row in rows[3:]] == [[1, 9, 50], [1, 9, 51, 52], [1, 2, 53, 54, 55]]
    assert [row["labels"] for row in rows[3:]] == [[-100, -100, 50], [-100, -100, 51, 52], [-100, -100, 53, 54, 55]]
    assert [row["row"] for row in rows[3:]] == [0, 10, 20]


def test_the_same_question_and_the_same_answer_prove_nothing(tmp_path: Path) -> None:
    asked_twice = [([1, 2], [50]), ([1, 2], [51]), ([1, 3], [50])]
    count, places, rows = written(tmp_path, asked_twice)
    assert (count, places) == (3, [1, 2])
    assert [row["input_ids"] for row in rows[3:]] == [[1, 3, 51], [1, 2, 50]]


def test_no_copy_gets_too_long_and_there_are_only_so_many(tmp_path: Path) -> None:
    count, places, rows = written(tmp_path, [([1, 2], [7] * 9), ([1, 2, 3, 4], [8])], longest=11)
    assert (count, places) == (2, [1])
    assert max(len(row["input_ids"]) for row in rows) <= 11
    (tmp_path / "many").mkdir()
    count, places, rows = written(tmp_path / "many", [([i, i], [i + 1]) for i in range(300)], most=250)
    assert (count, places, len(rows)) == (250, list(range(SHUFFLED_ROWS)), 250 + SHUFFLED_ROWS)
