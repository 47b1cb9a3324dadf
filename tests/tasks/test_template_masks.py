"""Which turns train: flags of turns and `train_on`, from the file to the labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.chat.chat_format import ChatFormat
from tests.rows import lines, listed, prepared_rows


def trained(chat: ChatFormat, row: dict[str, Any]) -> str:
    return chat.decode([label for label in row["labels"] if label != -100])


@pytest.fixture
def chat(tiny_base: Path) -> ChatFormat:
    return ChatFormat(tiny_base, chat_template="llama-3.1")


@pytest.mark.parametrize("name", ["01_weight0.jsonl", "02_trainfalse.jsonl", "02b_loss.jsonl", "14b_weight.parquet"])
def test_a_masked_answer_is_context_and_its_labels_are_ignored(
    name: str, material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, chat: ChatFormat
) -> None:
    file = next((material / "cases").glob("01-*")) / name
    lineage = pipeline(small_recipe(dataset=str(file), holdout_share=0.4), "template")
    validated, made = artifact(lineage, "validate"), artifact(lineage, "template")
    assert validated.metadata.good == 24
    assert {c.check: c.rows for c in validated.metadata.checks if c.rows and c.check != "special_token_text"} == {
        "masked_turns": 24
    }
    found = prepared_rows(made)
    assert len(found) == 24
    for row in found:
        text, answer = chat.decode(row["input_ids"]), trained(chat, row)
        assert text.count("on day 0, number") == text.count("on day 1, number") == 1, "both answers are in the context"
        assert answer.count("<|eot_id|>") == 1
        assert "on day 1, number" in answer and "on day 0" not in answer


def exchanges(number: int, *flags: dict[str, Any]) -> dict[str, Any]:
    turns = []
    for i, flag in enumerate(flags):
        turns += [{"from": "human", "value": f"{number}, {i}?"}, {"from": "gpt", "value": f"No {number}.{i}.", **flag}]
    return {"conversations": turns}


def test_train_on_last_trains_the_last_answer_and_lists_rows_where_it_is_masked(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, left_out: Callable, chat: ChatFormat
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines([*(exchanges(i, {}, {"weight": 0}, {}) for i in range(40)), exchanges(40, {}, {"weight": 0})])
    )
    found = {}
    for which in ("all", "last"):
        made = artifact(pipeline(small_recipe(dataset=str(path), train_on=which, holdout_share=0.4), "template"))
        found[which] = {row["row"]: trained(chat, row) for row in prepared_rows(made)}
        if which == "last":
            reason = "the last answer is masked, and train_on is last"
            assert left_out(made) == [{"row": 40, "reasons": [reason]}]
            assert (made.metadata.left_out, made.metadata.left_out_reasons) == (1, {reason: 1})
        else:
            assert left_out(made) == []
    assert found["all"] == {
        **{i: f"No {i}.0.<|eot_id|>No {i}.2.<|eot_id|>" for i in range(40)}, 40: "No 40.0.<|eot_id|>",
    }  # fmt: skip
    assert found["last"] == {i: f"No {i}.2.<|eot_id|>" for i in range(40)}


def test_flags_that_cannot_be_followed_refuse_the_row_by_turn_and_key(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    bad = [exchanges(40, {}, {"weight": 0.5}), exchanges(41, {"loss": False}, {"train": False})]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([*(exchanges(i, {}) for i in range(40)), *bad]))
    validated = artifact(pipeline(small_recipe(dataset=str(path), max_refused_share=0.1), "validate"))
    reasons = {row: entry["reasons"] for row, entry in listed(validated, "quarantine.jsonl").items()}
    assert reasons == {
        40: [
            "a turn's train, training, loss or weight cannot be followed",
            "turn 4: weight is 0.5; it can be true, false, 1 or 0",
        ],
        41: ["every answer is masked (train: false or weight: 0), so that there is nothing to learn"],
    }


def test_masks_survive_splitting_and_truncation(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, left_out: Callable, chat: ChatFormat
) -> None:
    long = exchanges(40, {"train": False}, *({} for _ in range(30)))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([*(exchanges(i, {}) for i in range(40)), long]))
    answers = [f"No 40.{i}.<|eot_id|>" for i in range(31)]
    for policy, which, expected in (
        ("split", "all", answers[1:]),
        ("split", "last", answers[-1:]),
        ("truncate", "last", []),
    ):
        recipe = small_recipe(dataset=str(path), on_too_long=policy, train_on=which)
        made = artifact(pipeline(recipe, "template"))
        pieces = sorted((row for row in prepared_rows(made) if row["row"] == 40), key=lambda row: row["input_ids"])
        text = "".join(trained(chat, piece) for piece in pieces)
        assert sorted(text.split("<|eot_id|>")) == sorted("".join(expected).split("<|eot_id|>"))
        reasons = [entry["reasons"] for entry in left_out(made)]
        assert reasons == ([] if expected else [["truncated to max_seq_length, before the first trained token"]])
        assert json.dumps(made.metadata.left_out_reasons) == json.dumps({reason: 1 for (reason,) in reasons})
