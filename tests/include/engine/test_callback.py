"""What the training's callback makes of losses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from include.engine.callback import TrainingCallback, TrainingLog
from include.errors import BadData
from include.recipe import validate_recipe


def ignore(line: str, *, training: bool = False, checkpoint: Path | None = None) -> None:
    """Take a line of progress."""


@pytest.mark.parametrize(
    ("step", "loss", "message"),
    [
        (1, 13.0, r"the loss is 13 at step 1, more than twice the loss of guessing .6.2.\. The base is damaged"),
        (1, float("nan"), r"the loss is nan at step 1\. The base is damaged, or chat_template does not fit it"),
        (9, 13.0, r"the loss is 13 at step 9, more than twice the loss of guessing .6.2.\. Lower learning_rate"),
        (9, float("inf"), r"the loss is inf at step 9.*Lower learning_rate"),
    ],
)
def test_a_loss_far_above_guessing_has_the_remedy_of_its_step(
    step: int, loss: float, message: str, tiny_base: Path, tmp_path: Path
) -> None:
    callback = TrainingCallback(tmp_path, validate_recipe({"name": "x"}, "x"), ignore, "cpu")
    callback.watch(AutoModelForCausalLM.from_pretrained(tiny_base), 1)  # of 512 tokens: guessing has the loss 6.2
    state = SimpleNamespace(global_step=step, num_input_tokens_seen=10, max_steps=20)
    with pytest.raises(BadData, match=message):
        callback.on_log(None, state, None, {"loss": loss, "learning_rate": 0.1})
    callback.on_log(None, state, None, {"loss": 7.0, "learning_rate": 0.1})


@pytest.mark.parametrize(
    ("losses", "first", "last"),
    [([3.0], 3, 3), ([4.0, 2.0, 1.0], 4, 1), ([4.0, 3.0, 2.0, 1.0], 3.5, 1.5), ([5.0] * 10 + [9.0] + [1.0] * 10, 5, 1)],
)
def test_the_first_and_the_last_losses_do_not_overlap(
    losses: list[float], first: float, last: float, tmp_path: Path
) -> None:
    log = TrainingLog(tmp_path / "log.jsonl")
    for step, loss in enumerate(losses, 1):
        log.add({"step": step, "loss": loss})
    assert log.first_and_last() == (first, last)
