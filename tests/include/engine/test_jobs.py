"""Jobs and results: the same on both sides of the process boundary, with the recipe's declared fields only."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from include.engine.__main__ import MODULES
from include.engine.device_plan import Device
from include.engine.jobs import JOBS, LogitsJob, LogitsResult, LossesJob, LossesResult, MergeJob, TrainJob
from include.errors import UndeclaredField
from include.recipe import RecipeView, recipe_to_json, validate_recipe

RECIPE = validate_recipe({"name": "x", "training_arguments": {"lr_scheduler_kwargs": {"num_cycles": 2}}}, "x")
FOLDERS = {
    "base": Path("/base"),
    "tokenizer": Path("/tokenizer"),
    "rows": [Path("/rows")],
    "holdout": [Path("/holdout")],
}


def test_a_job_with_a_view_carries_its_fields_only() -> None:
    view = RecipeView.of(RECIPE, ("method", "beta"), "evaluate")
    job = LossesJob(recipe=view, base=Path("/base"), rows=[Path("/rows")], max_rows=3, adapters={"live": Path("/live")})
    content = job.to_json()
    assert set(json.loads(content)["recipe"]) == {"method", "beta"}
    received = LossesJob.from_json(content)
    assert (received.recipe.beta, received.adapters) == (0.1, {"live": Path("/live")})
    with pytest.raises(UndeclaredField, match="the engine reads the recipe field 'seed'"):
        _ = received.recipe.seed


def test_a_job_with_a_full_recipe_carries_all_fields() -> None:
    job = TrainJob(recipe=RECIPE, base_name="b", base_revision=None, out=Path("/out"), run_name="x", **FOLDERS)
    received = TrainJob.from_json(job.to_json())
    assert recipe_to_json(received.recipe) == RECIPE.model_dump(mode="json")
    assert (received.base, received.micro_batch, received.base_revision) == (Path("/base"), None, None)


def test_a_result_is_the_same_after_json_also_when_a_number_is_not_finite() -> None:
    logits = LogitsJob(recipe=RECIPE, base=Path(), tested=Path(), published=Path(), prompts=[[1]])
    received = logits.result_from_json(
        logits.result_to_json(LogitsResult(largest_difference=math.nan, same_tokens=False))
    )
    assert math.isnan(received.largest_difference)
    losses = LossesJob(recipe=RECIPE, base=Path(), rows=[Path()], max_rows=1, adapters={})
    device = Device(device="cpu", device_name="a CPU", dtype="float32")
    result = LossesResult(row=[1], tokens=[2], losses={"base": [0.1]}, device=device)
    assert losses.result_from_json(losses.result_to_json(result)) == result


def test_a_job_of_wrong_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="adapters"):
        MergeJob(base=Path(), adapter=Path(), out=Path(), adapters=[])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="not a recipe"):
        LogitsJob(recipe=3, base=Path(), tested=Path(), published=Path(), prompts=[])  # type: ignore[arg-type]


def test_every_command_has_a_module() -> None:
    assert set(JOBS) == set(MODULES)
