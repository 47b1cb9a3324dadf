"""Check that a base model fits a recipe by its config.json alone, before anything is downloaded or trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import orjson

from include.errors import BadRecipe
from include.recipe import ALL_LINEAR, Recipe

HEAD_AND_EMBEDDINGS = ("embed_tokens", "lm_head")


def check_base(recipe: Recipe, folder: Path) -> None:
    """Check the base of a recipe.

    Args:
        folder: has the base's config.json; needs no weights.

    Raises:
        BadRecipe: transformers cannot load the base without code of the base's own, or does not know it; the base is
            quantized in a way that the settings exclude; or it has none of the layers that are to be trained.
    """
    name, config = recipe.base_model, orjson.loads((folder / "config.json").read_bytes())
    _check_quantization(recipe, config.get("quantization_config") or {})
    model = _empty_model(name, folder, config)
    if recipe.full_finetuning:
        return
    failures = []
    for candidate in recipe.candidates().values():
        try:
            adapted = [module for module in candidate.target_modules if module != ALL_LINEAR]
            _check_modules("target_modules", adapted, adaptable_names(model))
            _check_modules("modules_to_save", candidate.modules_to_save, _names_with_weights(model))
            return  # a sweep goes on with the candidates that can train
        except BadRecipe as error:
            failures.append(error)
    raise failures[0]


def adaptable_names(model: Any) -> list[str]:
    """Return the names of the layers that can get an adapter, the last part of each path, sorted."""
    return sorted({path.rpartition(".")[2] for path, module in model.named_modules() if _is_adaptable(module)})


def linear_names(model: Any) -> list[str]:
    """Return the names of the linear layers between embeddings and head, which `all-linear` stands for, sorted."""
    from torch.nn import Embedding

    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    return sorted(
        {
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if _is_adaptable(module) and not isinstance(module, Embedding) and not any(module is o for o in outside)
        }
    )


def _is_adaptable(module: Any) -> bool:
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (Linear, Embedding, Conv1D))


def _names_with_weights(model: Any) -> list[str]:
    found = {
        path.rpartition(".")[2] for path, module in model.named_modules() if any(True for _ in module.parameters())
    }
    return sorted(name for name in found if name and not name.isdigit())


def _check_modules(field: str, wanted: list[str], known: list[str]) -> None:
    # a name may be a path's end: `self_attn.q_proj`
    if unknown := [name for name in wanted if name.rpartition(".")[2] not in known]:
        choices = [ALL_LINEAR, *known] if field == "target_modules" else known
        raise BadRecipe(
            f"field '{field}': the base has no layer {', '.join(unknown)} that can be trained",
            f"Choose from: {', '.join(choices)}",
        )


def _check_quantization(recipe: Recipe, quantization: dict[str, Any]) -> None:
    if not quantization:
        return
    method = quantization.get("quant_method") or "an unknown method"
    bits = 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else None
    stored = f"{bits} bits" if method == "bitsandbytes" and bits else str(method)
    matching = f"load_in_{bits}bit" if method == "bitsandbytes" and bits else None
    wrong = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(recipe, name) and name != matching]
    if recipe.full_finetuning:
        wrong.append("full_finetuning")
    elif matching and not getattr(recipe, matching):
        wrong.append(f"{matching}: false")
    if recipe.merged_16bit:
        wrong.append("merged_16bit")
    if wrong:
        remedy = f"set {matching}: true and merged_16bit: false" if matching else f"set {wrong[0]} to false"
        raise BadRecipe(
            f"field 'base_model': the weights of {recipe.base_model} are stored in {stored}, which excludes "
            f"{', '.join(wrong)}",
            f"Choose the base with 16-bit weights (often the name without -bnb-{bits or 4}bit), or {remedy}",
        )


def _empty_model(name: str, folder: Path, config: dict[str, Any]) -> Any:
    """Return the base's model without memory for its weights.

    Raises:
        BadRecipe: transformers does not know it, or it needs code of its own.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, release = config.get("model_type"), f"transformers {transformers.__version__}"
    other = "Choose a base that is built into transformers"
    if kind not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise BadRecipe(
                f"field 'base_model': {name} needs code of its own (trust_remote_code), which is never run", other
            )
        known = f"{release} does not know the model_type {kind!r} of {name}" if kind else f"{name} has no model_type"
        raise BadRecipe(f"field 'base_model': {known} (config.json)", other)
    try:
        with warnings.catch_warnings(action="ignore"), torch.device("meta"):
            loaded = AutoConfig.from_pretrained(folder)
            # a quantized base has the same layers, and its kernels are not needed here
            if hasattr(loaded, "quantization_config"):
                del loaded.quantization_config
            return AutoModelForCausalLM.from_config(loaded)
    except Exception as error:  # of any class: each architecture reads its own entries
        problem = " ".join(str(error).split())[:300]
        raise BadRecipe(
            f"field 'base_model': {release} can make no language model from the config.json of {name}: {problem}",
            "Choose a model that generates text, or correct its config.json",
        ) from error
