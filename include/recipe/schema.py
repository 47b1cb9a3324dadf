"""The recipe: one file that describes one model.

`Recipe` is the single source of the checks on a recipe file, of the checks on what is typed at trigger time, of the
trigger form and of the documentation of every field. Field names are those of the libraries that consume them.
The defaults are the reference recipe's: Unsloth's "Llama-3.2 (1B and 3B) Conversational" notebook.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from include.data.expectations import DATA_CHECKS
from include.recipe.data import Data
from include.recipe.evaluation import Gate, SmokeTest
from include.recipe.model import Model
from include.recipe.operations import Operations
from include.recipe.publishing import Publishing
from include.recipe.training import MODULE_SETS, MOST_CANDIDATES, Lora, Training

RENAMED = {"device_memory_gb": "device_memory_gib"}  # old names of fields
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"  # what Airflow, file systems and the Hub all take


class Recipe(Data, Model, Lora, Training, SmokeTest, Gate, Publishing, Operations):
    """One model: its data, its base, its adapter, how it is trained, tested and published."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=NAME, description="Name of the recipe, of its file and of its DAG.")
    description: str = Field("", description="One sentence for the DAG's page.")

    @field_validator("check_limits")
    @classmethod
    def _known_checks(cls, limits: dict[str, float]) -> dict[str, float]:
        if unknown := set(limits) - set(DATA_CHECKS):
            raise ValueError(f"there is no check '{unknown.pop()}' (there are: {', '.join(DATA_CHECKS)})")
        return limits

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: give a number of steps, or -1 to train num_train_epochs")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true: set one of them to false")
        if self.full_finetuning and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("full_finetuning needs a base in 16 bits: set load_in_4bit and load_in_8bit to false")
        if self.full_finetuning and self.merged_16bit:
            raise ValueError("full_finetuning publishes a whole model already: set merged_16bit to false")
        if self.per_device_train_batch_size * self.gradient_accumulation_steps % self.num_processes:
            raise ValueError(
                f"num_processes is {self.num_processes}: per_device_train_batch_size x gradient_accumulation_steps is "
                "no multiple of it"
            )
        if self.method == "dpo" and (self.packing or self.on_too_long != "drop"):
            raise ValueError("method is dpo: its pairs cannot be packed, and on_too_long must be drop")
        if self.engine == "unsloth" and (self.method == "dpo" or self.full_finetuning or self.num_processes > 1):
            raise ValueError("engine is unsloth, which trains an adapter by sft on one GPU: set engine to auto")
        return self

    @model_validator(mode="after")
    def _sweeps(self) -> Recipe:
        known = [name for name in (*Lora.model_fields, *Training.model_fields) if name not in ("sweep", "method")]
        if unknown := set(self.sweep) - set(known):
            raise ValueError(
                f"sweep: '{unknown.pop()}' is no field of LoRA or Training (there are: {', '.join(known)})"
            )
        if (count := math.prod(map(len, self.sweep.values()))) > MOST_CANDIDATES:
            raise ValueError(f"sweep has {count} combinations, at most {MOST_CANDIDATES} are trained")
        if self.sweep:
            try:
                self.candidates()
            except ValidationError as error:
                raise ValueError("sweep: " + "; ".join(describe_error(e) for e in error.errors())) from None
        return self

    def candidates(self) -> dict[str, Recipe]:
        """The recipe once for each combination of the sweep's values, without a sweep, by what tells it apart.

        The best of many tries on the same holdout rows may be the best by luck. So each is judged at a confidence that
        keeps the chance that luck lets any of them through at what the recipe's gate_confidence allows (Bonferroni).

        Raises:
            ValidationError: a value is wrong for its field.
        """
        combinations = list(itertools.product(*self.sweep.values()))
        confidence = round(1 - (1 - self.gate_confidence) / len(combinations), 6)
        own = self.model_dump(mode="json") | {"sweep": {}, "gate_confidence": confidence}
        recipes = [Recipe.model_validate(own | dict(zip(self.sweep, values, strict=True))) for values in combinations]
        return {
            " ".join(f"{name}={_short(getattr(recipe, name))}" for name in self.sweep) or "as written": recipe
            for recipe in recipes
        }

    @property
    def training_inputs(self) -> dict[str, Any]:
        """Return every field that decides the model, as plain JSON values: all but those of `Operations`."""
        return self.subset(TRAINING_INPUTS)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return self.model_dump(mode="json")

    def subset(self, fields: Iterable[str]) -> dict[str, Any]:
        """The named fields as plain JSON values: what a stage's fingerprint depends on."""
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
    """A field's value for a candidate's label; a known set of projections by its name."""
    names = [name for name, modules in MODULE_SETS.items() if modules == value]
    if isinstance(value, list):
        return names[0] if names else "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
