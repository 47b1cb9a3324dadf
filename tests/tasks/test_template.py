"""The stage `template`: a base whose tokenizer has a fault is refused, and a pair has one prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.errors import BadRecipe
from tests.conftest import conversation

GOOD = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(40)]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[list[Any]], str]:
    """Writes rows as jsonl; returns the path."""

    def write(rows: list[Any]) -> str:
        path = tmp_path / "faults.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def base_copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_answers_that_begin_with_a_line_break_do_not_change_the_prompt_of_their_pair(
    write_rows: Callable, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "Who knows?"} for i in range(60)]
    # the tokenizer would join the answer's line break with those of the header
    joined = [{"prompt": f"And {i}?", "chosen": f"\nIt is {i}.", "rejected": "Who knows?"} for i in range(2)]
    made = artifact(pipeline(small_recipe(method="dpo", dataset=write_rows([*pairs, *joined])), "template"))
    assert not [check for check in made.metadata.checks if check.rows]
    assert made.metadata.train.rows + made.metadata.holdout.rows == 62


def test_a_tokenizer_with_other_ids_for_a_whole_text_stops_the_run(
    base_copy: Path, small_recipe: Callable, pipeline: Callable
) -> None:
    file = base_copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    for token in tokenizer["added_tokens"]:
        token["single_word"] = token["content"] == "<|start_header_id|>"  # a text right behind it makes it a text, too
    file.write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(BadRecipe, match="the ids of llama-3.1 differ from the tokenizer's own"):
        pipeline(small_recipe(base_model=str(base_copy)), "template")
