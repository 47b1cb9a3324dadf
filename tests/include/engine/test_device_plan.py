"""The planner: what it makes of a device's memory, and how close its predictions were to a GPU's measurements."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.architectures import config_of
from bench.train import SIZES, WAYS, row_lengths
from include.engine.compatibility import empty_model
from include.engine.device_plan import (
    HEADROOM,
    WITH_UNSLOTH,
    Plan,
    _gpu_engine,
    _most_tokens,
    fit,
    predict_peak,
    trains_head,
)
from include.errors import BadRecipe
from include.recipe import Recipe, validate_recipe
from tests.conftest import PROJECT

ARCHITECTURES = json.loads((PROJECT / "bench" / "architectures.json").read_text())
MEASURED = json.loads((PROJECT / "bench" / "train.json").read_text())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with the shape of Llama-3.2-3B."""
    (tmp_path / "config.json").write_text(
        json.dumps({**SIZES["cuda"], "model_type": "llama", "tie_word_embeddings": True})
    )
    return tmp_path


def gpu_plan(**fields: Any) -> Plan:
    return Plan(
        device="cuda", device_name="some GPU", dtype="bfloat16", engine="unsloth", optim="adamw_8bit",
        gradient_checkpointing="unsloth", **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gib", "fields", "micro", "checkpointing"),
    [
        (79, {}, 8, False),
        (30, {}, 4, False),
        (8, {}, 8, "unsloth"),
        (79, {"device_memory_gib": 8}, 8, "unsloth"),
        (3, {}, 1, "unsloth"),
        (79, {"fit_device": False}, 2, "unsloth"),
        (79, {"load_in_4bit": False, "max_seq_length": 4096}, 8, False),
    ],
)
def test_the_plan_uses_the_free_memory_and_keeps_the_effective_batch(
    base: Path, gib: int, fields: dict, micro: int, checkpointing: object
) -> None:
    recipe = validate_recipe({"name": "x", **fields}, "x")
    plan = fit(gpu_plan(micro_batch=2, accumulation=4), recipe, base, lengths=[2040], free=gib * 2**30)
    assert (plan.micro_batch, plan.gradient_checkpointing) == (micro, checkpointing)
    assert plan.micro_batch * plan.accumulation == 8
    if recipe.fit_device:
        assert f"{plan.micro_batch} x {plan.accumulation}" in plan.notes[-1]
        assert plan.predicted_bytes > 2 * 2**30


def test_without_a_prediction_the_recipes_batch_is_tried_with_checkpointing(tmp_path: Path) -> None:
    config_of("gpt-oss").save_pretrained(tmp_path)
    recipe = validate_recipe({"name": "x"}, "x")
    plan = fit(gpu_plan(micro_batch=2, accumulation=4), recipe, tmp_path, lengths=[2040], free=79 * 2**30)
    assert (plan.micro_batch, plan.accumulation, plan.gradient_checkpointing) == (2, 4, "unsloth")
    assert plan.notes == [
        "this base's memory is not predicted (mixture of experts); if it does not fit, a smaller micro-batch is tried"
    ]
    assert plan.predicted_bytes == 0


LENGTHS = [100] * 90 + [1000] * 9 + [2040]


@pytest.mark.parametrize(
    ("gib", "fields", "micro", "checkpointing", "dense"),
    [
        (79, {}, 8, False, True),
        (14, {}, 8, True, True),
        (8, {}, 8, True, False),
        (79, {"load_in_4bit": False}, 8, False, False),
        (24, {"packing": True}, 2, False, True),
    ],
)
def test_joined_rows_are_expected_to_be_as_long_as_rows_are_and_weights_are_dense_where_they_fit(
    base: Path, gib: int, fields: dict, micro: int, checkpointing: bool, dense: bool
) -> None:
    recipe = validate_recipe({"name": "x", **fields}, "x")
    before = replace(gpu_plan(micro_batch=2, accumulation=4), engine="transformers", kernels="fast")
    plan = fit(before, recipe, base, lengths=LENGTHS, free=gib * 2**30)
    assert (plan.micro_batch, plan.gradient_checkpointing, plan.dense) == (micro, checkpointing, dense), plan.notes
    assert plan.predicted_bytes * HEADROOM <= gib * 2**30
    assert ("weights dequantized once" in plan.notes[-1]) is dense


def test_a_cpu_takes_the_whole_batch_at_once_where_memory_allows(base: Path) -> None:
    cpu = {"device": "cpu", "dtype": "float32", "engine": "transformers", "optim": "adamw_torch"}
    before = replace(gpu_plan(micro_batch=2, accumulation=4), **cpu, gradient_checkpointing=False, kernels="fast")
    recipe = validate_recipe({"name": "x"}, "x")
    plans = [fit(before, recipe, base, lengths=LENGTHS, free=gib * 2**30) for gib in (400, 24, 1)]
    assert [plan.micro_batch for plan in plans] == [8, 4, 1]
    assert not any(plan.gradient_checkpointing for plan in plans)
    assert fit(replace(before, kernels="plain"), recipe, base, lengths=LENGTHS, free=2**40).micro_batch == 2


def test_after_out_of_memory_no_larger_micro_batch_is_tried(base: Path) -> None:
    recipe = validate_recipe({"name": "x"}, "x")
    shrunk = gpu_plan(micro_batch=4, accumulation=2, shrunk=True)
    assert fit(shrunk, recipe, base, lengths=[2040], free=79 * 2**30).micro_batch == 4


