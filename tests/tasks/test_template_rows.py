"""Prepared rows: what the trainer gets, in order, of what length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from include.chat.tokenized import load_rows
from include.data.conversation import Conversation
from include.errors import BadData
from tests.conftest import conversation
from tests.rows import ROWS, lines


def test_what_is_prepared_is_what_the_trainer_gets(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    rows = [*ROWS, conversation("A long one?", "word " * 400)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    found = artifact(pipeline(small_recipe(dataset=str(path)), "template"))
    assert found.metadata.too_long == 1, "the long row is counted, not cut"
    train, holdout = (load_rows(found.files(side)) for side in ("train", "holdout"))
    assert len(train) + len(holdout) == 40
    assert sum(map(len, train["input_ids"])) == found.metadata.train.tokens
    assert max(map(len, train["input_ids"])) <= 256
    for row in train:
        assert len(row["input_ids"]) == len(row["labels"])
        assert row["input_ids"].count(0) == 1, "one beginning of text"
        assert [label for label in row["labels"] if label != -100][-1] == 4, "the end of the turn is trained"
    assert "»Answer" in (found.local() / "samples.txt").read_text()


def test_no_row_short_enough_says_how_long_they_are(small_recipe: Callable, pipeline: Callable) -> None:
    with pytest.raises(BadData, match="none has at most 16 tokens .the shortest row has"):
        pipeline(small_recipe(max_seq_length=16), "template")


def test_many_rows_are_encoded_by_several_processes_in_their_order(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, tiny_base: Path
) -> None:
    from include.chat.chat_format import ChatFormat
    from include.recipe import validate_recipe

    rows = [conversation(f"Q{i}?", f"A{i}.") for i in range(11_000)]  # three row groups
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    found = artifact(pipeline(small_recipe(dataset=str(path)), "template"))
    train, holdout = (load_rows(found.files(side)) for side in ("train", "holdout"))
    assert sorted([*train["row"], *holdout["row"]]) == list(range(11_000))
    assert train["row"] == sorted(train["row"])
    chat = ChatFormat.from_recipe(tiny_base, validate_recipe({"name": "x"}, "x"))
    chosen = train.select(range(0, len(train), 500))
    expected = chat.encode([Conversation(("user", "assistant"), [f"Q{i}?", f"A{i}."]) for i in chosen["row"]])
    assert list(zip(chosen["input_ids"], chosen["labels"], strict=True)) == list(expected.rows())


def test_too_long_conversations_are_dropped_split_or_truncated_and_counted(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    turns = [{"from": "system", "value": "Be brief."}]
    for i in range(12):
        turns += [
            {"from": "human", "value": f"Question {i}?"},
            {"from": "gpt", "value": f"Answer {i}. " + "word " * 20},
        ]
    lonely = conversation("Q?", "word " * 400)  # one exchange that no split makes short enough
    deaf = conversation("word " * 400, "A.")  # cut, it has no trained token left
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([*ROWS, {"conversations": turns}, lonely, deaf]))
    found = {}
    for policy in ("drop", "split", "truncate"):
        recipe = small_recipe(dataset=str(path), on_too_long=policy, holdout_share=0.2)
        made = artifact(pipeline(recipe, "template"))
        rows = [
            *load_rows(made.files("train")),
            *load_rows(made.files("holdout")),
        ]
        assert made.metadata.too_long == 3
        assert all(len(row["input_ids"]) <= 256 for row in rows)
        found[policy] = (made.metadata.left_out, [row for row in rows if row["row"] >= 40])
    assert found["drop"] == (3, [])

    left_out, pieces = found["split"]
    assert left_out == 2
    assert {row["row"] for row in pieces} == {40}
    assert len(pieces) > 1
    assert all([label for label in row["labels"] if label != -100][-1] == 4 for row in pieces), "whole turns"
    assert sum(label == 4 for row in pieces for label in row["labels"]) == 12, "every answer once"

    left_out, cut = found["truncate"]
    assert left_out == 1
    assert sorted((row["row"], len(row["input_ids"])) for row in cut) == [(40, 256), (41, 256)]
