"""Models of the architectures that people fine-tune, with random weights, and all jobs of the engine on each.

    python -m bench.architectures FOLDER [--size tiny|wide] [--engine transformers|unsloth] [NAME ...]

writes one line of JSON for each architecture into FOLDER/results.jsonl. `tiny` takes seconds on a CPU; `wide` has the
widths of published models and shows on a GPU how well memory was predicted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.train import make_rows

TINY: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = 8  # of a wide model
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MIXED_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
# transformers' config class, what a tiny model has beside TINY, and the widths of a published model
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}, {
        "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {"head_dim": 16}, {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}),
    "Gemma 3": ("Gemma3TextConfig", {"head_dim": 16, **WINDOWS}, {
        "vocab_size": 262_208, "hidden_size": 2560, "intermediate_size": 10_240, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, **MIXED_WINDOWS}),
    "Gemma 3 with images": ("Gemma3Config", {}, {}),
    "Mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 16}, {
        "vocab_size": 32_768, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None}),
    "Phi-3": ("Phi3Config", {}, {
        "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 32}),
    "Granite": ("GraniteConfig", {}, {
        "vocab_size": 49_155, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": True}),
    "GLM-4": ("Glm4Config", {"head_dim": 16}, {
        "vocab_size": 151_552, "hidden_size": 4096, "intermediate_size": 13_696, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS}, {
        "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4,
        "sliding_window": 128, **MIXED_WINDOWS}),
    "SmolLM3": ("SmolLM3Config", {}, {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_attention_heads": 16,
        "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, {
        "vocab_size": 65_536, "hidden_size": 2048, "intermediate_size": 12_288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "layer_types": ["conv", "full_attention"] * (LAYERS // 2)}),
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
RESULTS = "results.jsonl"
STEPS = 3
ROWS = 8


def config_of(name: str, wide: bool = False) -> Any:
    """Return the config of a tiny model of an architecture, or of one with the widths of a published model."""
    import transformers

    if name == "Gemma 3 with images":
        text = config_of("Gemma 3", wide).to_dict()
        return transformers.Gemma3Config(
            text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=599, boi_token_index=598,
            eoi_token_index=597,
        )  # fmt: skip
    class_name, tiny, widths = ARCHITECTURES[name]
    entries = {"num_hidden_layers": LAYERS, "max_position_embeddings": 4096, **widths} if wide else TINY | tiny
    return getattr(transformers, class_name)(**IDS, **entries)


def make_base(name: str, folder: Path, wide: bool = False) -> None:
    """Write a model with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.device("cuda" if wide else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(config_of(name, wide), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    named = {"pad_token": "<pad>", "bos_token": "<begin>", "eos_token": "<end>"}
    alphabet = [*named.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def run(name: str, work: Path, engine: str, wide: bool) -> dict[str, Any]:
    """Train on an architecture with the default recipe, packed and unpacked, and run the other jobs on the adapter.

    Returns:
        What the jobs returned, and a refusal in the place of what was refused.
    """
    from safetensors.torch import load_file

    from include.engine.compatibility import check_base
    from include.engine.generate import generate
    from include.engine.jobs import (
        GenerateJob,
        LogitsJob,
        LossesJob,
        MergedLogitsJob,
        MergeJob,
        TrainJob,
    )
    from include.engine.losses import logits, losses
    from include.engine.merge import merge, merged_logits
    from include.errors import BadRecipe
    from include.recipe import Recipe, validate_recipe

    base, rows, prompts = work / "base", [work / "rows" / "00000.arrow"], [[5, 6, 7, 8], [9, 10, 11]]
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    found: dict[str, Any] = {"name": name, "model_type": model_type, "engine": engine}

    def recipe(**fields: Any) -> Recipe:
        fields = {"max_steps": STEPS, "warmup_steps": 0, "max_seq_length": 2048, "max_new_tokens": 4, **fields}
        return validate_recipe({"name": "x", "base_model": name, "engine": engine, **fields}, "x")

    def train(kind: str, **fields: Any) -> Any:
        out = work / kind
        job = TrainJob(
            recipe=recipe(**modules, **fields), base=base, base_name=name, base_revision=None, tokenizer=base,
            rows=rows, holdout=rows, out=out, run_name=name,
        )  # fmt: skip
        began = time.monotonic()
        try:
            result = _train(job)
        except Exception as error:
            if not isinstance(error, BadRecipe):
                raise
            return {"refused": str(error)}
        log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
        return {
            "losses": [entry["loss"] for entry in log], "seconds": time.monotonic() - began,
            "peak_gib": result.peak_memory_bytes / 2**30, "predicted_gib": result.plan.predicted_bytes / 2**30,
            "plan": result.plan.as_dict(),
        }  # fmt: skip

    modules: dict[str, Any] = {}
    try:
        check_base(recipe(), base)
    except BadRecipe as error:
        found["resolve"], modules = str(error), {"target_modules": "all-linear"}
        check_base(recipe(**modules), base)
    # one micro-batch holds all rows, packed or not, so that the first losses can be compared
    whole = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
    found["unpacked"] = train("unpacked", **whole, fit_device=wide)
    found["packed"] = train("packed", per_device_train_batch_size=2, gradient_accumulation_steps=1, packing=True)
    adapter = work / "unpacked" / "adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    found["adapted"] = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in weights})
    found["beside_the_text_model"] = sorted(key for key in weights if "vision" in key or "projector" in key)
    found["untrained"] = [key for key, value in weights.items() if "lora_B" in key and not value.any()]
    quiet: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    small = recipe(**modules)
    answers = generate(GenerateJob(small, base, adapter, prompts, [2], 0), quiet)
    found["answers"] = [len(answer) for answer in (*answers.base, *answers.adapter)]
    measured = losses(LossesJob(small, base, rows, ROWS, {"adapter": adapter}), quiet).losses
    found["loss"] = {key: sum(values) / len(values) for key, values in measured.items()}
    found["reloaded"] = logits(LogitsJob(small, base, adapter, adapter, prompts), quiet).largest_difference
    merge(MergeJob(base, adapter, work / "merged"), quiet)
    found["merged_kl"] = merged_logits(MergedLogitsJob(base, adapter, work / "merged", prompts), quiet).kl
    return found


def _train(job: Any) -> Any:
    import torch

    from include.engine import supervise
    from include.engine.train import train

    if torch.cuda.is_available():  # Unsloth and Liger change transformers and PyTorch: training has its own process
        return supervise.run(job, job.out, lambda _: None)
    return train(job, lambda *_, **__: None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["tiny", "wide"], default="tiny")
    parser.add_argument("--engine", choices=["transformers", "unsloth"], default="transformers")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_intermixed_args()
    wide = arguments.size == "wide"
    for name in arguments.names or ARCHITECTURES:
        work = arguments.folder / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        make_base(name, work / "base", wide)
        make_rows(str(work / "rows"), str(ROWS), "2040" if wide else "200", "8000" if wide else "590")
        result = run(name, work, arguments.engine, wide)
        with (arguments.folder / RESULTS).open("a") as file:
            file.write(json.dumps(result) + "\n")
        if wide:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
