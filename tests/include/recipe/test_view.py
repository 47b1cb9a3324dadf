"""A recipe view holds the declared fields only, here and after a trip through JSON."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from include.errors import UndeclaredField
from include.recipe import Recipe, RecipeView, recipe_to_json, validate_recipe


@pytest.fixture
def recipe() -> Recipe:
    return validate_recipe(
        {"name": "x", "target_modules": "minimal", "prompts": ["Hello?"], "learning_rate": 1e-3, "max_rows": None}, "x"
    )


def test_a_view_holds_the_declared_fields_and_refuses_the_others(recipe: Recipe) -> None:
    view = RecipeView.of(recipe, ("r", "max_rows"), "train")
    assert (view.r, view.max_rows) == (16, None)
    with pytest.raises(
        UndeclaredField, match="train reads the recipe field 'learning_rate', which its recipe_fields do not name"
    ):
        _ = view.learning_rate
    with pytest.raises(UndeclaredField):
        RecipeView.of(view, ("r", "seed"), "the engine")
    with pytest.raises(AttributeError, match="no attribute 'lerning_rate'"):
        _ = view.lerning_rate  # type: ignore[attr-defined]
    assert RecipeView.of(view, ("r",), "the engine").r == 16


@pytest.mark.parametrize("fields", [("prompts", "target_modules", "max_rows"), tuple(Recipe.model_fields)])
def test_a_view_is_the_same_after_json(recipe: Recipe, fields: tuple[str, ...]) -> None:
    view = RecipeView.of(recipe, fields, "smoke_test")
    content = recipe_to_json(view)
    assert set(content) == set(fields)
    again = RecipeView.from_json(json.loads(json.dumps(content)), "the engine")
    for name in fields:
        assert getattr(again, name) == getattr(recipe, name), name
    assert again.prompts[0].prompt == "Hello?"
    assert content == recipe.model_dump(mode="json", include=set(fields))
    assert recipe_to_json(recipe) == recipe.model_dump(mode="json")


def test_a_view_can_be_copied_and_pickled(recipe: Recipe) -> None:
    view = RecipeView.of(recipe, ("r",), "train")
    assert copy.deepcopy(view).r == pickle.loads(pickle.dumps(view)).r == 16
