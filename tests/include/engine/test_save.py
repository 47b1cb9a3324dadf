"""A saved model and its adapter compute the same with transformers 4.57 as with 5, whatever family they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from include.engine.save import save_model, with_older_names
from include.reporting.model_card import also_tested_with
from tests.services.loading import load
from tests.services.older_packages import load_with_older_packages

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 4,
    "pad_token_id": 4, "sliding_window": 8,
}  # fmt: skip
EACH_KIND = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16}
# as transformers 4 wrote them; the tested positions are beyond the original lengths
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {"rope_theta": 1000000.0, "tie_word_embeddings": False},
    "qwen3_moe": {"rope_theta": 50000.0, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "phi3": {
        "rope_theta": 20000.0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
    },
    "gemma3_text": {
        "rope_theta": 1000000.0, "rope_local_base_freq": 20000.0, "query_pre_attn_scalar": 16,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layer_types": EACH_KIND,
    },
    "gpt_oss": {
        "rope_theta": 150000.0, "rope_scaling": YARN, "layer_types": EACH_KIND, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip
ONLY_OLDER_NAMES = {"qwen3_moe", "phi3"}  # transformers 4 needs more, which only the base's own config.json names
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_EXPERTS = {"qwen3_moe"}  # PEFT adapts them as one tensor, which transformers 4 has not; merged, they fit
IDS = [5 + (7 * i * i + 3 * i) % 59 for i in range(48)]


Saved = dict[str, tuple[Path, torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Models and adapters with random weights, saved in `saved/` and `adapter/` of a folder (`merged/` has both); for
    each family the folder, and the logits (positions x vocabulary) of the model and of the model with its adapter.
    """
    made = {}
    for family, settings in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        (folder / "base").mkdir()
        quantized = {"quantization_config": {"quant_method": "gptq"}, "auto_map": {"AutoModel": "code.Model"}}
        written = {"model_type": family, **SIZES, **settings}
        (folder / "base" / "config.json").write_text(json.dumps(written))
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "base")).float().eval()
        for weight in model.parameters():
            weight.data *= 8 if weight.dim() > 1 else 1  # attention looks at positions
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([IDS])).logits[0]
        # what a base may say and the saved model must not
        (folder / "base" / "config.json").write_text(json.dumps({**written, **quantized}))
        save_model(model, folder / "base", folder / "saved")
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS)).eval()
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.normal_()
        adapted.save_pretrained(str(folder / "adapter"))
        with torch.inference_mode():
            made[family] = folder, logits, adapted(input_ids=torch.tensor([IDS])).logits[0]
        if family in FUSED_EXPERTS:
            save_model(adapted.merge_and_unload(), folder / "base", folder / "merged")
    return made


def test_both_generations_of_transformers_compute_the_logits_of_what_was_saved(saved: Saved) -> None:
    jobs, expected = [], []
    for folder, plain, adapted in saved.values():
        model = {"model": str(folder / "saved"), "ids": IDS}
        with_adapter = {"adapter": str(folder / "adapter")}
        jobs += [model, model | ({"model": str(folder / "merged")} if (folder / "merged").exists() else with_adapter)]
        assert bool(also_tested_with(folder / "adapter")) is not (folder / "merged").exists()
        assert also_tested_with(folder / "saved")
        expected += [plain, adapted]
        assert plain.std() > 0.5 and (plain - adapted).abs().max() > 0.5, "a difference would be seen"
    for job, logits, old, new in zip(jobs, expected, load_with_older_packages(jobs), map(load, jobs), strict=True):
        assert (old["versions"]["transformers"], new["versions"]["transformers"]) == ("4.57.3", "5.17.0")
        for found in (old, new):
            torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-4, rtol=0, msg=str(job))
        assert (old["answer"], old["dtype"]) == (new["answer"], new["dtype"]), job


def test_config_json_has_the_names_of_both_generations(saved: Saved) -> None:
    config = {name: json.loads((folder / "saved" / "config.json").read_text()) for name, (folder, *_) in saved.items()}
    llama = config["llama"]
    assert (llama["rope_theta"], llama["rope_scaling"]) == (500000.0, FAMILIES["llama"]["rope_scaling"])
    assert llama["rope_parameters"] == {"rope_theta": 500000.0, **llama["rope_scaling"]}
    assert llama["dtype"] == llama["torch_dtype"] == "float32", "of the saved weights, not of the base's"
    assert config["gemma3_text"]["rope_local_base_freq"] == 20000.0
    for family in config:
        assert not {"quantization_config", "auto_map"} & set(config[family])
        assert config[family]["architectures"] and config[family]["transformers_version"] == "5.17.0"


def test_a_base_that_transformers_5_wrote_gets_the_older_names_too(saved: Saved) -> None:
    for family in set(FAMILIES) - ONLY_OLDER_NAMES:
        config = json.loads((saved[family][0] / "saved" / "config.json").read_text())
        older = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "torch_dtype"}
        newer = {name: value for name, value in config.items() if name not in older}
        assert with_older_names(newer, newer) == config, family


def test_the_parts_of_a_model_and_models_without_rope() -> None:
    text = {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    vision = {"model_type": "siglip", "rope_parameters": None}
    found = with_older_names(
        {"model_type": "gemma3", "text_config": text, "vision_config": vision, "dtype": "bfloat16"},
        {"text_config": {"num_experts": 4}, "vision_config": {}, "_name_or_path": "/home/x"},
    )
    assert found["text_config"] == {**text, "rope_theta": 7.0, "rope_scaling": None, "num_experts": 4}
    assert found["vision_config"] == vision
    assert set(found) == {"model_type", "text_config", "vision_config", "dtype", "torch_dtype"}
