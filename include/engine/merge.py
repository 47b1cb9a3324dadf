"""Jobs about the merged model: make it from base and adapter in 16 bits, and compare it with them."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from include.engine.device_plan import make_plan
from include.engine.model import load_adapter, load_base

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*")


def merge(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """Write the model that base and adapter make together: 16-bit weights in safetensors, with the adapter's tokenizer.

    The base is the one in 16 bits, also where training saw it in fewer: what the adapter adds goes into its weights.

    Args:
        job: `recipe`, `base`, `adapter`, `out` (folders; the last is made).

    Returns:
        `dtype` of the weights.
    """
    dtype, model = _base_and_adapter(job)
    merged = model.merge_and_unload(safe_merge=True)
    out = Path(job["out"])
    merged.save_pretrained(str(out), safe_serialization=True)
    for pattern in TOKENIZER_FILES:
        for file in Path(job["adapter"]).glob(pattern):
            shutil.copy(file, out)
    say(f"base and adapter merged, {dtype}")
    return {"dtype": dtype}


def merged_logits(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """How far a merged model, loaded as its users load it, is from base and adapter, on the same ids.

    Args:
        job: `recipe`, `base`, `adapter`, `merged` (folders), `prompts` (token ids).

    Returns:
        `kl`: mean Kullback-Leibler divergence over all positions, nats; `same_tokens`: share of positions where the
        likeliest token is the same.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def read(model: Any) -> list[Any]:
        model.eval()
        with torch.inference_mode():
            prompts = [torch.tensor([ids], device=model.device) for ids in job["prompts"]]
            return [model(input_ids=ids).logits[0].float().log_softmax(-1).cpu() for ids in prompts]

    dtype, model = _base_and_adapter(job)
    device = model.device
    together = torch.cat(read(model))
    del model  # one model at a time in memory
    gc.collect()
    merged = AutoModelForCausalLM.from_pretrained(
        job["merged"], dtype=getattr(torch, dtype), device_map={"": device}, use_safetensors=True
    )
    alone = torch.cat(read(merged))
    kl = (together.exp() * (together - alone)).sum(-1).mean().item()
    return {"kl": kl, "same_tokens": (together.argmax(-1) == alone.argmax(-1)).float().mean().item()}


def _base_and_adapter(job: dict[str, Any]) -> tuple[str, Any]:
    """The base in 16 bits with the adapter on it, and the name of the type: the base's own where it has 16 bits."""
    config = orjson.loads((Path(job["base"]) / "config.json").read_bytes())
    own = config.get("dtype") or config.get("torch_dtype")
    dtype = own if own in ("float16", "bfloat16") else "bfloat16"
    recipe = {**job["recipe"], "engine": "transformers", "load_in_4bit": False, "load_in_8bit": False}
    plan = replace(make_plan(recipe), dtype=dtype)
    return dtype, load_adapter(load_base(job["base"], recipe, plan), job["adapter"])
