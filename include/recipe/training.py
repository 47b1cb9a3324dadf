"""Recipe fields: the adapter and its training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from include.recipe.data import Share
from include.recipe.reserved import TRAINING_DECIDED, TRAINING_INSTEAD, refuse_reserved

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULE_SETS = {
    "minimal": ["q_proj", "v_proj"],
    "standard": PROJECTIONS,
    "comprehensive": [*PROJECTIONS, "embed_tokens", "lm_head"],
}
ALL_LINEAR = "all-linear"  # every linear layer between embeddings and head, as PEFT has it
MOST_CANDIDATES = 64


class Lora(BaseModel):
    """The adapter."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the adapter.")
    lora_alpha: int = Field(16, ge=1, le=4096, description="Scale of the adapter: updates are multiplied by alpha/r.")
    lora_dropout: Share = Field(0.0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] = Field(
        PROJECTIONS,
        min_length=1,
        description="The layers that get an adapter; or the name of a set: `minimal` (q, v), `standard` (the seven "
        "projections of Llama), `comprehensive` (these, embed_tokens and lm_head), `all-linear` (every linear layer "
        "except lm_head).",
        examples=[*MODULE_SETS, ALL_LINEAR, *PROJECTIONS, "embed_tokens", "lm_head"],
    )
    modules_to_save: list[str] = Field(
        [],
        description="Layers that are trained and published whole, beside the adapter, for example embed_tokens and "
        "lm_head. They make the adapter as large as these layers.",
        examples=["embed_tokens", "lm_head"],
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases that are trained, too.")
    use_rslora: bool = Field(False, description="Scale updates by alpha/sqrt(r) (rank-stabilized LoRA).")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _named_sets(cls, modules: Any) -> Any:
        names = [modules] if isinstance(modules, str) else modules
        if not isinstance(names, list):
            return modules
        found = [module for name in names for module in MODULE_SETS.get(str(name), [name])]
        return list(dict.fromkeys(found))


class Training(BaseModel):
    """How the adapter is trained."""

    method: Literal["sft", "dpo"] = Field(
        "sft",
        description="`sft`: supervised fine-tuning on the assistant's turns; `dpo`: direct preference optimization on "
        "rows with a prompt, a chosen and a rejected answer; use a learning_rate of about 1e-6 to 1e-5.",
    )
    beta: float = Field(0.1, gt=0, le=10, description="DPO's beta. A higher value keeps the model closer to the base.")
    full_finetuning: bool = Field(
        False,
        description="Train and publish the whole model instead of an adapter; set load_in_4bit to false.",
    )
    engine: Literal["auto", "unsloth", "transformers"] = Field(
        "auto",
        description="`unsloth` needs a supported GPU; `transformers` (with PEFT and bitsandbytes) runs anywhere;"
        " `auto` takes the faster one for the base and the device.",
    )
    kernels: Literal["auto", "plain"] = Field(
        "auto",
        description="`auto`: rows without padding, adapters fused with their layers, a loss on trained tokens only, "
        "compiled layers on a GPU, bfloat16 on a CPU that has it: each where the gradient is proved to stay the same "
        "when training begins; `plain`: the code of transformers, PEFT and TRL as it is.",
    )
    per_device_train_batch_size: int = Field(2, ge=1, le=4096, description="Conversations per device and micro-step.")
    gradient_accumulation_steps: int = Field(4, ge=1, le=4096, description="Micro-steps per optimizer step.")
    max_steps: int = Field(60, ge=-1, description="Optimizer steps; -1: as many as num_train_epochs asks for.")
    num_train_epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the data, when max_steps is -1.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Highest learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field("linear", description="How the learning rate falls after the warm-up.")
    warmup_steps: int = Field(5, ge=0, description="Steps over which the learning rate rises.")
    optim: Literal[
        "adamw_8bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused", "adafactor", "lion_8bit"
    ] = Field(
        "adamw_8bit",
        description="Optimizer. Without a GPU, adamw_torch replaces all others except adafactor.",
    )  # fmt: skip
    weight_decay: float = Field(0.01, ge=0, le=1, description="Weight decay.")
    packing: bool = Field(False, description="Put several conversations into one sequence of max_seq_length.")
    save_steps: int = Field(20, ge=1, description="Steps between two checkpoints. A killed run loses at most these.")
    logging_steps: int = Field(1, ge=1, description="Optimizer steps between two lines of the training log.")
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Measure the holdout loss at every checkpoint, stop after this many checkpoints without a lower "
        "loss, and keep the best checkpoint. Empty (default): train to the end.",
    )
    report_to: list[Literal["mlflow", "tensorboard", "wandb", "trackio"]] = Field(
        [],
        description="Also send the training log there; the package must be installed on the gpu queue's worker.",
        examples=["mlflow", "tensorboard", "wandb", "trackio"],
    )
    fit_device: bool = Field(
        True,
        description="On (default): choose batch size, gradient checkpointing and how weights are held by the free "
        "memory. The effective batch (batch size times accumulation) stays the same. Off: use the values of the recipe "
        "unchanged.",
    )
    num_processes: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs of the worker that train together (torchrun). The effective batch stays what batch size and "
        "accumulation say, and must be a multiple of this.",
    )
    device_memory_gib: float | None = Field(
        None, gt=0, description="Maximum GPU memory to use (GiB). Empty (default): all free memory."
    )
    hang_timeout: int = Field(
        1800,
        ge=10,
        description="Seconds without any progress after which the training process is ended and the task is retried. "
        "Before the end of the first step, the limit is at least 15 minutes.",
    )
    training_arguments: dict[str, Any] = Field(
        {},
        description="Any other argument of TRL's SFTConfig (with method dpo: of DPOConfig), for example "
        "`{max_grad_norm: 0.3, adam_beta2: 0.95, neftune_noise_alpha: 5}`. An argument that has a field here, or that "
        "Retune decides, is refused. `warmup_ratio` (share of all steps) replaces warmup_steps.",
    )
    seed: int = Field(3407, ge=0, le=2**31 - 1, description="Seed of adapter, data order and sampling.")
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {},
        description="Several values for fields of LoRA and Training, for example `learning_rate: [1.0e-4, 2.0e-4]`. "
        f"Every combination (at most {MOST_CANDIDATES}) is trained and measured; the best candidate goes on to the "
        "gate.",
    )

    @field_validator("training_arguments")
    @classmethod
    def _not_reserved(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        refuse_reserved(arguments, cls.model_fields, TRAINING_INSTEAD, TRAINING_DECIDED)
        return arguments
