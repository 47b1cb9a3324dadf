"""What the device at hand makes of the recipe's training settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from include.errors import BadRecipe


@dataclass
class Plan:
    """How a job uses the device. The effective batch is the recipe's, whatever the plan.

    Attributes:
        engine: `unsloth` or `transformers`.
        dtype: compute type, as torch names it.
        micro_batch, accumulation: conversations per device and micro-step, and micro-steps per optimizer step; their
            product is the recipe's.
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
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values, for the manifest."""
        return asdict(self)


def make_plan(recipe: dict[str, Any], micro_batch: int | None = None) -> Plan:
    """Choose engine, precision and optimizer for this machine.

    Args:
        micro_batch: a smaller one than the recipe's, after it did not fit into memory.

    Raises:
        BadRecipe: the recipe insists on Unsloth, and this machine has no GPU for it or not the package.
    """
    import torch

    wanted, accumulation = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    batch = (micro_batch or wanted, accumulation * wanted // (micro_batch or wanted))
    if not torch.cuda.is_available():
        if recipe["engine"] == "unsloth":
            raise BadRecipe(
                "field 'engine': unsloth needs a GPU, and this machine shows none",
                "Run the gpu queue's worker on a machine with one, or set engine: auto",
            )
        plan = Plan("cpu", _cpu_name(), "transformers", "float32", recipe["optim"], False, *batch)
        if plan.optim.endswith("_8bit"):
            plan.notes.append(f"adamw_torch in place of {plan.optim}, which needs a GPU")
            plan.optim = "adamw_torch"
        return plan
    bf16 = torch.cuda.is_bf16_supported()
    engine, notes = _gpu_engine(recipe["engine"])
    return Plan(
        "cuda", torch.cuda.get_device_name(), engine, "bfloat16" if bf16 else "float16", recipe["optim"],
        "unsloth" if engine == "unsloth" else True, *batch, notes,
    )  # fmt: skip


def _gpu_engine(wanted: str) -> tuple[str, list[str]]:
    if wanted == "transformers":
        return wanted, []
    try:
        import unsloth  # noqa: F401  (it must be imported before transformers, trl and peft)
    except Exception as error:  # it fails in many ways where a kernel or a version does not fit
        if wanted == "unsloth":
            raise BadRecipe(
                f"field 'engine': unsloth cannot be imported ({error})", "pip install -r requirements-gpu.txt"
            ) from error
        return "transformers", [f"transformers in place of unsloth, which cannot be imported: {error}"]
    return "unsloth", []


def _cpu_name() -> str:
    import os
    import platform

    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
