"""Load models: a base with a new adapter for training, and trained adapters as their users load them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from include.engine.compatibility import layers_to_adapt, other_towers
from include.engine.cpu_linear import packed_for_cpu
from include.engine.dequantize import dequantize, fits_dense
from include.engine.device_plan import Device, Plan
from include.engine.new_tokens import make_room, tokens_of_adapter, trainable_rows
from include.errors import BadRecipe, NotFound
from include.recipe import Recipe


def weight_bits(recipe: Recipe) -> int:
    """Return the bits of the base's weights that the recipe asks for: 4, 8 or 16."""
    return 4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else 16


def load_base(base: Path, device: Device, bits: int = 16, dtype: str | None = None) -> Any:
    """Return a model with transformers: in 4 bits (nf4, double quantization), in 8, or not quantized.

    Args:
        base: folder with config.json and safetensors.
        bits: 4, 8, or 16 for weights that are not quantized.
        dtype: of weights that are not quantized, if it is not the device's.

    Raises:
        NotFound: transformers can load no model from the folder, or some of its weights are not there.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.quantization_config import Mxfp4Config

    compute = getattr(torch, device.dtype)
    quantization: Any = None
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    elif bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif _stored_as(base) == "mxfp4":  # gpt-oss: its kernels for 4 bits have no backward pass
        quantization = Mxfp4Config(dequantize=True)
    automatic: Any = AutoModelForCausalLM
    try:
        model, loaded = automatic.from_pretrained(
            base, quantization_config=quantization, dtype=dtype or compute, use_safetensors=True,
            device_map={"": torch.cuda.current_device() if device.device == "cuda" else device.device},
            output_loading_info=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:300]
        raise NotFound(
            f"field 'base_model': {base} cannot be loaded: {problem}", "Check the model's files, or fetch them again"
        ) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
        raise NotFound(
            f"field 'base_model': {base} lacks {len(missing)} weights, for example {missing[0]}",
            "Fetch all files of the model again",
        )
    for module in model.modules() if device.device == "cpu" else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks weights for a bfloat16 kernel once a layer runs in eval mode: it rounds
            # differently from training, has no gradient afterwards, and needs widths that are multiples of 32.
            module.support_avx512bf16_for_cpu = False
    return model


def _stored_as(base: Path) -> str | None:
    """Return the method by which the base's weights are quantized, or None."""
    config = base / "config.json"
    stored = orjson.loads(config.read_bytes()).get("quantization_config") if config.exists() else None
    return (stored or {}).get("quant_method")


def load_trainable(base: Path, recipe: Recipe, plan: Plan) -> Any:
    """Return the model to train: the base with a new LoRA adapter, or the whole model in 32 bits.

    Raises:
        NotFound: see `load_base`.
        BadRecipe: the base has none of the `target_modules`, or Unsloth leaves out one of them.
    """
    if recipe.full_finetuning:
        model = load_base(base, plan, dtype="float32")  # in 16 bits small updates would be lost
        make_room(model, plan.new_tokens)
        return model
    lora: dict[str, Any] = {
        "r": recipe.r,
        "lora_alpha": recipe.lora_alpha,
        "lora_dropout": recipe.lora_dropout,
        "bias": recipe.bias,
        "use_rslora": recipe.use_rslora,
    }
    if plan.engine == "unsloth":
        import torch
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(base), max_seq_length=recipe.max_seq_length, dtype=getattr(torch, plan.dtype),
            load_in_4bit=recipe.load_in_4bit, load_in_8bit=recipe.load_in_8bit,
        )  # fmt: skip
    else:
        model = load_base(base, plan, weight_bits(recipe))
        make_room(model, plan.new_tokens)
        if plan.dense:
            dequantize(model)
    lora["target_modules"] = layers_to_adapt(recipe.target_modules, model)
    if towers := other_towers(model):
        lora["exclude_modules"] = towers
    try:
        if plan.engine == "unsloth":
            adapted: Any = FastLanguageModel.get_peft_model(
                model, **lora, use_gradient_checkpointing=plan.gradient_checkpointing, random_state=recipe.seed
            )
            _check_adapted(adapted, lora["target_modules"])
            return adapted
        from peft import LoraConfig, get_peft_model

        whole, rows = recipe.modules_to_save or None, trainable_rows(model, plan.new_tokens)
        config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=whole, trainable_token_indices=rows, **lora)
        adapted = get_peft_model(model, config)
        if rows:  # PEFT would save the enlarged embeddings with each checkpoint
            adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
        return adapted
    except ValueError as error:
        raise BadRecipe(f"field 'target_modules': {error}", "Name projections that the base model has") from error


def _check_adapted(model: Any, wanted: list[str]) -> None:
    """Check that the named layers got an adapter and no others: Unsloth leaves some out and adds some without a word.

    Raises:
        BadRecipe: the layers differ.
    """
    paths = [f".{path}" for path, module in model.named_modules() if getattr(module, "lora_A", None)]
    left_out = [name for name in wanted if not any(path.endswith(f".{name}") for path in paths)]
    added = sorted(path for path in paths if not path.endswith(tuple(f".{name}" for name in wanted)))
    if left_out or added:
        differences = [*(f"none to {name}" for name in left_out), *(f"one to {path[1:]}" for path in added[:1])]
        raise BadRecipe(
            f"field 'engine': Unsloth gives other layers of this base an adapter than target_modules names: "
            f"{', '.join(differences)}",
            "Set engine: transformers",
        )


def load_adapter(model: Any, folder: Path) -> Any:
    """Return the base with a saved adapter, as a user of the published adapter loads it.

    Raises:
        NotFound: the folder holds no adapter that fits the base.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:300]
        raise NotFound(f"the adapter in {folder} cannot be loaded: {problem}", "Train it again") from error


def variants(
    base: Path, trained: Mapping[str, Path], device: Device, bits: int, new_tokens: Collection[int] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield the base, then each adapter or whole model trained on it; use each before the next one is asked for.

    4-bit weights are dequantized once where memory allows. On a CPU this changes nothing in what is computed; on a GPU
    bitsandbytes computes a single token with a kernel of its own, which rounds otherwise. No gradients.

    Args:
        trained: folders by name, each with an adapter or with a whole model.
        bits: see `load_base`.
        new_tokens: ids in the sequences that the base may lack; it gets the mean embedding for them.

    Yields:
        `base` or the name, and the model in evaluation mode.

    Raises:
        NotFound: a folder holds nothing that fits the base.
    """
    ids = {*new_tokens, *(id for folder in trained.values() for id in tokens_of_adapter(folder))}

    def load(folder: Path, lacking: Collection[int]) -> Any:
        loaded = load_base(folder, device, bits).eval()
        make_room(loaded, lacking)
        if bits == 4 and fits_dense(loaded):
            dequantize(loaded)
        return loaded

    model = load(base, ids)
    with packed_for_cpu(model):
        yield "base", model
    for name, folder in trained.items():
        if (folder / "adapter_config.json").is_file():
            adapted = load_adapter(model, folder)
            with packed_for_cpu(adapted):
                yield name, adapted.eval()
            whole = adapted.peft_config["default"].modules_to_save
            model = adapted.unload()
            if whole:  # PEFT leaves the trained layers in the base
                del adapted, model
                model = load(base, ids)
        else:
            own = load_base(folder, device, bits).eval()
            make_room(own, {id for id in ids if id >= own.get_input_embeddings().weight.shape[0]})
            with packed_for_cpu(own):
                yield name, own
