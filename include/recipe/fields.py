"""All fields of a recipe, by topic."""

from __future__ import annotations

from include.recipe.data import Data
from include.recipe.evaluation import Gate, SmokeTest
from include.recipe.model import Model
from include.recipe.operations import Operations
from include.recipe.publishing import Publishing
from include.recipe.training import Lora, Training


class RecipeFields(Data, Model, Lora, Training, SmokeTest, Gate, Publishing, Operations):
    """The fields of all topics, each checked alone; `include.recipe.rules` checks them together."""
