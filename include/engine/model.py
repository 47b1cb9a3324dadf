"""Loading: a base with a new adapter, and what was trained, as its users will load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from include.engine.device_plan import Plan
from include.errors import BadRecipe, NotFound


def load_base(base: str | Path, recipe: dict[str, Any], plan: Plan, dtype: str | None = None) -> Any:
    """A model in 4 bits (nf4, double quantization) or 8 where the recipe says so.

    Args:
        base: folder with config.json and safetensors.
        recipe: the recipe's fields.
        dtype: of weights that are not quantized, where it is not the plan's.

    Raises:
        NotFound: the folder holds no model that transformers can load.
    """
    import torch

    compute = getattr(torch, plan.dtype)
    if plan.engine == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(base), max_seq_length=recipe["max_seq_length"], dtype=compute, load_in_4bit=recipe["load_in_4bit"],
            load_in_8bit=recipe["load_in_8bit"],
        )  # fmt: skip
        return model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if recipe["load_in_4bit"]:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    elif recipe["load_in_8bit"]:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=quantization, dtype=dtype or compute, use_safetensors=True,
            device_map={"": torch.cuda.current_device() if plan.device == "cuda" else plan.device},
        )  # fmt: skip
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise NotFound(f"field 'base_model': {base} cannot be loaded: {problem}", "Check the model's files") from error
    for module in model.modules() if plan.device == "cpu" else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks weights for a bfloat16 kernel once a layer runs in eval mode: it rounds
            # otherwise than training does, has no gradient afterwards, and refuses widths that are no multiple of 32.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def add_adapter(model: Any, recipe: dict[str, Any], plan: Plan) -> Any:
    """A new LoRA adapter on the recipe's projections.

    Raises:
        BadRecipe: the base has none of the `target_modules`.
    """
    settings: dict[str, Any] = {
        "r": recipe["r"],
        "lora_alpha": recipe["lora_alpha"],
        "lora_dropout": recipe["lora_dropout"],
        "target_modules": recipe["target_modules"],
        "bias": recipe["bias"],
        "use_rslora": recipe["use_rslora"],
    }
    try:
        if plan.engine == "unsloth":
            from unsloth import FastLanguageModel

            return FastLanguageModel.get_peft_model(
                model, **settings, use_gradient_checkpointing=plan.gradient_checkpointing, random_state=recipe["seed"]
            )
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        raise BadRecipe(f"field 'target_modules': {error}", "Name projections that the base model has") from error


def load_trainable(base: str, recipe: dict[str, Any], plan: Plan) -> Any:
    """What is to be trained: a pinned base with a new adapter, or the whole model in 32 bits.

    Raises:
        NotFound, BadRecipe: see `load_base` and `add_adapter`.
    """
    if recipe["full_finetuning"]:
        return load_base(base, recipe, plan, "float32")  # in 16 bits small updates would be lost
    return add_adapter(load_base(base, recipe, plan), recipe, plan)


def load_adapter(model: Any, folder: str | Path) -> Any:
    """The base with a saved adapter, as a user of the published adapter would load it.

    Raises:
        NotFound: the folder holds no adapter that fits the base.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise NotFound(f"the adapter in {folder} cannot be loaded: {problem}", "Train it again") from error


def variants(
    base: str | Path, trained: Mapping[str, str | Path], recipe: dict[str, Any], plan: Plan
) -> Iterator[tuple[str, Any]]:
    """The base and what was trained on it, one after the other, each ready to answer until the next one is asked for.

    Args:
        trained: folders by name, each with an adapter or with a whole model.

    Yields:
        `base` or the name, and the model.

    Raises:
        NotFound: a folder holds nothing that fits the base.
    """
    model = load_base(base, recipe, plan).eval()
    yield "base", model
    for name, folder in trained.items():
        if (Path(folder) / "adapter_config.json").is_file():
            adapted = load_adapter(model, folder)
            yield name, adapted.eval()
            model = adapted.unload()
        else:
            yield name, load_base(folder, recipe, plan).eval()
