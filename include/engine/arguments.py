"""The arguments of TRL's trainers and of generation: the recipe's fields, the plan, and what Retune decides."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from include.engine.checkpoints import CHECKPOINTS
from include.engine.device_plan import Plan, trains_head
from include.errors import BadRecipe
from include.recipe import Recipe, SmokeTest, Training

SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # have no meaning without do_sample


def training_config(recipe: Recipe, plan: Plan, out: Path, run_name: str) -> Any:
    """Return TRL's SFTConfig or DPOConfig. Recipe fields that have the name of one of its arguments are passed on.

    Raises:
        BadRecipe: `training_arguments` has an unknown name or a wrong value.
    """
    import trl

    config_class: Any = trl.DPOConfig if recipe.method == "dpo" else trl.SFTConfig
    names = {field.name for field in dataclasses.fields(config_class)}
    arguments: dict[str, Any] = {name: getattr(recipe, name) for name in Training.model_fields if name in names}
    arguments |= {
        "output_dir": str(out / CHECKPOINTS),
        "run_name": run_name,
        "max_length": recipe.max_seq_length,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "optim": plan.optim,
        "bf16": plan.dtype == "bfloat16",
        "fp16": plan.dtype == "float16",
        "use_cpu": plan.device == "cpu",
        "use_liger_kernel": plan.liger,
        "gradient_checkpointing": bool(plan.gradient_checkpointing),
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": plan.device == "cuda",
        "ddp_find_unused_parameters": False if plan.processes > 1 else None,
    }
    if plan.kernels == "fast" and not recipe.lora_dropout:  # a CUDA graph cannot read the random state
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "preserve_rng_state": False}
    if recipe.method == "sft":
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
        # TRL's default reads the head's own weights, without its adapter; the fast kernels have their own loss
        if trains_head(recipe, plan.new_tokens) or plan.kernels == "fast":
            arguments["loss_type"] = "nll"
    if recipe.early_stopping_patience:  # measure the holdout loss at every checkpoint and keep the best one
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": recipe.save_steps,
            "per_device_eval_batch_size": plan.micro_batch,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    own = dict(recipe.training_arguments)
    if "warmup_ratio" in own:  # transformers 5 takes the ratio as warmup_steps below 1
        own["warmup_steps"] = _ratio(own.pop("warmup_ratio"))
    hints = typing.get_type_hints(config_class)
    _check_names("training_arguments", config_class, own, names)
    for name, value in own.items():
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
            arguments[name] = adapter.validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise _bad("training_arguments", f"'{name}': {message[0].lower()}{message[1:]}, got {value!r}") from None
    try:
        return config_class(**arguments)
    except (TypeError, ValueError) as error:
        problem = " ".join(str(error).split())
        if not own:
            raise BadRecipe(f"the trainer refuses the recipe: {problem}", "Correct it and run again") from error
        raise _bad("training_arguments", f"{', '.join(own)}: {problem}") from error


def generation_config(recipe: Recipe, stop: list[int], pad: int | None) -> Any:
    """Return transformers' GenerationConfig.

    It holds every sampling field of the recipe: generate() takes an argument that it lacks from the base's own
    generation_config.json.

    Args:
        stop: ids of the tokens that end an answer.
        pad: id of the padding token.

    Raises:
        BadRecipe: `generation_arguments` has an unknown name or a wrong value.
    """
    from transformers import GenerationConfig

    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    own = recipe.generation_arguments
    _check_names("generation_arguments", GenerationConfig, own, names)
    fields = [name for name in SmokeTest.model_fields if name in names and (recipe.do_sample or name not in SAMPLING)]
    arguments = {name: getattr(recipe, name) for name in fields}
    try:
        config = GenerationConfig(**arguments, eos_token_id=stop, pad_token_id=pad, **own)
        if own:
            config.validate(strict=True)
    except (TypeError, ValueError, AttributeError) as error:
        if not own:
            raise
        raise _bad("generation_arguments", f"{', '.join(own)}: {' '.join(str(error).split())}") from error
    return config


def check_arguments(recipe: Recipe) -> None:
    """Check `training_arguments` and `generation_arguments` by the classes that take them.

    GenerationConfig declares no types. So a tiny model with random weights generates with it, too.

    Raises:
        BadRecipe: an argument is unknown, has the wrong type, or does not fit the others.
    """
    if recipe.training_arguments or "training_arguments" in recipe.sweep:
        for candidate in recipe.candidates().values():
            plan = Plan(
                device="cpu", device_name="", dtype="float32", engine="transformers", optim=candidate.optim,
                gradient_checkpointing=False, micro_batch=1, accumulation=1,
            )  # fmt: skip
            training_config(candidate, plan, Path(), candidate.name)
    if recipe.generation_arguments:
        config = generation_config(recipe, stop=[1], pad=0)
        config.max_new_tokens = min(config.max_new_tokens, 16)
        try:
            with warnings.catch_warnings(action="ignore"):  # min_new_tokens may be larger than that
                _generate_with_tiny_model(config)
        except Exception as error:  # of any class: each argument is used by other code
            problem = f"{', '.join(recipe.generation_arguments)}: {' '.join(str(error).split())}"
            raise _bad("generation_arguments", problem) from error


def _generate_with_tiny_model(config: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=2**18, tie_word_embeddings=True, **shape))  # type: ignore[arg-type]
    prompt = torch.tensor([[5, 6, 7]])
    model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)


def _ratio(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise _bad("training_arguments", f"'warmup_ratio': a number from 0 to below 1 is expected, got {value!r}")
    return float(value)


def _check_names(field: str, config_class: type, own: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in own:
        if name not in names:
            near = next(iter(get_close_matches(name, names, n=1)), None)
            hint = f" (did you mean '{near}'?)" if near else ""
            raise _bad(field, f"{config_class.__name__} has no argument '{name}'{hint}")


def _bad(field: str, problem: str) -> BadRecipe:
    return BadRecipe(f"field '{field}': {problem}", "Correct it and run again")
