"""The stage `template`: a base whose tokenizer or template has a fault is refused, and each faulty row is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.errors import BadData, BadRecipe
from tests.conftest import conversation

GOOD = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(40)]

# Each order of roles has a fault of its own: with a system turn, the beginning of text is written twice; of two
# exchanges, the first answer ends with another token than the last one; of three, a line break that the loss does not
# count stands before the end of each answer.
FAULTY_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "{% if messages | length == 4 and loop.index == 2 %}<|end_of_text|>"
    "{% elif messages | length == 6 and m['role'] == 'assistant' %}{{ '\n' }}<|eot_id|>"
    "{% else %}<|eot_id|>{% endif %}{% endfor %}"
)


def exchanges(number: int, count: int) -> dict[str, Any]:
    """A ShareGPT row of several exchanges."""
    turns = [turn for i in range(count) for turn in conversation(f"{number}, {i}?", f"Yes, {i}.")["conversations"]]
    return {"conversations": turns}


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


def test_each_rule_of_the_token_contract_counts_the_rows_with_its_fault(
    base_copy: Path, write_rows: Callable, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    (base_copy / "chat_template.jinja").write_text(FAULTY_TEMPLATE)
    with_system = [
        {"conversations": [{"from": "system", "value": "Be brief."}, *row["conversations"]]}
        for row in (conversation(f"Brief {i}?", "Yes.") for i in range(3))
    ]
    rows = [*GOOD, *with_system, *(exchanges(i, 2) for i in range(5)), *(exchanges(i, 3) for i in range(7))]
    recipe = small_recipe(
        dataset=write_rows(rows),
        base_model=str(base_copy),
        chat_template="tokenizer",
        check_limits={"bos_errors": 1, "unended_turns": 1, "mask_errors": 1},  # otherwise the first rule ends the run
    )
    made = artifact(pipeline(recipe, "template"))
    assert made.metadata.verified_rows == len(rows), "the tokenizer's ids have the same faults"
    found = {check.check: check.rows for check in made.metadata.checks if check.rows}
    assert found == {"bos_errors": 3, "unended_turns": 5, "mask_errors": 7}


def test_preference_rows_whose_answers_share_a_token_with_the_header_are_counted(
    write_rows: Callable, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "Who knows?"} for i in range(60)]
    # the tokenizer encodes the header's line breaks otherwise where the answer begins with another one
    joined = [{"prompt": f"And {i}?", "chosen": f"\nIt is {i}.", "rejected": "Who knows?"} for i in range(2)]
    rows = write_rows([*pairs, *joined])
    made = artifact(pipeline(small_recipe(method="dpo", dataset=rows), "template"))
    assert {check.check: check.rows for check in made.metadata.checks if check.rows} == {"prompt_errors": 2}
    assert made.metadata.train.rows + made.metadata.holdout.rows == 62
    with pytest.raises(BadData, match="an answer shares a token with its header: .*2 rows, the first is row 60;"):
        pipeline(small_recipe(method="dpo", dataset=rows, check_limits={"prompt_errors": 0}), "template")


def test_a_tokenizer_with_other_ids_for_a_whole_text_stops_the_run(
    base_copy: Path, small_recipe: Callable, pipeline: Callable
) -> None:
    file = base_copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    for token in tokenizer["added_tokens"]:
        token["rstrip"] = token["content"] == "<|end_header_id|>"  # in a whole text, it takes the line breaks with it
    file.write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(BadRecipe, match="the ids of llama-3.1 differ from the tokenizer's own"):
        pipeline(small_recipe(base_model=str(base_copy)), "template")
