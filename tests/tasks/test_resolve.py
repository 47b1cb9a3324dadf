"""resolve refuses a wrong value before anything is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from include.errors import BadRecipe


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
    ],
)
def test_a_wrong_value_is_refused_by_name(
    fields: dict[str, Any], message: str, small_recipe: Callable, pipeline: Callable
) -> None:
    recipe = small_recipe(dataset="/nowhere/rows.jsonl", **fields)
    with pytest.raises(BadRecipe, match=message):
        pipeline(recipe, "resolve")
