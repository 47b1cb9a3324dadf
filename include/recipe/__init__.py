"""Recipes: one file describes one model. Fields by topic, rules across fields, loading, trigger form, sweep."""

from include.recipe.data import Data, dataset_ref, eval_ref
from include.recipe.evaluation import AnswerCheck, Gate, Prompt, SmokeTest, corrected_confidence
from include.recipe.form import form
from include.recipe.loading import find_recipe, load_all, load_recipe, parse_overrides, validate_recipe
from include.recipe.model import Model
from include.recipe.operations import Operations
from include.recipe.publishing import Publishing
from include.recipe.schema import NAME, TRAINING_INPUTS, Recipe
from include.recipe.training import ALL_LINEAR, MODULE_SETS, PROJECTIONS, Lora, Training
from include.recipe.view import AnyRecipe, RecipeView, recipe_to_json

__all__ = [
    "ALL_LINEAR",
    "MODULE_SETS",
    "NAME",
    "PROJECTIONS",
    "TRAINING_INPUTS",
    "AnswerCheck",
    "AnyRecipe",
    "Data",
    "Gate",
    "Lora",
    "Model",
    "Operations",
    "Prompt",
    "Publishing",
    "Recipe",
    "RecipeView",
    "SmokeTest",
    "Training",
    "corrected_confidence",
    "dataset_ref",
    "eval_ref",
    "find_recipe",
    "form",
    "load_all",
    "load_recipe",
    "parse_overrides",
    "recipe_to_json",
    "validate_recipe",
]
