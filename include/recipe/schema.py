"""The recipe: one file describes one model.

The checks of a recipe file, the checks of values given at trigger time, the trigger form and docs/recipe.md all come
from `Recipe`. A field that is passed to a library has the library's name. The defaults are those of the reference
recipe: Unsloth's "Llama-3.2 (1B and 3B) Conversational" notebook.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from include.data.expectations import DATA_CHECKS
from include.recipe.data import Data
from include.recipe.evaluation import Gate, SmokeTest, corrected_confidence
from include.recipe.fields import RecipeFields
from include.recipe.model import Model
from include.recipe.operations import Operations
from include.recipe.publishing import Publishing
from include.recipe.rules import check_rules
from include.recipe.training import MODULE_SETS, Lora, Training

# by old name of a field: its new name, for the error message
RENAMED = {"device_memory_gb": "device_memory_gib", "gate_questions_matter": "gate_prompt_control"}
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"  # valid for Airflow, file systems and the Hub


class Recipe(RecipeFields):
    """One model: its data, its base model, its adapter, and how it is trained, tested and published."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(description="Name of the recipe and of its DAG: the name of its file without the extension.")
    description: str = Field("", description="One sentence about the recipe, shown on the page of its DAG.")

    @field_validator("check_limits")
    @classmethod
    def _known_checks(cls, limits: dict[str, float]) -> dict[str, float]:
        if unknown := set(limits) - set(DATA_CHECKS):
            raise ValueError(f"there is no data check '{unknown.pop()}' (there are: {', '.join(DATA_CHECKS)})")
        return limits

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not re.search(NAME, name):
            raise ValueError(
                "not a name: use up to 100 letters, digits, '_', '.' or '-', and begin with a letter or digit"
            )
        return name

    @model_validator(mode="after")
    def _follows_rules(self) -> Recipe:
        check_rules(self)
        if self.sweep:
            try:
                self.candidates()
            except ValidationError as error:
                raise ValueError("sweep: " + "; ".join(describe_error(e) for e in error.errors())) from None
        return self

    def candidates(self) -> dict[str, Recipe]:
        """Return one recipe without a sweep for each combination of the sweep's values, by a label of these values.

        Each has the corrected `gate_confidence` (see `corrected_confidence`).

        Raises:
            ValidationError: a value is wrong for its field.
        """
        combinations = list(itertools.product(*self.sweep.values()))
        confidence = corrected_confidence(self.gate_confidence, len(combinations))
        own = self.model_dump(mode="json") | {"sweep": {}, "gate_confidence": confidence}
        recipes = [Recipe.model_validate(own | dict(zip(self.sweep, values, strict=True))) for values in combinations]
        return {
            " ".join(f"{name}={_short(getattr(recipe, name))}" for name in self.sweep) or "as written": recipe
            for recipe in recipes
        }

    @property
    def training_inputs(self) -> dict[str, Any]:
        """Return all fields that influence the model, as plain JSON values; that is, all except `Operations`."""
        return self.subset(TRAINING_INPUTS)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return self.model_dump(mode="json")

    def subset(self, fields: Iterable[str]) -> dict[str, Any]:
        """Return the named fields as plain JSON values."""
        return self.model_dump(mode="json", include=set(fields))


TRAINING_INPUTS = tuple(name for name in Recipe.model_fields if name not in Operations.model_fields)
SECTIONS: dict[str, type[BaseModel]] = {
    "Data": Data,
    "Model": Model,
    "LoRA": Lora,
    "Training": Training,
    "Smoke test": SmokeTest,
    "Gate": Gate,
    "Publishing": Publishing,
}


def describe_error(error: Any) -> str:
    """Describe one of pydantic's errors in a sentence that names the field."""
    field = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        if field in RENAMED:
            return f"unknown field '{field}': it is named '{RENAMED[field]}' now"
        near = next(iter(get_close_matches(field, Recipe.model_fields, n=1)), None)
        return f"unknown field '{field}'" + (f" (did you mean '{near}'?)" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{message}" if field == "recipe" else f"field '{field}': {message}, got {error['input']!r}"


def _short(value: Any) -> str:
    """Return a field's value for the label of a candidate; a known set of projections by its name."""
    names = [name for name, modules in MODULE_SETS.items() if modules == value]
    if isinstance(value, list):
        return names[0] if names else "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
