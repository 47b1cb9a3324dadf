"""Arguments for TRL and for generation: passed on, checked by the classes that take them, refused where reserved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from trl import DPOConfig, SFTConfig

from include.engine.arguments import check_arguments, generation_config, training_config
from include.engine.device_plan import Plan
from include.errors import BadRecipe
from include.recipe import Recipe, validate_recipe
from include.recipe.reserved import (
    GENERATION_DECIDED,
    GENERATION_INSTEAD,
    TRAINING_DECIDED,
    TRAINING_INSTEAD,
)

PLAN = Plan(
    device="cpu", device_name="", dtype="float32", engine="transformers", optim="adamw_torch",
    gradient_checkpointing=False, micro_batch=3, accumulation=5,
)  # fmt: skip


def recipe_with(**fields: Any) -> Recipe:
    return validate_recipe({"name": "x", **fields}, "x")


def test_fields_plan_and_training_arguments_reach_the_trainer() -> None:
    arguments = {
        "adam_beta1": 0.8, "max_grad_norm": "3e-1", "lr_scheduler_kwargs": {"num_cycles": 2}, "save_total_limit": 1,
        "dataloader_num_workers": 1, "neftune_noise_alpha": 5, "warmup_ratio": 0.25,
    }  # fmt: skip
    recipe = recipe_with(
        learning_rate=0.5, save_steps=7, seed=3, packing=True, max_seq_length=99, training_arguments=arguments
    )
    config = training_config(recipe, PLAN, Path("/out"), "a name")
    assert type(config) is SFTConfig
    assert (config.learning_rate, config.save_steps, config.seed, config.packing) == (0.5, 7, 3, True)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.max_length) == (3, 5, 99)
    assert (config.output_dir, config.run_name, config.report_to) == ("/out/checkpoints", "a name", [])
    assert (config.adam_beta1, config.max_grad_norm, config.warmup_steps) == (0.8, 0.3, 0.25)
    assert (config.lr_scheduler_kwargs, config.save_total_limit) == ({"num_cycles": 2}, 1)
    assert (config.dataloader_num_workers, config.neftune_noise_alpha) == (1, 5)
    plain = training_config(recipe_with(), PLAN, Path("/out"), "x")
    assert (plain.adam_beta1, plain.save_total_limit, plain.warmup_steps) == (0.9, 2, 5)


def test_a_trained_head_gets_a_loss_that_goes_through_its_adapter() -> None:
    assert training_config(recipe_with(), PLAN, Path("/out"), "x").loss_type == "chunked_nll"
    for fields in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        assert training_config(recipe_with(**fields), PLAN, Path("/out"), "x").loss_type == "nll"


def test_a_preference_training_takes_the_arguments_of_dpo() -> None:
    recipe = recipe_with(method="dpo", beta=0.3, training_arguments={"label_smoothing": 0.1, "loss_type": ["ipo"]})
    check_arguments(recipe)
    config = training_config(recipe, PLAN, Path("/out"), "x")
    assert type(config) is DPOConfig
    assert (config.beta, config.label_smoothing, config.loss_type) == (0.3, 0.1, ["ipo"])
    with pytest.raises(BadRecipe, match="SFTConfig has no argument 'label_smoothing'"):
        check_arguments(recipe_with(training_arguments={"label_smoothing": 0.1}))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"adam_beta": 0.9}, r"SFTConfig has no argument 'adam_beta' \(did you mean 'adam_beta[12]'\?\)"),
        ({"max_grad_norm": "much"}, "'max_grad_norm': input should be a valid number.*, got 'much'"),
        ({"warmup_ratio": 5}, "'warmup_ratio': a number from 0 to below 1 is expected, got 5"),
        ({"eval_strategy": "sometimes"}, "eval_strategy: sometimes is not a valid"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
    ],
)
def test_a_wrong_training_argument_is_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRecipe, match=f"field 'training_arguments': .*{problem}"):
        check_arguments(recipe_with(training_arguments=arguments))


def test_every_candidate_of_a_sweep_is_checked() -> None:
    with pytest.raises(BadRecipe, match="has no argument 'adam_gamma'"):
        check_arguments(recipe_with(sweep={"training_arguments": [{"adam_beta1": 0.8}, {"adam_gamma": 1}]}))


def test_generation_arguments_reach_the_configuration() -> None:
    recipe = recipe_with(generation_arguments={"min_new_tokens": 3}, max_new_tokens=9, temperature=0.7)
    check_arguments(recipe)
    config = generation_config(recipe, stop=[4], pad=5)
    assert (config.min_new_tokens, config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (3, 9, [4], 5)
    assert (config.do_sample, config.temperature) == (False, None)
    sampling = generation_config(recipe_with(do_sample=True, temperature=0.7), stop=[4], pad=5)
    assert (sampling.do_sample, sampling.temperature, sampling.min_p) == (True, 0.7, 0.1)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"min_new_token": 3}, r"GenerationConfig has no argument 'min_new_token' \(did you mean 'min_new_tokens'\?\)"),
        ({"min_new_tokens": "many"}, "min_new_tokens: "),
        ({"early_stopping": "perhaps"}, "`early_stopping` must be a boolean or 'never'"),
        ({"typical_p": 0.5}, "`do_sample` is not set to `True`"),
    ],
)
def test_a_wrong_generation_argument_is_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRecipe, match=f"(?s)field 'generation_arguments': .*{problem}"):
        check_arguments(recipe_with(generation_arguments=arguments))


@pytest.mark.parametrize(
    ("field", "name", "remedy"),
    [
        ("training_arguments", "learning_rate", "set the recipe field learning_rate instead"),
        ("training_arguments", "max_length", "set the recipe field max_seq_length instead"),
        ("training_arguments", "packing", "set the recipe field packing instead"),
        ("training_arguments", "push_to_hub", "set the recipe field registry instead"),
        *(("training_arguments", name, "Retune decides it") for name in sorted(TRAINING_DECIDED)),
        ("generation_arguments", "temperature", "set the recipe field temperature instead"),
        ("generation_arguments", "max_length", "set the recipe field max_new_tokens instead"),
        *(("generation_arguments", name, "Retune decides it") for name in sorted(GENERATION_DECIDED)),
    ],
)
def test_a_reserved_argument_is_refused_by_name(field: str, name: str, remedy: str) -> None:
    with pytest.raises(BadRecipe, match=f"field '{field}': '{name}' is not allowed here: .*{remedy}"):
        recipe_with(**{field: {name: 1}})


def test_reserved_names_are_arguments_and_what_retune_passes_is_reserved_or_may_be_replaced() -> None:
    trainer = {field.name for config in (SFTConfig, DPOConfig) for field in dataclasses.fields(config)}
    assert trainer >= set(TRAINING_DECIDED) | set(TRAINING_INSTEAD)
    assert set(vars(GenerationConfig())) >= set(GENERATION_DECIDED) | set(GENERATION_INSTEAD)
    assert set(Recipe.model_fields) >= set(TRAINING_INSTEAD.values()) | set(GENERATION_INSTEAD.values())


def test_the_old_name_of_a_field_leads_to_the_new_one() -> None:
    with pytest.raises(BadRecipe, match="unknown field 'device_memory_gb': it is named 'device_memory_gib' now"):
        recipe_with(device_memory_gb=8)
