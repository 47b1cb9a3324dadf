"""Preference rows: how they are read and judged, their tokens, and training by DPO through the whole line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from include.chat.tokenized import load_rows
from include.data.sharegpt import parse_row
from include.errors import BadData


def human(said: str) -> dict[str, str]:
    return {"from": "human", "value": said}


def gpt(said: str) -> dict[str, str]:
    return {"from": "gpt", "value": said}


def user(said: str) -> dict[str, str]:
    return {"role": "user", "content": said}


def assistant(said: str) -> dict[str, str]:
    return {"role": "assistant", "content": said}


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"conversations": [human(question)], "chosen": gpt(chosen), "rejected": gpt(rejected)}


GOOD = [pair(f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}.", f"Well, who knows {i}?") for i in range(60)]


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[[list[Any]], str]:
    """Writes rows as jsonl; returns the path."""

    def write(rows: list[Any]) -> str:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize(
    "row",
    [
        pair("Q?", "yes", "no"),
        {"prompt": "Q?", "chosen": "yes", "rejected": "no"},
        {"prompt": [user("Q?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"prompt": "Q?", "chosen": [user("Q?"), assistant("yes")], "rejected": [user("Q?"), assistant("no")]},
        {"chosen": [human("Q?"), gpt("yes")], "rejected": [human("Q?"), gpt("no")]},
        {"instruction": "Q?", "input": "", "chosen": "yes", "rejected": "no"},
    ],
)
def test_every_form_of_a_preference_row_is_read_alike(row: dict[str, Any]) -> None:
    reading = parse_row(json.dumps(row).encode(), pairs=True)
    assert not any(reading.faults.values())
    said = reading.conversation
    assert (said.roles, said.contents, said.rejected) == (("user", "assistant"), ["Q?", "yes"], "no")


BAD = [
    (pair("Q?", "yes", "yes"), "the chosen and the rejected answer are the same"),
    (pair("Q?", "yes", " "), "a turn's text is empty"),
    (pair("Q?", "", "no"), "a turn's text is empty"),
    ({"prompt": "Q?", "chosen": "yes", "rejected": 3}, "a turn's value is missing or is not a text"),
    ({"prompt": "Q?", "chosen": "yes"}, "the row cannot be read as a conversation"),
    ({"chosen": "yes", "rejected": "no"}, "the row cannot be read as a conversation"),
    (
        {"prompt": "Q?", "chosen": [assistant("yes"), user("So?"), assistant("so")], "rejected": "no"},
        "chosen and rejected are not one answer each to the same prompt",
    ),
    (
        {"chosen": [user("Q?"), assistant("yes")], "rejected": [user("R?"), assistant("no")]},
        "no prompt (it has: chosen, rejected)",
    ),
    ({**pair("Q?", "yes", "no"), "rejected": human("no")}, "the last turn is not the assistant's"),
]


def test_bad_pairs_are_refused_with_their_reasons(
    write_pairs: Callable, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    dataset = write_pairs([*GOOD, *(row for row, _ in BAD)])
    recipe = small_recipe(method="dpo", dataset=dataset, max_refused_share=0.2)
    validated = artifact(pipeline(recipe, "validate"))
    assert (validated.metadata.good, validated.metadata.refused) == (len(GOOD), len(BAD))
    quarantine = (validated.local() / "quarantine.jsonl").read_text().splitlines()
    reasons = {entry["row"]: entry["reasons"] for entry in map(json.loads, quarantine)}
    for number, (row, reason) in enumerate(BAD, len(GOOD)):
        assert reason in reasons[number], row


def test_pairs_are_recognized_where_conversations_are_expected(
    write_pairs: Callable, small_recipe: Callable, pipeline: Callable
) -> None:
    dataset = write_pairs([{"prompt": "Q?", "chosen": "yes", "rejected": "no"}])
    with pytest.raises(BadData, match="the rows look like preference pairs: set method: dpo"):
        pipeline(small_recipe(dataset=dataset), "validate")


def test_dpo_trains_on_the_templates_tokens_and_its_loss_is_the_papers(
    write_pairs: Callable, small_recipe: Callable, pipeline: Callable, artifact: Callable, tiny_base: Path
) -> None:
    recipe = small_recipe(
        method="dpo", dataset=write_pairs(GOOD), max_steps=20, learning_rate=2e-3, beta=0.2, load_in_4bit=False
    )
    lineage = pipeline(recipe)
    prepared = artifact(lineage, "template").local()
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    for file in (prepared / "tokenizer").iterdir():
        published = Path(artifact(lineage, "publish").metadata.place) / file.name
        assert published.read_bytes() == file.read_bytes(), "the tokenizer that made the training's ids"
    rows = load_rows(prepared / "holdout")
    for row in rows:
        question, chosen, rejected = (GOOD[row["row"]][name] for name in ("conversations", "chosen", "rejected"))
        prompt = [user(question[0]["value"])]
        opened = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(row["prompt_ids"]) == tokenizer.decode(opened)
        for name, answer in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            whole = tokenizer.apply_chat_template([*prompt, assistant(answer["value"])], return_dict=False)
            assert row["prompt_ids"] + row[name] == whole

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), artifact(lineage, "train").local() / "adapter"
    )

    def likelihood(row: dict[str, Any], answer: str) -> float:
        ids = torch.tensor([row["prompt_ids"] + row[answer]])
        scores = adapted(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return float(scores[len(row["prompt_ids"]) - 1 :].sum())

    def margin(row: dict[str, Any]) -> float:
        return likelihood(row, "chosen_ids") - likelihood(row, "rejected_ids")

    measured = json.loads((artifact(lineage, "evaluate").local() / "losses.json").read_text())["losses"]
    assert measured["base"] == pytest.approx([math.log(2)] * len(rows))
    with torch.inference_mode():
        for row, loss in zip(rows, measured["candidate"], strict=True):
            with adapted.disable_adapter():
                reference = margin(row)
            assert loss == pytest.approx(math.log1p(math.exp(-0.2 * (margin(row) - reference))), abs=2e-4)
    log = [json.loads(line) for line in (artifact(lineage, "train").local() / "training_log.jsonl").open()]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "no step has been made before the first"
    assert log[-1]["loss"] < 0.5
    assert artifact(lineage, "evaluate").metadata.verdict.publish
    assert artifact(lineage, "verify").metadata.largest_difference == 0
