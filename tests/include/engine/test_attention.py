"""Packed rows on a GPU: PyTorch's variable-length kernel gives each row what it has alone, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from bench.architectures import config_of
from include.engine.attention import join_rows
from include.errors import BadRecipe


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
@pytest.mark.parametrize("window", [None, 16])
def test_packed_rows_have_the_logits_and_gradients_that_they_have_alone(window: int | None) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.2,
    }  # fmt: skip
    config = MistralConfig(**shape, sliding_window=window) if window else LlamaConfig(**shape)
    model: Any = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)
    rows = [torch.randint(0, 512, (1, length), device="cuda") for length in (70, 1, 129, 33)]
    alone = torch.cat([model(row).logits for row in rows], 1)
    alone.float().pow(2).mean().backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    join_rows(model)
    positions = torch.cat([torch.arange(row.shape[1], device="cuda") for row in rows])[None]
    packed = model(torch.cat(rows, 1), position_ids=positions).logits
    packed.float().pow(2).mean().backward()
    found = model.model.layers[0].self_attn.q_proj.weight.grad
    assert (packed - alone).abs().max() < 0.02 * alone.abs().max()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    seeing = model(torch.cat(rows, 1), position_ids=torch.arange(positions.shape[1], device="cuda")[None]).logits
    assert (seeing - alone).abs().max() > 0.2 * alone.abs().max(), "it would show if a row saw the ones before it"


def test_a_base_whose_attention_has_sinks_is_not_packed_wrongly() -> None:
    model = AutoModelForCausalLM.from_config(config_of("gpt-oss"))
    join_rows(model)
    with pytest.raises(BadRecipe, match="field 'packing': the base's attention has s_aux"):
        model(torch.zeros(1, 4, dtype=torch.long), position_ids=torch.arange(4)[None])
