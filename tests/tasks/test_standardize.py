"""The side of each row, near-duplicates, rows that hold a benchmark's prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from include.data.tables import read_table
from tests.conftest import conversation
from tests.rows import ROWS, lines, messages


def test_near_duplicates_are_listed_dropped_when_asked_and_never_train_beside_a_held_out_one(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    def story(i: int, last: str) -> dict[str, Any]:
        words = random.Random(i).choices([f"word{k}" for k in range(200)], k=60)
        return conversation(f"Tell me story {i}: {' '.join(words)}", f"{' '.join(reversed(words))} {last}.")

    path = tmp_path / "a.jsonl"
    system = {"from": "system", "value": "You are the same long message in front of all of them. " * 20}
    rows = [story(i, last) for last in ("once", "twice") for i in range(60)]
    path.write_bytes(lines([{"conversations": [system, *row["conversations"]]} for row in rows]))
    made = {}
    for policy in ("report", "drop"):
        recipe = small_recipe(dataset=str(path), near_duplicates=policy, holdout_share=0.2)
        made[policy] = artifact(pipeline(recipe, "standardize"))
    kept = {policy: messages(artifact) for policy, artifact in made.items()}
    sides: dict[int, bool] = {}
    for file in (made["report"].local() / "messages").iterdir():
        sides.update(zip(read_table(file)["row"].to_pylist(), read_table(file)["holdout"].to_pylist(), strict=True))
    twins = [(i, i + 60) for i in range(60)]
    leaking = [pair for pair in twins if not all(number in sides for number in pair)]
    assert leaking, "some pair has one row on each side"
    for one, other in leaking:
        assert sides.get(one, sides.get(other)), "the held-out one of the two stays"
    assert made["report"].metadata.leaking == len(leaking)
    assert made["report"].metadata.near_duplicates == 60 - len(leaking)
    assert sorted(kept["drop"]) == sorted(set(sides) - {b for a, b in twins if a in sides and b in sides})
    pairs = [json.loads(line) for line in (made["report"].local() / "near_duplicates.jsonl").read_text().splitlines()]
    assert {(pair["nearly_equals"], pair["row"]) for pair in pairs if "nearly_equals" in pair} == set(twins) - set(
        leaking
    )


def test_rows_that_hold_a_benchmarks_prompt_do_not_train(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    (tmp_path / "benchmark.txt").write_text("Question 7?\nA prompt of which a row holds only eight words and no more\n")
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([*ROWS, conversation("X?", "Of which a ROW holds only eight words, yes.")]))
    recipe = small_recipe(dataset=str(path), decontaminate_against=str(tmp_path / "benchmark.txt"))
    made = artifact(pipeline(recipe, "standardize"))
    assert set(range(41)) - set(messages(made)) == {7, 40}
    assert made.metadata.contaminated == 2


def test_a_row_keeps_its_side_when_rows_are_added_or_moved(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    def sides(rows: list[Any]) -> dict[str, bool]:
        path = tmp_path / "a.jsonl"
        path.write_bytes(lines(rows))
        made = artifact(pipeline(small_recipe(dataset=str(path)), "standardize"))
        held: list[bool] = []
        for file in sorted((made.local() / "messages").iterdir()):
            held += read_table(file)["holdout"].to_pylist()
        return {said.contents[0]: side for said, side in zip(messages(made).values(), held, strict=True)}

    before = sides(ROWS)
    # golden: the first 8 bytes of sha256 of the messages' JSON, as a fraction of 2^64, are below holdout_share (0.2)
    expected = {f"Question {i}?" for i in (0, 3, 4, 9, 19, 21, 24, 25, 27, 28, 31, 37)}
    assert {question for question, held in before.items() if held} == expected
    more = [conversation(f"Other {i}?", "Yes.") for i in range(40)]
    after = sides([*more, *reversed(ROWS)])
    assert {question: after[question] for question in before} == before
