"""Jobs of the merged model: make it from base and adapter in 16 bits, and compare it with them."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from include.chat.tokenizer import copy_tokenizer
from include.engine.compatibility import HEAD_AND_EMBEDDINGS
from include.engine.device_plan import Device, find_device
from include.engine.jobs import MergedLogitsJob, MergedLogitsResult, MergeJob, MergeResult, Progress
from include.engine.model import load_adapter, load_base
from include.engine.new_tokens import make_room, tokens_of_adapter
from include.engine.save import save_model


def merge(job: MergeJob, progress: Progress) -> MergeResult:
    """Write the model that base and adapter make together: 16-bit weights in safetensors, with the adapter's tokenizer.

    The base is loaded in 16 bits even if training used fewer, since the adapter's update is added to its weights.

    Raises:
        NotFound: the base or the adapter cannot be loaded.
    """
    device, model = _base_and_adapter(job.base, job.adapter)
    _untie(model)
    save_model(model.merge_and_unload(safe_merge=True), job.base, job.out)
    copy_tokenizer(job.adapter, job.out)
    progress(f"base and adapter merged, {device.dtype}")
    return MergeResult(dtype=device.dtype)


def merged_logits(job: MergedLogitsJob, progress: Progress) -> MergedLogitsResult:
    """Compare a merged model, loaded as its users load it, with base and adapter, on the same ids.

    Raises:
        NotFound: the base or the adapter cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def log_probabilities(model: Any) -> Any:  # positions x vocabulary
        model.eval()
        with torch.inference_mode():
            prompts = [torch.tensor([ids], device=model.device) for ids in job.prompts]
            return torch.cat([model(input_ids=ids).logits[0].float().log_softmax(-1).cpu() for ids in prompts])

    device, model = _base_and_adapter(job.base, job.adapter)
    place = model.device
    separate = log_probabilities(model)
    del model  # one model at a time in memory
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(
        job.merged, dtype=getattr(torch, device.dtype), device_map={"": place}, use_safetensors=True
    )
    merged = log_probabilities(model)
    kl = (separate.exp() * (separate - merged)).sum(-1).mean().item()
    return MergedLogitsResult(kl=kl, same_tokens=(separate.argmax(-1) == merged.argmax(-1)).float().mean().item())


def _untie(model: Any) -> None:
    """Give the head weights of its own, if the adapter changes it or the embeddings and the base ties the two: merged,
    one would change with the other."""
    import torch

    config, lora = model.config, model.peft_config["default"]
    changed = {*(lora.target_modules or ()), *(lora.modules_to_save or ())}
    if not config.get_text_config().tie_word_embeddings or not changed & set(HEAD_AND_EMBEDDINGS):
        return
    head = model.get_base_model().get_output_embeddings()
    own = getattr(head, "original_module", getattr(head, "base_layer", head))  # below PEFT's wrapper
    own.weight = torch.nn.Parameter(own.weight.detach().clone())
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings = False


def _base_and_adapter(base: Path, adapter: Path) -> tuple[Device, Any]:
    """Return the base in 16 bits with the adapter, and the device; its dtype is the base's own if that has 16 bits."""
    config = orjson.loads((base / "config.json").read_bytes())
    own = config.get("dtype") or config.get("torch_dtype")
    device = replace(find_device(), dtype=own if own in ("float16", "bfloat16") else "bfloat16")
    model = load_base(base, device)
    make_room(model, tokens_of_adapter(adapter))
    return device, load_adapter(model, adapter)
