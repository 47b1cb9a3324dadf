"""What the device at hand makes of the recipe's training settings."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from include.engine.distributed import COUNT, RANK, highest
from include.errors import BadRecipe

PLAN = "plan.json"
RESERVE = 1.15  # of what is predicted must be free


@dataclass
class Plan:
    """How a job uses the device. The effective batch is the recipe's, whatever the plan.

    Attributes:
        engine: `unsloth` or `transformers`.
        dtype: compute type, as torch names it.
        processes: how many train together, each on a GPU of its own.
        micro_batch, accumulation: conversations per process and micro-step, and micro-steps per optimizer step; the
            product of the three is the recipe's.
        liger: whether Liger's kernels take the place of transformers' own.
        attention: how transformers computes it; `varlen` is `include.engine.attention`.
        shrunk: whether the micro-batch is the largest that may be tried, after a larger one did not fit.
        predicted_bytes: of device memory at the peak; 0 on a CPU.
        notes: where the plan differs from the recipe, and why; for people.
    """

    device: str
    device_name: str
    engine: str
    dtype: str
    optim: str
    gradient_checkpointing: bool | str
    micro_batch: int
    accumulation: int
    shrunk: bool = False
    processes: int = 1
    liger: bool = False
    attention: str = "sdpa"
    predicted_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values, for the manifest."""
        return asdict(self)


