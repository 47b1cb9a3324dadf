"""Rules across the fields of a recipe: combinations of values that cannot work together."""

from __future__ import annotations

import math

from include.recipe.data import Data
from include.recipe.fields import RecipeFields
from include.recipe.training import MOST_CANDIDATES, Lora, Training

SWEEP_FIELDS = [name for name in (*Lora.model_fields, *Training.model_fields) if name not in ("sweep", "method")]


def check_rules(recipe: RecipeFields) -> None:
    """Check the fields of a recipe together; each of them is valid alone.

    Raises:
        ValueError: names the fields of the first broken rule, and how to change them.
    """
    if recipe.max_steps == 0:
        raise ValueError("max_steps is 0: give a number of steps, or -1 to train num_train_epochs")
    if recipe.load_in_4bit and recipe.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both true: set one of them to false")
    if recipe.full_finetuning and (recipe.load_in_4bit or recipe.load_in_8bit):
        raise ValueError("full_finetuning needs a base in 16 bits: set load_in_4bit and load_in_8bit to false")
    if recipe.full_finetuning and recipe.merged_16bit:
        raise ValueError("full_finetuning publishes a whole model already: set merged_16bit to false")
    if recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps % recipe.num_processes:
        raise ValueError(
            f"num_processes is {recipe.num_processes}: per_device_train_batch_size x gradient_accumulation_steps is "
            "not a multiple of it"
        )
    if recipe.method == "dpo" and (recipe.packing or recipe.on_too_long != "drop"):
        raise ValueError("method is dpo: its pairs cannot be packed, and on_too_long must be drop")
    if recipe.engine == "unsloth" and (recipe.method == "dpo" or recipe.full_finetuning or recipe.num_processes > 1):
        raise ValueError("engine is unsloth, which trains only an adapter, by sft, on one GPU: set engine to auto")
    layers = sorted({"embed_tokens", "lm_head"} & {*recipe.target_modules, *recipe.modules_to_save})
    if recipe.missing_special_tokens == "add" and layers and not recipe.full_finetuning:
        raise ValueError(
            "missing_special_tokens is add, which trains the rows of the new tokens alone: leave "
            f"{' and '.join(layers)} out of target_modules and modules_to_save"
        )
    _check_evaluation(recipe)
    _check_sweep(recipe)


def _check_evaluation(recipe: RecipeFields) -> None:
    if recipe.eval_revision and not recipe.eval_dataset:
        raise ValueError("eval_revision is a revision of eval_dataset, which is empty: set it, or use dataset_revision")
    own = Data.model_fields["holdout_share"].default
    if (recipe.eval_dataset or recipe.eval_split) and recipe.holdout_share not in (0, own):
        raise ValueError(
            "holdout_share is set together with eval_dataset or eval_split, whose rows are the holdout: leave out one"
        )


def _check_sweep(recipe: RecipeFields) -> None:
    if unknown := set(recipe.sweep) - set(SWEEP_FIELDS):
        raise ValueError(
            f"sweep: '{unknown.pop()}' is not a field of LoRA or Training (there are: {', '.join(SWEEP_FIELDS)})"
        )
    if (count := math.prod(map(len, recipe.sweep.values()))) > MOST_CANDIDATES:
        raise ValueError(f"sweep has {count} combinations, the maximum is {MOST_CANDIDATES}")
