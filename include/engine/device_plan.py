"""The device at hand, and how training uses it: engine, precision, micro-batch, memory."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from include.engine.compatibility import HEAD_AND_EMBEDDINGS, adaptable_layers, empty_model, layers_to_adapt
from include.engine.dequantize import available_host_memory
from include.engine.distributed import RANK, WORLD_SIZE, all_reduce_max
from include.errors import BadRecipe
from include.recipe import Recipe

PLAN = "plan.json"
CHUNK = 2048  # tokens whose logits the fast kernels hold at once
HEADROOM = 1.15  # free memory over predicted memory
# architectures (`model_type`) that Unsloth has trained on a GPU with the losses and about the memory of transformers
# (bench/architectures.json); of Gemma 3 it takes twice the memory, and gpt-oss gets an adapter that fits no other model
WITH_UNSLOTH = {"llama", "mistral", "qwen3", "phi3", "granite", "glm4", "smollm3"}


@dataclass(kw_only=True)
class Device:
    """A device to compute on.

    Attributes:
        device: `cuda` or `cpu`.
        device_name: for people.
        dtype: compute type, as torch names it.
    """

    device: str
    device_name: str
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, for the manifest."""
        return asdict(self)


@dataclass(kw_only=True)
class Plan(Device):
    """How training uses the device. The effective batch is the recipe's, whatever the plan.

    Attributes:
        engine: `unsloth` or `transformers`.
        processes: how many train together, each on a GPU of its own.
        micro_batch, accumulation: conversations per process and micro-step, and micro-steps per optimizer step; the
            product of the three is the recipe's.
        kernels: `fast` (`include.engine.kernels`) or `plain`.
        dense: whether 4-bit weights are dequantized once and not at each use.
        liger: whether Liger's kernels replace those of transformers.
        attention: how transformers computes it; `rows` is `include.engine.attention`.
        shrunk: whether the micro-batch is the largest that may be tried, after a larger one did not fit.
        new_tokens: ids of tokens whose embeddings are trained beside the adapter.
        predicted_bytes: device memory at the peak; 0 on a CPU, and where it is not known.
        notes: where the plan differs from the recipe, and why; for people.
    """

    engine: str
    optim: str
    gradient_checkpointing: bool | str
    micro_batch: int
    accumulation: int
    shrunk: bool = False
    processes: int = 1
    kernels: str = "plain"
    dense: bool = False
    liger: bool = False
    attention: str = "sdpa"
    new_tokens: list[int] = field(default_factory=list)
    predicted_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def find_device() -> Device:
    """Return this process's device: its own GPU, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        # bitsandbytes loads PyTorch's compiler when it is imported, for 1.6 s, and nothing uses it on a CPU
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        name = f"CPU, {os.cpu_count()} cores, {platform.machine()}"
        return Device(device="cpu", device_name=name, dtype="float32")
    if torch.cuda.device_count() > RANK:
        torch.cuda.set_device(RANK)
    dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return Device(device="cuda", device_name=torch.cuda.get_device_name(), dtype=dtype)


def make_plan(recipe: Recipe, base: Path, micro_batch: int | None = None, new_tokens: Collection[int] = ()) -> Plan:
    """Choose engine, precision and optimizer of a training on this process's device.

    Args:
        base: the base model's folder.
        micro_batch: the largest one that may be tried, after a larger one did not fit into memory.
        new_tokens: ids of tokens whose embeddings are trained.

    Raises:
        BadRecipe: this machine lacks something that the recipe asks for: a GPU or the package for Unsloth, a GPU for
            each process.
    """
    import torch

    largest = micro_batch or recipe.per_device_train_batch_size
    share = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps // WORLD_SIZE
    micro = max(n for n in range(1, min(largest, share) + 1) if share % n == 0)
    device = find_device()
    gpu = device.device == "cuda"
    if not gpu and recipe.engine == "unsloth":
        raise BadRecipe(
            "field 'engine': unsloth needs a GPU, and this machine shows none",
            "Run the gpu queue's worker on a machine with one, or set engine: auto",
        )
    if gpu and torch.cuda.device_count() < WORLD_SIZE:
        raise BadRecipe(
            f"field 'num_processes': {WORLD_SIZE} processes need as many GPUs, this machine shows "
            f"{torch.cuda.device_count()}",
            "Lower num_processes, or run the gpu queue's worker on a machine with more",
        )
    plan = Plan(
        **device.as_dict(),
        engine="transformers",
        optim=recipe.optim,
        gradient_checkpointing=gpu,
        micro_batch=micro,
        accumulation=share // micro,
        shrunk=bool(micro_batch),
        processes=WORLD_SIZE,
        new_tokens=list(new_tokens),
    )
    fast = recipe.kernels == "auto" and recipe.method == "sft" and "loss_type" not in recipe.training_arguments
    if not gpu:
        if plan.optim not in ("adamw_torch", "adafactor"):
            plan.notes.append(f"adamw_torch replaces {plan.optim}, which needs a GPU")
            plan.optim = "adamw_torch"
        return fast_kernels(plan) if fast else plan
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    fast = fast and plan.dtype == "bfloat16" and varlen
    several = fast and WORLD_SIZE > 1  # not measured with the fast kernels
    fast = fast and not several
    architecture = orjson.loads((base / "config.json").read_bytes()).get("model_type")
    plan.engine, plan.notes = _gpu_engine(recipe, architecture, fast, bool(new_tokens))
    if several:
        faster = "" if recipe.packing else "; for rows that are not packed, one GPU is faster (docs/benchmarks.md)"
        plan.notes.append(f"plain kernels on several GPUs{faster}")
    if plan.engine == "unsloth":
        return replace(plan, gradient_checkpointing="unsloth")
    return fast_kernels(plan) if fast else plain_kernels(plan, recipe)


def fast_kernels(plan: Plan) -> Plan:
    """Return a plan with the fast kernels; on a CPU that multiplies numbers of 16 bits, in them."""
    dtype = "bfloat16" if plan.device == "cpu" and _cpu_has_bfloat16() else plan.dtype
    return replace(plan, kernels="fast", attention="rows", dtype=dtype)


def plain_kernels(plan: Plan, recipe: Recipe, reason: str | None = None) -> Plan:
    """Return a plan with the kernels of transformers and Liger.

    Args:
        reason: why the fast ones are not used, for people.
    """
    notes = [*plan.notes, f"plain kernels: {reason}"] if reason else plan.notes
    plan = replace(plan, kernels="plain", dense=False, attention="sdpa", notes=notes)
    if plan.device == "cpu":
        return replace(plan, dtype="float32")
    # for DPO, TRL computes another way with Liger; it reads the head's own weights, without its adapter
    liger = recipe.method == "sft" and not trains_head(recipe, plan.new_tokens)
    plan.liger = liger and importlib.util.find_spec("liger_kernel") is not None
    varlen = importlib.util.find_spec("torch.nn.attention.varlen")
    if plan.dtype == "bfloat16" and recipe.packing and varlen:
        plan.attention = "rows"
    return plan


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU has instructions that multiply bfloat16; without them it is slower than float32."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"avx512_bf16", "amx_bf16"} & set(info.read_text().split()))


def fit(plan: Plan, recipe: Recipe, base: Path, lengths: Any, free: int) -> Plan:
    """Choose micro-batch, gradient checkpointing and dense weights so that the device is used and its memory suffices;
    the effective batch stays. On a CPU with plain kernels, return the plan unchanged.

    For an architecture whose memory is not known, the recipe's own
    micro-batch is used with checkpointing; after running out of memory, training goes on with a smaller one.

    Args:
        base: the base model's folder.
        lengths: tokens of each sequence.
        free: bytes of the device's memory.
    """
    gpu, fast = plan.device == "cuda", plan.kernels == "fast"
    if not recipe.fit_device or not (gpu or fast):
        return plan
    if recipe.device_memory_gib and gpu:
        free = min(free, int(recipe.device_memory_gib * 2**30))
    batch = plan.micro_batch * plan.accumulation
    largest = plan.micro_batch if plan.shrunk else batch
    checkpointed: bool | str = "unsloth" if plan.engine == "unsloth" else True
    model = empty_model(base, recipe.base_model)
    if reason := unusual_layers(model.config.get_text_config()):
        note = f"this base's memory is not predicted ({reason}); if it does not fit, a smaller micro-batch is tried"
        return replace(plan, gradient_checkpointing=gpu and checkpointed, notes=[*plan.notes, note])
    choices = [
        replace(
            plan, micro_batch=micro, accumulation=batch // micro, gradient_checkpointing=checkpointing, dense=dense
        )
        for micro in range(1, largest + 1)
        if batch % micro == 0
        for checkpointing in ((False, checkpointed) if gpu else (False,))
        for dense in ((False, True) if fast and recipe.load_in_4bit else (False,))
    ]  # fmt: skip
    for choice in choices:
        choice.predicted_bytes = predict_peak(model, recipe, choice, _most_tokens(choice, recipe, lengths))
    fitting = [choice for choice in choices if choice.predicted_bytes * HEADROOM <= free]
    usual = recipe.max_seq_length if recipe.packing else float(np.mean(lengths))
    best = max(fitting or [min(choices, key=lambda c: c.predicted_bytes)], key=lambda c: _speed(c, usual))
    used = f"{best.micro_batch} x {best.accumulation}"
    if gpu:
        used += f" {'with' if best.gradient_checkpointing else 'without'} gradient checkpointing"
    if best.dense:
        used += ", weights dequantized once"
    predicted = f"{best.predicted_bytes / 2**30:.1f} GiB predicted, {free / 2**30:.1f} GiB free"
    return replace(best, notes=[*best.notes, f"{used}: {predicted}"])


def _most_tokens(plan: Plan, recipe: Recipe, lengths: Any) -> int:
    """Return the tokens of the largest micro-batch that is to be expected, padding included.

    Joined rows are added up: of so many rows the sum is hardly ever more than three standard deviations above its mean.
    """
    sequences, longest = plan.micro_batch * (2 if recipe.method == "dpo" else 1), int(np.max(lengths))
    if recipe.packing:
        return sequences * recipe.max_seq_length
    if plan.kernels == "plain":
        return sequences * longest
    likely = sequences * np.mean(lengths) + 3 * np.std(lengths) * sequences**0.5
    return int(max(longest, min(sequences * longest, likely)))


def _speed(plan: Plan, usual: float) -> float:
    """Return a number that grows with the speed of a plan, for the same effective batch (fitted to bench/train.json).

    Args:
        usual: tokens of a sequence, in the mean.
    """
    if plan.kernels == "plain":  # the host launches kernels one by one, and that takes as long for a small micro-batch
        return plan.micro_batch * (1 if plan.gradient_checkpointing else 2)
    tokens = plan.micro_batch * usual
    return tokens / (tokens + 500) * (0.75 if plan.gradient_checkpointing else 1) * (1 if plan.dense else 0.9)


def free_memory(device: str) -> int:
    """Return the free bytes of this process's GPU, the fewest where several train together; on a CPU of the host."""
    import torch

    return -all_reduce_max(-torch.cuda.mem_get_info()[0], device) if device == "cuda" else available_host_memory()


