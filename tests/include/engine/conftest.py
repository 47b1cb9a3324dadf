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

        template = artifact(pipeline(small_recipe(**fields), "template"))
        return TrainJob(
            recipe=load_recipe(find_recipe("small")), base=tiny_base, base_name="owner/base", base_revision="abc",
            tokenizer=template.local() / "tokenizer", rows=template.files("train"), holdout=template.files("holdout"),
            out=out, run_name="small",
        )  # fmt: skip

    return make
