"""resolve refuses a wrong value before anything is downloaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.errors import BadRecipe
from include.paths import PROJECT
from include.pipeline.outcomes import record_outcome
from include.pipeline.stage import pinned_recipe
from include.storage.artifacts import Store
from tasks.resolve import resolve
from tests.services.hub import Hub


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"training_arguments": {"adam_bta1": 0.8}},
            "SFTConfig has no argument 'adam_bta1' .did you mean 'adam_beta1'",
        ),
        ({"training_arguments": {"max_grad_norm": "high"}}, "'max_grad_norm': .*number"),
        ({"generation_arguments": {"min_new_token": 3}}, "has no argument 'min_new_token' .did you mean"),
        ({"timeout_hours": {"trian": 1}}, "field 'timeout_hours': there is no stage 'trian'"),
        (
            {"target_modules": ["w_proj"]},
            "field 'target_modules': the base has no layer w_proj .*Choose from: all-linear",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(
    fields: dict[str, Any], message: str, small_recipe: Callable, pipeline: Callable
) -> None:
    recipe = small_recipe(**fields)
    with pytest.raises(BadRecipe, match=message):
        pipeline(recipe, "resolve")


def test_a_base_that_is_an_adapter_is_refused_with_its_base(
    small_recipe: Callable, pipeline: Callable, tiny_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/whole"}')
    message = r"base is an adapter .adapter_config.json., not a whole model. Name its base owner/whole as base_model"
    with pytest.raises(BadRecipe, match=message):
        pipeline(small_recipe(base_model=str(base)), "resolve")


def test_a_merge_of_a_base_stored_in_4_bits_is_refused_before_anything_runs(
    small_recipe: Callable, pipeline: Callable, material: Path
) -> None:
    base = material / "cases" / "26-merge-of-a-4bit-base" / "s_bnb4"
    with pytest.raises(BadRecipe, match="are stored in 4 bits, which excludes merged_16bit"):
        pipeline(small_recipe(base_model=str(base), merged_16bit=True), "resolve")
    pipeline(small_recipe(base_model=str(base)), "resolve")


def test_a_base_on_the_hub_is_checked_by_its_config(
    small_recipe: Callable, pipeline: Callable, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": (tiny_base / "config.json").read_bytes(), "model.safetensors": b"never fetched"}
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.put("owner/base", files)
        pipeline(small_recipe(base_model="owner/base"), "resolve")
        with pytest.raises(BadRecipe, match="field 'target_modules': the base has no layer w_proj"):
            pipeline(small_recipe(base_model="owner/base", target_modules=["w_proj"]), "resolve")
        hub.put("owner/adapter", {**files, "adapter_config.json": b"{}"})
        with pytest.raises(BadRecipe, match="field 'base_model': owner/adapter is an adapter"):
            pipeline(small_recipe(base_model="owner/adapter"), "resolve")


def test_a_base_that_a_run_has_trained_is_not_checked_again_and_pytorch_not_loaded(small_recipe: Callable) -> None:
    small_recipe()
    pinned = pinned_recipe(Store(), resolve("small", {}, "first"))
    record_outcome(Store(), pinned, "refused", run="first", version=None, from_recipe_file=True)
    program = (
        "import sys; from tasks.resolve import resolve; resolve('small', {}, 'next'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    with pytest.raises(BadRecipe, match="the base has no layer w_proj"):
        resolve("small", {"target_modules": ["w_proj"]}, "other")
