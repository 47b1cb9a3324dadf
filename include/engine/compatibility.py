"""The layers of a base model, and whether it fits a recipe: by its config.json alone, before anything is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from include.errors import BadRecipe
from include.recipe import ALL_LINEAR, Recipe

HEAD_AND_EMBEDDINGS = ("embed_tokens", "lm_head")
# the layer that holds several of Llama's projections in one, as in Phi-3 and GLM-4
FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # fmt: skip


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
    model = empty_model(folder, name)
    if recipe.full_finetuning:
        return
    failures = []
    for candidate in recipe.candidates().values():
        try:
            _check_modules("target_modules", layers_to_adapt(candidate.target_modules, model), model)
            _check_modules("modules_to_save", candidate.modules_to_save, model)
            return  # a sweep goes on with the candidates that can train
        except BadRecipe as error:
            failures.append(error)
    raise failures[0]


def layers_to_adapt(target_modules: Iterable[str], model: Any) -> list[str]:
    """Return the names of the layers that entries of `target_modules` stand for, each once.

    `all-linear` stands for the linear layers between embeddings and head, and a projection of Llama for the layer that
    holds it where the base has only that (`FUSED`).
    """
    known, found = _names(adaptable_layers(model)), []
    for name in target_modules:
        if name == ALL_LINEAR:
            found += linear_names(model)
        else:
            found.append(FUSED[name] if name not in known and FUSED.get(name) in known else name)
    return list(dict.fromkeys(found))


def adaptable_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and module of each layer that can get an adapter: of the text model only, not of a vision tower."""
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    beside = other_towers(model)
    for path, module in model.named_modules():
        if isinstance(module, (Linear, Embedding, Conv1D)) and not (beside and re.fullmatch(beside, path)):
            yield path, module


def linear_names(model: Any) -> list[str]:
    """Return the names of the linear layers between embeddings and head, which `all-linear` stands for, sorted."""
    from torch.nn import Embedding

    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    return _names(
        (path, module)
        for path, module in adaptable_layers(model)
        if not isinstance(module, Embedding) and not any(module is o for o in outside)
    )


def other_towers(model: Any) -> str | None:
    """Return a regular expression for the paths of the modules beside text model and head, such as a vision tower; None
    if there are none. A projection there has the name of one in the text model, and no row trains it.
    """
    text, head = model.get_decoder(), model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is text), "")
    found = []
    while path:
        parent, _, name = path.rpartition(".")
        for sibling, module in model.get_submodule(parent).named_children():
            if sibling != name and module is not head and any(True for _ in module.parameters()):
                found.append(re.escape(f"{parent}.{sibling}".lstrip(".")))
        path = parent
    return rf"({'|'.join(sorted(found))})(\..*)?" if found else None


def _names(layers: Iterable[tuple[str, Any]]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, _ in layers})


def _names_with_weights(model: Any) -> list[str]:
    found = _names((path, module) for path, module in model.named_modules() if any(True for _ in module.parameters()))
    return [name for name in found if name and not name.isdigit()]


def _check_modules(field: str, wanted: list[str], model: Any) -> None:
    known = _names(adaptable_layers(model)) if field == "target_modules" else _names_with_weights(model)
    # a name may be a path's end: `self_attn.q_proj`
    unknown = [name for name in wanted if name.rpartition(".")[2] not in known]
    if not unknown:
        return
    choices = known
    if field == "target_modules":
        choices = [f"{ALL_LINEAR} (here: {', '.join(linear_names(model))})", *known]
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


def empty_model(folder: Path, name: str) -> Any:
    """Return the base's model without memory for its weights.

    Args:
        folder: has the base's config.json; needs no weights.
        name: of the base, for messages.

    Raises:
        BadRecipe: transformers does not know it, or it needs code of its own.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = orjson.loads((folder / "config.json").read_bytes())
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
