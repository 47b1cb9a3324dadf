"""A base that does not fit the recipe is refused by its config.json, and layers that can train are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from include.engine.compatibility import check_base
from include.errors import BadRecipe
from include.recipe import MODULE_SETS, PROJECTIONS, Recipe, validate_recipe

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}


def recipe_with(**fields: Any) -> Recipe:
    return validate_recipe({"name": "x", "base_model": "owner/model-bnb-4bit", **fields}, "x")


@pytest.fixture
def config_only(tiny_base: Path, tmp_path: Path) -> Any:
    """Write a folder with the tiny base's config.json, with these entries in place of its own."""

    def write(**entries: Any) -> Path:
        config = json.loads((tiny_base / "config.json").read_text()) | entries
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "minimal"},
        {"target_modules": "comprehensive"},
        {"target_modules": "all-linear"},
        {"target_modules": ["all-linear", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ],
)
def test_layers_that_can_train_are_accepted(fields: dict[str, Any], config_only: Any) -> None:
    check_base(recipe_with(**fields), config_only())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "w_proj"]}, "field 'target_modules': the base has no layer w_proj .*all-linear "
                                                   ".here: down_proj, gate_proj, .*, down_proj, embed_tokens"),
        ({"target_modules": ["norm"]}, "field 'target_modules': the base has no layer norm that can be trained"),
        ({"modules_to_save": ["head"]}, "field 'modules_to_save': the base has no layer head .*lm_head"),
    ],
)  # fmt: skip
def test_layers_that_cannot_train_are_refused_with_those_that_can(
    fields: dict[str, Any], message: str, config_only: Any
) -> None:
    with pytest.raises(BadRecipe, match=message):
        check_base(recipe_with(**fields), config_only())


def test_a_sweep_needs_one_candidate_that_can_train(config_only: Any) -> None:
    check_base(recipe_with(sweep={"target_modules": [["w_proj"], "minimal"]}), config_only())
    with pytest.raises(BadRecipe, match="has no layer w_proj"):
        check_base(recipe_with(sweep={"target_modules": [["w_proj"], ["x_proj"]]}), config_only())


def test_the_sets_are_the_tutorials() -> None:
    assert MODULE_SETS["standard"] == PROJECTIONS
    assert MODULE_SETS["comprehensive"] == [*PROJECTIONS, "embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("fields", "excluded"),
    [
        ({"load_in_4bit": False}, "load_in_4bit: false"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_8bit, load_in_4bit: false"),
        ({"merged_16bit": True}, "merged_16bit"),
        ({"full_finetuning": True, "load_in_4bit": False}, "full_finetuning"),
    ],
)
def test_a_base_stored_in_4_bits_is_refused_for_what_needs_16(
    fields: dict[str, Any], excluded: str, config_only: Any
) -> None:
    with pytest.raises(
        BadRecipe, match=rf"are stored in 4 bits, which excludes {excluded}. Choose the base with 16-bit"
    ):
        check_base(recipe_with(**fields), config_only(quantization_config=NF4))
    check_base(recipe_with(**fields), config_only())


def test_a_base_stored_in_4_bits_trains_in_4_bits(config_only: Any) -> None:
    check_base(recipe_with(), config_only(quantization_config=NF4))


def test_a_base_that_is_quantized_in_another_way_is_not_quantized_again(config_only: Any) -> None:
    folder = config_only(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadRecipe, match="stored in gptq, which excludes load_in_4bit. .*set load_in_4bit to false"):
        check_base(recipe_with(), folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}},
            "needs code of its own .trust_remote_code",
        ),
        ({"model_type": "mine"}, r"transformers \S+ does not know the model_type 'mine'"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "vit"}, "can make no language model from the config.json"),
    ],
)
def test_a_base_that_transformers_cannot_load_is_refused(
    entries: dict[str, Any], message: str, config_only: Any
) -> None:
    with pytest.raises(BadRecipe, match=f"field 'base_model': .*{message}"):
        check_base(recipe_with(), config_only(**entries))


def test_code_of_its_own_is_not_needed_for_a_model_that_transformers_knows(config_only: Any) -> None:
    check_base(recipe_with(), config_only(auto_map={"AutoModelForCausalLM": "modeling_llama.Llama"}))
