"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.engine.jobs import TrainJob


@pytest.fixture
def train_job(small_recipe: Callable, pipeline: Callable, artifact: Callable, tiny_base: Path) -> Callable[..., Any]:
    """Makes a train job on the tiny base; fields of the recipe by keyword."""

    def make(out: Path, **fields: Any) -> TrainJob:
        from include.recipe import find_recipe, load_recipe

        prepared = artifact(pipeline(small_recipe(**fields), "template")).local()
        return TrainJob(
            recipe=load_recipe(find_recipe("small")), base=tiny_base, base_name="owner/base", base_revision="abc",
            tokenizer=prepared / "tokenizer", rows=prepared / "train", holdout=prepared / "holdout", out=out,
            run_name="small",
        )  # fmt: skip

    return make