def unusual_layers(config: Any) -> str | None:
    """Return the layers of a text model for which `predict_peak` does not hold, or None if there are none.

    Args:
        config: the text model's, of transformers.
    """
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return "mixture of experts"
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if others or not getattr(config, "intermediate_size", None):
        return f"layers of other kinds than attention: {', '.join(sorted(others)) or config.model_type}"
    return None


def predict_peak(model: Any, recipe: Recipe, plan: Plan, tokens: int) -> int:
    """Return the bytes of device memory at the peak of a training step, for layers of attention and a gated MLP.

    The sum of: the weights by their bits; the trained parameters with gradients and optimizer states; for each token
    and layer the inputs that the backward pass needs (of the two norms, the projections and the gate, in 16 bits), or
    with checkpointing those of one layer and the layers' inputs, which Unsloth keeps in the host's memory; a chunk of
    logits.

    Args:
        model: of transformers, without weights (`empty_model`).
        tokens: of the largest micro-batch, padding included.
    """
    from torch.nn import Linear

    config = model.config.get_text_config()
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear) and m is not head)
    others = sum(p.numel() for p in model.parameters()) - linear
    vocabulary = head.weight.shape[0]
    dense_bytes = 4 if plan.dtype == "float32" else 2  # of a weight or an activation
    adam_bytes = 2 if plan.optim.endswith("_8bit") else 8  # for each parameter
    if recipe.full_finetuning:
        weights, trained = 0.0, (linear + others) * (4 + 4 + adam_bytes)
    else:
        # with their scales, which the fast kernels hold in 32 bits
        four = dense_bytes if plan.dense else 0.57 if plan.kernels == "fast" else 0.53
        weight_bytes = four if recipe.load_in_4bit else 1.03 if recipe.load_in_8bit else dense_bytes
        weights = linear * weight_bytes + others * dense_bytes
        adapted_names = layers_to_adapt(recipe.target_modules, model)
        adapted = sum(
            sum(module.weight.shape)
            for path, module in adaptable_layers(model)
            if any(f".{path}".endswith(f".{name}") for name in adapted_names)
        )
        whole = sum(vocabulary * hidden for name in HEAD_AND_EMBEDDINGS if name in recipe.modules_to_save)
        trained = (recipe.r * adapted + whole) * (4 + 4 + adam_bytes)
    in_layer = dense_bytes * (4 * hidden + (heads + 2 * groups) * head_dim + 3 * inner)
    # of transformers' own kernels (measured)
    overhead = 1 if plan.engine == "unsloth" else 1.2 if plan.liger or plan.kernels == "fast" else 2
    if not plan.gradient_checkpointing:
        activations = tokens * layers * in_layer * overhead
    else:
        activations = tokens * in_layer * overhead + (0 if plan.engine == "unsloth" else tokens * layers * hidden * 2)
    # without a loss in chunks: logits in 16 and 32 bits and their gradient; with a trained head a gradient in both
    head_bytes = 12 if trains_head(recipe, plan.new_tokens) else 8 if hasattr(config, "logits_scaling") else 0
    logits = tokens * vocabulary * head_bytes
    # logits and their gradient
    rest = min(tokens, CHUNK) * vocabulary * 4 + 2**28 if plan.kernels == "fast" else 2**30 // overhead
    return int(weights + trained + activations + logits + rest)