def test_predictions_are_close_to_what_the_benchmark_measured(tmp_path: Path) -> None:
    lengths = row_lengths(np.random.default_rng(0), 4000, 2040)
    fast = 0
    for name, found in MEASURED["ways"].items():
        for run in found["runs"]:
            if not run["plan"] or run["plan"]["predicted_bytes"] == 0:
                continue
            plan, way = Plan(**run["plan"]), WAYS[name]
            recipe = validate_recipe({"name": "x", **way.fields, "max_seq_length": way.length}, "x")
            (tmp_path / "config.json").write_text(json.dumps({**SIZES[way.base or "cuda"], "model_type": "llama"}))
            tokens = _most_tokens(plan, recipe, lengths)
            predicted = predict_peak(empty_model(tmp_path, "x"), recipe, plan, tokens) / 2**30
            if plan.kernels == "fast":
                fast += 1
                assert run["peak_gib"] == pytest.approx(predicted, rel=0.15), (name, predicted)
            else:  # the prediction is for a batch with the longest row, which few steps reach
                assert 0.7 * predicted < run["peak_gib"] < predicted, (name, predicted)
    assert fast >= 4


@pytest.mark.parametrize(
    "run", [run for run in ARCHITECTURES["runs"] if run["name"] not in ("gpt-oss", "LFM2")],
    ids=lambda run: f"{run['name']}, {run['engine']}",
)  # fmt: skip
def test_predictions_hold_for_other_architectures(run: dict[str, Any], tmp_path: Path) -> None:
    config_of(run["name"], wide=True).save_pretrained(tmp_path)
    model = empty_model(tmp_path, run["name"])
    for kind in ("unpacked", "packed"):
        plan = Plan(**run[kind]["plan"])
        recipe = validate_recipe({"name": "x", "packing": kind == "packed", "max_seq_length": 2048}, "x")
        predicted = predict_peak(model, recipe, plan, ARCHITECTURES["tokens"][kind]) / 2**30
        if run["engine"] == "transformers" or run["model_type"] in WITH_UNSLOTH:
            assert run[kind]["peak_gib"] == pytest.approx(predicted, rel=0.2), (kind, predicted)
        else:
            assert run[kind]["peak_gib"] > 1.8 * predicted, "why Unsloth does not train it"


@pytest.mark.parametrize(
    ("fields", "head"),
    [
        ({"target_modules": "comprehensive"}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["norm"]}, False),
    ],
)
def test_embeddings_and_head_are_trained_by_transformers_and_their_memory_counts(
    fields: dict[str, Any], head: bool, base: Path
) -> None:
    recipe, plain = (
        validate_recipe({"name": "x", "engine": "unsloth", **fields}, "x"),
        validate_recipe({"name": "x"}, "x"),
    )
    engine, notes = _gpu_engine(recipe, "llama", True)
    assert engine == "transformers"
    assert "embed_tokens, lm_head or modules_to_save, of which unsloth trains others" in notes[0]
    assert trains_head(recipe) is head
    model, plan = empty_model(base, "base"), gpu_plan(micro_batch=2, accumulation=4)
    more = predict_peak(model, recipe, plan, 4096) - predict_peak(model, plain, plan, 4096)
    assert (more > 2**30) is head, "the logits of all tokens"


def test_unsloth_trains_the_architectures_that_it_was_tried_with() -> None:
    def recipe(**fields: Any) -> Recipe:
        return validate_recipe({"name": "x", **fields}, "x")

    engine, notes = _gpu_engine(recipe(), "gpt_oss", False)
    assert (engine, notes) == ("transformers", ["transformers replaces unsloth: it does not train gpt_oss as well"])
    assert _gpu_engine(recipe(), "llama", True)[1] == ["transformers replaces unsloth: the fast kernels"]
    with pytest.raises(BadRecipe, match="field 'packing': it is not known whether Unsloth .* type lfm2"):
        _gpu_engine(recipe(engine="unsloth", packing=True), "lfm2", True)
    for fields, architecture in (({}, "qwen3"), ({"engine": "unsloth"}, "lfm2")):
        if importlib.util.find_spec("unsloth"):
            assert _gpu_engine(recipe(**fields), architecture, False) == ("unsloth", [])
        elif fields:
            with pytest.raises(BadRecipe, match="unsloth cannot be imported"):
                _gpu_engine(recipe(**fields), architecture, False)
        else:
            assert "cannot be imported" in _gpu_engine(recipe(**fields), architecture, False)[1][0]


def test_new_tokens_are_trained_by_transformers_and_the_head_counts_as_trained(base: Path) -> None:
    recipe = validate_recipe({"name": "x", "engine": "unsloth"}, "x")
    engine, notes = _gpu_engine(recipe, "llama", True, new_tokens=True)
    assert engine == "transformers" and "new tokens, whose rows unsloth does not train" in notes[0]
    assert trains_head(recipe, [512]) and not trains_head(recipe)
    whole = recipe.model_copy(update={"full_finetuning": True})
    assert not trains_head(whole, [512]), "TRL's own loss then reads the weights that are trained"
    model, plan = empty_model(base, "base"), gpu_plan(micro_batch=2, accumulation=4)
    more = predict_peak(model, recipe, replace(plan, new_tokens=[512]), 4096)
    assert more - predict_peak(model, recipe, plan, 4096) > 2**30, "the logits of all tokens"