def make_plan(recipe: dict[str, Any], micro_batch: int | None = None) -> Plan:
    """Choose engine, precision and optimizer for this machine, and this process's device.

    Args:
        micro_batch: a smaller one than the recipe's, after it did not fit into memory.

    Raises:
        BadRecipe: the recipe asks for what this machine has not: Unsloth without a GPU or without the package, more
            processes than there are GPUs.
    """
    import torch

    wanted = micro_batch or recipe["per_device_train_batch_size"]
    share = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] // COUNT
    micro = max(n for n in range(1, min(wanted, share) + 1) if share % n == 0)
    batch = (micro, share // micro, bool(micro_batch), COUNT)
    if not torch.cuda.is_available():
        if recipe["engine"] == "unsloth":
            raise BadRecipe(
                "field 'engine': unsloth needs a GPU, and this machine shows none",
                "Run the gpu queue's worker on a machine with one, or set engine: auto",
            )
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes prepares the compiler, unused here: 1.6 s
        plan = Plan("cpu", _cpu_name(), "transformers", "float32", recipe["optim"], False, *batch)
        if plan.optim not in ("adamw_torch", "adafactor"):
            plan.notes.append(f"adamw_torch in place of {plan.optim}, which needs a GPU")
            plan.optim = "adamw_torch"
        return plan
    if torch.cuda.device_count() < COUNT:
        raise BadRecipe(
            f"field 'num_processes': {COUNT} processes need as many GPUs, this machine shows "
            f"{torch.cuda.device_count()}",
            "Lower num_processes, or run the gpu queue's worker on a machine with more",
        )
    torch.cuda.set_device(RANK)
    bf16 = torch.cuda.is_bf16_supported()
    liger = importlib.util.find_spec("liger_kernel") is not None
    engine, notes = _gpu_engine(recipe, liger and bf16)
    plan = Plan(
        "cuda", torch.cuda.get_device_name(), engine, "bfloat16" if bf16 else "float16", recipe["optim"],
        "unsloth" if engine == "unsloth" else True, *batch, notes=notes,
    )  # fmt: skip
    if engine == "transformers":
        plan.liger = liger and recipe["method"] == "sft"  # for DPO, TRL computes another way with it
        if bf16 and recipe["packing"] and importlib.util.find_spec("torch.nn.attention.varlen"):
            plan.attention = "varlen"
    return plan


def fit(plan: Plan, recipe: dict[str, Any], base: str, longest: int, free: int) -> Plan:
    """Choose micro-batch and gradient checkpointing so that the device is used and its memory holds; the effective
    batch stays. On a CPU the plan is left as it is.

    The host launches kernels for one micro-step at a time, so that speed grows with the micro-batch; checkpointing
    halves it (both measured, see bench/train.json).

    Args:
        base: the base model's folder.
        longest: tokens of the longest sequence.
        free: bytes of device memory.
    """
    if plan.device != "cuda" or not recipe["fit_device"]:
        return plan
    if recipe["device_memory_gb"]:
        free = min(free, int(recipe["device_memory_gb"] * 2**30))
    shape = orjson.loads((Path(base) / "config.json").read_bytes())
    batch, most = plan.micro_batch * plan.accumulation, plan.micro_batch
    if not plan.shrunk:
        most = batch
    checkpointed: bool | str = "unsloth" if plan.engine == "unsloth" else True
    choices = [
        replace(plan, micro_batch=micro, accumulation=batch // micro, gradient_checkpointing=how)
        for micro in range(1, most + 1)
        if batch % micro == 0
        for how in (False, checkpointed)
    ]
    for choice in choices:
        sequences = choice.micro_batch * (2 if recipe["method"] == "dpo" else 1)
        tokens = sequences * (recipe["max_seq_length"] if recipe["packing"] else longest)
        choice.predicted_bytes = predict_peak(shape, recipe, choice, tokens)
    fitting = [choice for choice in choices if choice.predicted_bytes * RESERVE <= free]
    best = max(fitting or choices[1:2], key=lambda c: c.micro_batch * (1 if c.gradient_checkpointing else 2))
    best.notes.append(
        f"{best.micro_batch} x {best.accumulation} {'with' if best.gradient_checkpointing else 'without'} gradient "
        f"checkpointing: {best.predicted_bytes / 2**30:.1f} GiB predicted, {free / 2**30:.1f} GiB there"
    )
    return best


def free_memory(device: str) -> int:
    """Bytes that are free on the process's GPU, or where several train together on the one that has least; else 0."""
    import torch

    return -highest(-torch.cuda.mem_get_info()[0], device) if device == "cuda" else 0


def predict_peak(shape: dict[str, Any], recipe: dict[str, Any], plan: Plan, tokens: int) -> int:
    """Bytes of device memory at the peak of a training step, for a Llama-like model.

    Weights by their bits; what is trained with its gradient and optimizer states; for each token and layer the inputs
    that the backward pass needs (of the two norms, the projections and the gate, in 16 bits), or with checkpointing
    those of one layer and the layers' inputs, which Unsloth keeps in the host's memory; and a chunk of logits.

    Args:
        shape: the model's config.json.
        tokens: of the largest micro-batch, padding included.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, groups = shape["num_attention_heads"], shape.get("num_key_value_heads", shape["num_attention_heads"])
    size = shape.get("head_dim") or hidden // heads
    sizes = {
        "q_proj": (hidden, heads * size), "k_proj": (hidden, groups * size), "v_proj": (hidden, groups * size),
        "o_proj": (heads * size, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }  # fmt: skip
    of_layers = layers * sum(a * b for a, b in sizes.values())
    embeddings = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    states = 2 if plan.optim.endswith("_8bit") else 8  # bytes of a parameter, of AdamW
    if recipe["full_finetuning"]:
        weights, trained = 0.0, (of_layers + embeddings) * (4 + 4 + states)
    else:
        each = 0.53 if recipe["load_in_4bit"] else 1.03 if recipe["load_in_8bit"] else 2  # bytes, with their scales
        weights = of_layers * each + embeddings * 2
        adapted = sum(a + b for name, (a, b) in sizes.items() if name in recipe["target_modules"])
        trained = layers * recipe["r"] * adapted * (4 + 4 + states)
    of_layer = 2 * (4 * hidden + (heads + 2 * groups) * size + 3 * inner)
    own = 1 if plan.engine == "unsloth" else 1.2 if plan.liger else 2  # what transformers keeps besides (measured)
    if not plan.gradient_checkpointing:
        kept = tokens * layers * of_layer * own
    else:
        kept = tokens * of_layer * own + (0 if plan.engine == "unsloth" else tokens * layers * hidden * 2)
    return int(weights + trained + kept + 2**30 // own)


def _gpu_engine(recipe: dict[str, Any], fast_packing: bool) -> tuple[str, list[str]]:
    """The engine, and why it is not Unsloth where the recipe leaves the choice.

    Packed rows go to transformers, Liger's kernels and `include.engine.attention`: 28,900 tokens/s in bench/train.json,
    where Unsloth's 15,100 were seen on such a device.
    """
    if recipe["engine"] == "transformers":
        return "transformers", []
    others = {
        "method: dpo": recipe["method"] == "dpo",
        "full_finetuning": recipe["full_finetuning"],
        "several processes": recipe["num_processes"] > 1,
        "packed rows": recipe["packing"] and recipe["engine"] == "auto" and fast_packing,
    }
    if reasons := [reason for reason, applies in others.items() if applies]:
        return "transformers", [f"transformers in place of unsloth: {', '.join(reasons)}"]
    try:
        import unsloth  # noqa: F401  (it must be imported before transformers, trl and peft)
    except Exception as error:  # it fails in many ways where a kernel or a version does not fit
        if recipe["engine"] == "unsloth":
            raise BadRecipe(
                f"field 'engine': unsloth cannot be imported ({error})", "pip install -r requirements-gpu.txt"
            ) from error
        return "transformers", [f"transformers in place of unsloth, which cannot be imported: {error}"]
    return "unsloth", []


def _cpu_name() -> str:
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
