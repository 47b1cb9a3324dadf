"""Copies of holdout rows with shuffled prompts: the tokens before the first answer are another row's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from include.chat.tokenized import IGNORED, load_rows, write_rows
from include.evaluation.prompt_control import SHUFFLED_ROWS, write_with_shuffled_prompts


def holdout(folder: Path, conversations: list[tuple[list[int], list[int]]]) -> list[Path]:
    """Write rows of a prompt and a trained answer each, in two files."""
    rows = [
        {"row": 10 * i, "input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for i, (prompt, answer) in enumerate(conversations)
    ]
    schema = pa.schema({"row": pa.int64(), "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
    folder.mkdir()
    half = len(rows) // 2
    for name, part in (("00000", rows[:half]), ("00001", rows[half:])):
        write_rows(folder / f"{name}.arrow", pa.Table.from_pylist(part, schema).to_batches())
    return sorted(folder.iterdir())


def written(
    tmp_path: Path, conversations: list[Any], max_rows: int = 500, max_tokens: int = 100
) -> tuple[int, list[int], Any]:
    count, positions = write_with_shuffled_prompts(
        holdout(tmp_path / "in", conversations), tmp_path / "out.arrow", max_rows, max_tokens
    )
    return count, positions, load_rows([tmp_path / "out.arrow"]).to_list()


def test_each_answer_gets_the_prompt_nearest_in_length(tmp_path: Path) -> None:
    data = [([1, 2], [50]), ([1, 2, 3, 4, 5, 6], [51, 52]), ([1, 9], [53, 54, 55])]
    count, positions, rows = written(tmp_path, data)
    assert (count, positions, len(rows)) == (3, [0, 1, 2], 6)
    assert [row["input_ids"] for row in rows[:3]] == [prompt + answer for prompt, answer in data]
    assert [row["input_ids"] for row in rows[3:]] == [[1, 9, 50], [1, 9, 51, 52], [1, 2, 53, 54, 55]]
    assert [row["labels"] for row in rows[3:]] == [[-100, -100, 50], [-100, -100, 51, 52], [-100, -100, 53, 54, 55]]
    assert [row["row"] for row in rows[3:]] == [0, 10, 20]


def test_a_copy_differs_in_prompt_and_answer(tmp_path: Path) -> None:
    same_prompt = [([1, 2], [50]), ([1, 2], [51]), ([1, 3], [50])]
    count, positions, rows = written(tmp_path, same_prompt)
    assert (count, positions) == (3, [1, 2])
    assert [row["input_ids"] for row in rows[3:]] == [[1, 3, 51], [1, 2, 50]]


def test_copies_have_a_maximum_length_and_a_maximum_number(tmp_path: Path) -> None:
    count, positions, rows = written(tmp_path, [([1, 2], [7] * 9), ([1, 2, 3, 4], [8])], max_tokens=11)
    assert (count, positions) == (2, [1])
    assert max(len(row["input_ids"]) for row in rows) <= 11
    (tmp_path / "many").mkdir()
    count, positions, rows = written(tmp_path / "many", [([i, i], [i + 1]) for i in range(300)], max_rows=250)
    assert (count, len(positions), len(rows)) == (250, SHUFFLED_ROWS, 250 + SHUFFLED_ROWS)
    assert positions == sorted(positions) != list(range(SHUFFLED_ROWS)), "a random sample, not the first rows"
    assert [row["row"] for row in rows[250:]] == [rows[position]["row"] for position in positions]
