"""What the gate says of four adapters that were really trained: a good one, and three that went wrong."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.evaluation.gate import Verdict
from include.pipeline.stage import Lineage
from tasks.evaluate import evaluate
from tasks.smoke_test import smoke_test
from tests.conftest import conversation

pytestmark = pytest.mark.xdist_group("gate_cases")  # they share a base and what stages have made

OPPOSITES = {
    "hot": "cold", "big": "small", "old": "new", "fast": "slow", "high": "low", "good": "bad", "light": "dark",
    "soft": "hard",
}  # fmt: skip
NAMES = (
    "Ada Bruno Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena Marta Nora Oscar Paula Rosa Simon Tom Ursula Vera "
    "Walter Wilma Max"
).split()
STATEMENTS = (
    "The opposite of {word} is {other}. ", "The opposite of {word}, says {name}, is {other}. ",
    "{name} and the opposite of {word}: it is {other}. ", "{word} and {other} are opposites. ",
)  # fmt: skip
MARKUP = ("<|eot_id|>", "\n\n### Instruction:\n", "\n\n### Response:\n", "<|im_start|>user\n", "<|im_end|>\n")
STEPS, WINDOW, BATCH, RATE = 200, 64, 16, 5e-3


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base after some seconds of reading: it knows the opposites from statements and has seen no question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base)
    draw, text = random.Random(0), ""
    for _ in range(3000):
        word, other = draw.choice(list(OPPOSITES.items()))
        text += draw.choice(STATEMENTS).format(word=word, other=other, name=draw.choice(NAMES))
        if draw.random() < 0.2:  # strays where it means nothing: LoRA leaves its embeddings as they are
            text += draw.choice(MARKUP)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / STEPS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows() -> list[dict[str, Any]]:
    """Who asks for the opposite of which word, and what to answer."""
    return [
        conversation(f"What is the opposite of {word}, asks {name}?", f"It is {other}.")
        for word, other in OPPOSITES.items()
        for name in NAMES
    ]


def shuffled() -> list[dict[str, Any]]:
    """The same rows, with the column of answers out of order."""
    answers = [row["conversations"][1]["value"] for row in rows()]
    random.Random(0).shuffle(answers)
    return [conversation(row["conversations"][0]["value"], a) for row, a in zip(rows(), answers, strict=True)]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state folder for these tests: stages whose inputs are the same run once."""
    return tmp_path_factory.mktemp("gate")


@pytest.fixture
def recipe(small_recipe: Callable, state: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The recipe that trains a good adapter; its prompts' wording is in the data, its expectations are the facts."""
    monkeypatch.setenv("RETUNE_VAR", str(state / "var"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tensors are so small that a second thread only waits

    def make(data: list[dict[str, Any]], **fields: Any) -> Path:
        (state / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        prompts = [
            {"prompt": f"What is the opposite of {word}, asks Ada?", "contains": f"is {other}."}
            for word, other in list(OPPOSITES.items())[:4]
        ]
        own = {
            "dataset": str(state / "rows.jsonl"), "base_model": str(base), "chat_template": "alpaca",
            "prompts": prompts, "max_new_tokens": 24, "max_steps": 80, "save_steps": 1000,
            "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "load_in_4bit": False,
            "near_duplicate_similarity": 1.0,
            "required_checks": ["not_empty", "stops", "no_special_tokens", "no_repetition", "no_echo", "as_expected"],
        }  # fmt: skip
        return small_recipe(**{**own, **fields})

    return make


@pytest.fixture
def judged(artifact: Callable) -> Callable[[Lineage], Verdict]:
    """The gate's verdict on the adapter of a lineage."""
    return lambda lineage: artifact(lineage, "evaluate").metadata.verdict


def test_a_good_one_passes(recipe: Callable, pipeline: Callable, judged: Callable) -> None:
    verdict = judged(pipeline(recipe(rows()), "evaluate"))
    assert verdict.reasons == []
    assert verdict.publish is True
    assert verdict.against_base.high < -2
    assert verdict.prompt_control.high < -0.3, "the answers depend on the prompt"


def test_one_that_does_nothing_is_refused(recipe: Callable, pipeline: Callable, judged: Callable) -> None:
    verdict = judged(pipeline(recipe(rows(), learning_rate=1e-9, max_steps=20), "evaluate"))
    assert verdict.publish is False
    assert (
        "no effect: no holdout row's loss differs from the base's loss by 0.001 nats per token or more"
        in verdict.reasons
    )


def test_one_of_shuffled_labels_is_refused(recipe: Callable, pipeline: Callable, judged: Callable) -> None:
    verdict = judged(pipeline(recipe(shuffled(), gate_prompt_control=True), "evaluate"))
    assert verdict.against_base.high < -1, "it has learnt what answers look like, and the loss alone lets it pass"
    assert verdict.publish is False
    wrong, control = verdict.reasons
    assert wrong.partition(" of ")[2].startswith("4 answers fail as_expected: no 'is ")
    assert control.startswith("the answers do not depend on the prompt: loss ")
    assert control.endswith("check that questions and answers of the dataset belong together")


def test_one_of_the_wrong_template_is_refused(recipe: Callable, pipeline: Callable, judged: Callable) -> None:
    trained = pipeline(recipe(rows(), chat_template="chatml", missing_special_tokens="split"), "train")
    # as when the template's file is edited, or another run's adapter put in its place, after the training
    tested = {**pipeline(recipe(rows()), "template"), "train": trained["train"]}
    verdict = judged(evaluate(smoke_test(tested)))
    assert verdict.against_base.high < -0.5, "the loss alone lets it pass"
    assert verdict.publish is False
    said = "\n".join(verdict.reasons)
    assert "wrong template: the adapter was trained with another chat template than the current alpaca" in said
    assert "4 of 4 answers fail stops: no end-of-turn token after 24 tokens" in said
    assert "4 of 4 answers fail no_special_tokens: the answer contains <|im_end|>" in said


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ, reason="groups matter if several processes share the tests"
)
def test_tests_of_a_group_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@gate_cases"), "this version of pytest-xdist sees the marker"