def trains_head(recipe: Recipe, new_tokens: Collection[int] = ()) -> bool:
    """Return whether the layer that makes the logits is trained: by an adapter, whole, or its rows of new tokens."""
    in_head = "lm_head" in (*recipe.target_modules, *recipe.modules_to_save) or bool(new_tokens)
    return in_head and not recipe.full_finetuning


def _trains_outside_layers(recipe: Recipe) -> bool:
    """Return whether the embeddings or the head get an adapter, which Unsloth would train whole, or layers are trained
    whole, of which Unsloth knows these two only."""
    return bool({"embed_tokens", "lm_head"} & set(recipe.target_modules) or recipe.modules_to_save)


def _gpu_engine(
    recipe: Recipe, architecture: str | None, fast: bool, new_tokens: bool = False
) -> tuple[str, list[str]]:
    """Return the engine, and a note if it is not Unsloth although the recipe leaves the choice.

    Raises:
        BadRecipe: the recipe asks for Unsloth, and it cannot be imported, or may mix packed rows.

    Where the fast kernels run, transformers is faster than Unsloth, packed or not (bench/train.json).
    """
    if recipe.engine == "transformers":
        return "transformers", []
    unknown = architecture not in WITH_UNSLOTH
    if recipe.engine == "unsloth" and recipe.packing and unknown:
        raise BadRecipe(
            f"field 'packing': it is not known whether Unsloth keeps packed rows of type {architecture} apart",
            "Set packing to false, or engine: transformers, which proves it when training begins",
        )
    reasons = {
        "method: dpo": recipe.method == "dpo",
        "full_finetuning": recipe.full_finetuning,
        "several processes": recipe.num_processes > 1,
        "embed_tokens, lm_head or modules_to_save, of which unsloth trains others": _trains_outside_layers(recipe),
        "new tokens, whose rows unsloth does not train": new_tokens,
        "the fast kernels": fast and recipe.engine == "auto",
        f"it does not train {architecture} as well": recipe.engine == "auto" and unknown,
    }
    if applying := [reason for reason, applies in reasons.items() if applies]:
        return "transformers", [f"transformers replaces unsloth: {', '.join(applying)}"]
    try:
        import unsloth  # noqa: F401  (it must be imported before transformers, trl and peft)
    except Exception as error:  # of many classes, where a kernel or a version does not fit
        if recipe.engine == "unsloth":
            raise BadRecipe(
                f"field 'engine': unsloth cannot be imported ({error})", "pip install -r requirements-gpu.txt"
            ) from error
        return "transformers", [f"transformers replaces unsloth, which cannot be imported: {error}"]
    return "unsloth", []
