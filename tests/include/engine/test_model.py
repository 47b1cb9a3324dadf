"""Models as they are loaded: a base with a new adapter, trained adapters, and what cannot be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.architectures import make_base
from include.engine.compatibility import check_base
from include.engine.device_plan import Device, Plan
from include.engine.model import _check_adapted, load_base, load_trainable, variants
from include.errors import BadRecipe, NotFound
from include.recipe import MODULE_SETS, PROJECTIONS, validate_recipe

CPU_PLAN = Plan(
    device="cpu", device_name="", dtype="float32", engine="transformers", optim="adamw_torch",
    gradient_checkpointing=False, micro_batch=2, accumulation=4,
)  # fmt: skip


def test_embeddings_and_head_get_an_adapter_that_loads_answers_and_merges_also_where_they_are_tied(
    small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    recipe = small_recipe(target_modules="comprehensive", merged_16bit=True, max_steps=20)
    lineage = pipeline(recipe)
    weights = load_file(artifact(lineage, "train").local() / "adapter" / "adapter_model.safetensors")
    trained = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in weights}
    assert trained == set(MODULE_SETS["comprehensive"]), "and no weights of the base"
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_embedding_A" in name)
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lm_head.lora_B" in name)
    assert artifact(lineage, "evaluate").metadata.verdict.publish
    verified = artifact(lineage, "verify").metadata
    assert verified.largest_difference == 0
    assert verified.merged.kl < 1e-3, "merged, the tied head would have got the embeddings' change"


def test_layers_that_are_trained_whole_leave_the_base_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    recipe = validate_recipe(
        {"name": "x", "target_modules": ["all-linear"], "modules_to_save": ["embed_tokens"], "load_in_4bit": False}, "x"
    )
    plain = recipe.model_copy(update={"modules_to_save": []})
    ids, device = torch.tensor([[5, 6, 7, 8]]), Device(device="cpu", device_name="", dtype="float32")
    adapters = {}
    for name, fields in (("one", recipe), ("other", plain)):
        model = load_trainable(tiny_base, fields, CPU_PLAN)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name)
        adapters[name] = tmp_path / name
        assert set(model.peft_config["default"].target_modules) == set(PROJECTIONS)
    with torch.inference_mode():
        alone = {
            name: model(ids).logits for name, model in variants(tiny_base, {"other": adapters["other"]}, device, 16)
        }
        after = {name: model(ids).logits for name, model in variants(tiny_base, adapters, device, 16)}
    assert torch.equal(alone["other"], after["other"]), "the first adapter's embeddings do not stay in the base"
    assert not torch.equal(after["one"], after["other"])


def test_an_adapter_of_other_layers_than_the_named_ones_is_noticed(tiny_base: Path) -> None:
    fields = {"name": "x", "target_modules": ["q_proj", "self_attn.v_proj"], "load_in_4bit": False}
    model = load_trainable(tiny_base, validate_recipe(fields, "x"), CPU_PLAN)
    _check_adapted(model, ["q_proj", "self_attn.v_proj"])
    with pytest.raises(BadRecipe, match="field 'engine': .* than target_modules names: none to k_proj. Set"):
        _check_adapted(model, ["q_proj", "v_proj", "k_proj"])
    with pytest.raises(BadRecipe, match=r"names: one to base_model.model.model.layers.0.self_attn.v_proj. Set"):
        _check_adapted(model, ["q_proj"])


def test_a_missing_base_and_a_wrong_projection_are_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="field 'base_model': .* cannot be loaded"):
        load_base(tmp_path, Device(device="cpu", device_name="", dtype="float32"))
    recipe = validate_recipe({"name": "x", "target_modules": ["w_proj"], "load_in_4bit": False}, "x")
    with pytest.raises(BadRecipe, match="field 'target_modules'"):
        load_trainable(tiny_base, recipe, CPU_PLAN)


def test_gpt_oss_trains_from_weights_that_are_stored_in_mxfp4(tmp_path: Path) -> None:
    make_base("gpt-oss", tmp_path)
    _store_experts_as_mxfp4(tmp_path)
    fields: dict[str, Any] = {"name": "x", "base_model": "owner/gpt-oss", "target_modules": "all-linear"}
    with pytest.raises(BadRecipe, match="stored in mxfp4, which excludes load_in_4bit. .* set load_in_4bit to false"):
        check_base(validate_recipe(fields, "x"), tmp_path)
    recipe = validate_recipe({**fields, "load_in_4bit": False}, "x")
    check_base(recipe, tmp_path)
    model = load_trainable(tmp_path, recipe, CPU_PLAN)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def _store_experts_as_mxfp4(folder: Path) -> None:
    """Give a model of gpt-oss experts in blocks of 32 values of 4 bits, with a scale each, as OpenAI publishes them."""
    weights, stored = load_file(folder / "model.safetensors"), {}
    for name, tensor in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(118, 122, blocks, dtype=torch.uint8)
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
