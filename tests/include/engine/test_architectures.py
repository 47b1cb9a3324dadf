"""Every architecture trains with the default recipe: packed or refused, saved, loaded, measured, asked and merged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.architectures import ARCHITECTURES, RESULTS, config_of
from include.engine.attention import check_packing
from include.engine.compatibility import empty_model, layers_to_adapt, other_towers
from include.engine.device_plan import unusual_layers
from include.errors import BadRecipe
from include.recipe import ALL_LINEAR, PROJECTIONS
from tests.conftest import PROJECT

pytestmark = pytest.mark.xdist_group("architectures")  # which share one process of the engine
MIXING = ("gpt-oss", "LFM2")  # attention with sinks, convolutions
FUSED = {
    "Phi-3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "GLM-4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
NOT_STANDARD = {
    "gpt-oss": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "LFM2": ["in_proj", "k_proj", "out_proj", "q_proj", "v_proj", "w1", "w2", "w3"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the engine's jobs returned for each architecture."""
    folder = tmp_path_factory.mktemp("architectures")
    command = [sys.executable, "-m", "bench.architectures", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=os.environ | {"RETUNE_VAR": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (folder / RESULTS).read_text().splitlines())
    return {line["name"]: line for line in lines}


@pytest.mark.engine
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_trains_in_4_bits_and_its_adapter_is_used(name: str, results: dict[str, Any]) -> None:
    found = results[name]
    losses = found["unpacked"]["losses"]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    assert not found["untrained"], "the trained layers all compute something"
    assert not found["beside_the_text_model"]
    assert found["loss"]["adapter"] < found["loss"]["base"]
    assert found["reloaded"] == 0
    assert found["merged_kl"] < 1e-4
    assert min(found["answers"]) > 0
    expected = NOT_STANDARD.get(name) or FUSED.get(name, PROJECTIONS)
    assert found["adapted"] == sorted(expected)


@pytest.mark.engine
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_train_as_alone_or_packing_is_refused(name: str, results: dict[str, Any]) -> None:
    packed, alone = results[name]["packed"], results[name]["unpacked"]["losses"]
    if name in MIXING:
        assert packed["refused"] == (
            "field 'packing': in this base the rows of a packed sequence see each other. Set packing to false."
        )
    else:
        assert packed["losses"] == pytest.approx(alone, abs=1e-3), "in bfloat16, where the CPU has it"


@pytest.mark.parametrize("name", NOT_STANDARD)
def test_a_base_without_some_of_llamas_projections_is_told_what_it_has(name: str, results: dict[str, Any]) -> None:
    assert f"Choose from: all-linear (here: {', '.join(NOT_STANDARD[name])})" in results[name]["resolve"]


def test_the_projections_of_llama_stand_for_the_layers_that_hold_them(tmp_path: Path) -> None:
    for name in ("Llama", *FUSED):
        config_of(name).save_pretrained(tmp_path / name)
        model = empty_model(tmp_path / name, name)
        assert layers_to_adapt(PROJECTIONS, model) == FUSED.get(name, PROJECTIONS)
        assert layers_to_adapt(["gate_proj", "down_proj", "up_proj"], model)[1] == "down_proj"
        assert layers_to_adapt([ALL_LINEAR, "q_proj"], model) == sorted(FUSED.get(name, PROJECTIONS))


def test_a_vision_tower_gets_no_adapter(tmp_path: Path) -> None:
    config_of("Gemma 3 with images").save_pretrained(tmp_path)
    model = empty_model(tmp_path, "x")
    assert other_towers(model) == r"(model\.multi_modal_projector|model\.vision_tower)(\..*)?"
    assert layers_to_adapt([ALL_LINEAR], model) == sorted(PROJECTIONS), "not out_proj, fc1 and fc2 of the tower"
    config_of("Llama").save_pretrained(tmp_path)
    assert other_towers(empty_model(tmp_path, "x")) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, None) for name in ARCHITECTURES if name not in MIXING),
        ("gpt-oss", "mixture of experts"),
        ("LFM2", "layers of other kinds than attention: conv"),
    ],
)
def test_memory_is_predicted_only_for_layers_of_attention_and_mlp(name: str, reason: str | None) -> None:
    assert unusual_layers(config_of(name).get_text_config()) == reason


def test_a_row_that_sees_the_row_before_it_is_noticed_although_its_logits_hardly_change() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("LFM2"))
    with pytest.raises(BadRecipe, match="field 'packing'"):
        check_packing(model)
    mistral = AutoModelForCausalLM.from_config(config_of("Mistral")).train()
    check_packing(mistral)
    assert mistral.training
    assert all(parameter.grad is None for parameter in mistral.parameters())
