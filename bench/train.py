"""Ways to train the same adapter on the same rows, on the device at hand: `make bench-train`.

On a GPU: a random-weight Llama-3.2-3B (weights change neither speed nor memory), 4-bit, r=16 on seven projections, rows
of FineTome's lengths. Elsewhere a tiny Llama, which shows that the ways run and what they cost beside each other, and
nothing about a GPU. Each setting is a process of its own, in turn, as often as --repeats says; the first steps, which
compile and warm up, are left out. The ways:

- plain: transformers, PEFT, bitsandbytes as the tutorial has them (2 x 4, gradient checkpointing);
- reference: Unsloth with the reference recipe's settings (2 x 4, its gradient checkpointing);
- Retune: the same recipe as the planner fits it to the device, the effective batch of 8 held;
- Retune in 8 GB: the same with no more than 8 GiB of the device's memory;
- TRL packed: TRL's own fastest here: 4 x 2,048 packed, Liger's kernels, no checkpointing, a mask;
- Retune packed: the planner's choice for 16 packed sequences of 2,048 tokens in each step;
- Retune packed, compiled: the same with torch_compile and adamw_torch_fused.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
SKIPPED = 4  # steps
LIMIT = 790e12 / (4 * 3.2e9)  # tokens/s: measured FLOP/s of an H200 over the FLOPs of a token, forward and backward
SIZES = {
    "cuda": {"vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
             "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    "cpu": {"vocab_size": 8_192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
AS_WRITTEN = {"fit_device": False}
PACKED = {"packing": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"engine": "transformers", **AS_WRITTEN},
    "reference": {"engine": "unsloth", **AS_WRITTEN},
    "Retune": {"engine": "auto"},
    "Retune in 8 GB": {"engine": "auto", "device_memory_gb": 8},
    "TRL packed": {"engine": "transformers", "packing": True, "per_device_train_batch_size": 4,
                   "gradient_accumulation_steps": 1, "optim": "adamw_torch_fused", **AS_WRITTEN},
    "Retune packed": PACKED,
    "Retune packed, compiled": {**PACKED, "torch_compile": True, "optim": "adamw_torch_fused"},
}  # fmt: skip


def make_base(folder: str, device: str) -> None:
    """Write a Llama with random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[device], tie_word_embeddings=True, max_position_embeddings=4096))
    model.save_pretrained(folder)
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "<end>"]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def make_rows(folder: str, rows: str) -> None:
    """Write prepared rows: random ids, lengths like FineTome's (mean 378, median 282 tokens), 5 of 8 trained."""
    import numpy as np

    from include.chat import Encoded
    from include.rows import batch, write

    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.8, 0.75, int(rows)), 20, 2040).astype(int)
    ends, numbers = lengths.cumsum(), np.arange(len(lengths))
    ids = random.integers(10, 8000, ends[-1]).astype(np.int32)
    trained = np.arange(len(ids)) - np.repeat(ends - lengths, lengths) >= np.repeat(lengths * 3 // 8, lengths)
    Path(folder).mkdir()
    write(Path(folder) / "00000.arrow", [batch(Encoded(ids, trained, ends), numbers, numbers)])


def train(recipe: dict[str, Any], work: Path, out: Path) -> dict[str, Any]:
    """Run the train job of the engine, and read its log.

    Raises:
        RetuneError: it failed.
    """
    from include.engine import supervise

    job = {
        "recipe": recipe, "base": work / "base", "base_name": "bench", "base_revision": None,
        "tokenizer": work / "base", "rows": work / "rows", "holdout": work / "rows", "out": out,
    }  # fmt: skip
    began = time.monotonic()
    done = supervise.run("train", job, out, lambda _: None)
    seconds = time.monotonic() - began
    entries = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    first, last = entries[SKIPPED - 1], entries[-1]
    return {
        "tokens_per_second": (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]),
        "seconds_per_step": (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]),
        "first_step_after": seconds - done["seconds"] + entries[0]["seconds"],
        "peak_gib": done["peak_memory_bytes"] / 2**30, "predicted_gib": done["plan"]["predicted_bytes"] / 2**30,
        "loss": last["loss"], "plan": done["plan"],
    }  # fmt: skip


def main() -> None:
    """Run the ways in turn, print the table, write bench/train.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", default=str(PROJECT / "bench" / "train.json"))
    arguments = parser.parse_args()
    import torch

    from include.errors import RetuneError
    from include.recipe import check

    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = check({"name": "bench"}, "bench").model_dump(mode="json")
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU: a tiny Llama on the CPU"
    print(f"{name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for function in (["make_base", str(work / "base"), device], ["make_rows", str(work / "rows"), "2000"]):
            subprocess.run([sys.executable, "-m", "bench.train", *function], check=True, cwd=PROJECT)
        runs: dict[str, list[Any]] = {way: [] for way in arguments.ways}
        print(
            f"{'way':<16} {'tokens/s':>9} {'s/step':>7} {'peak GiB':>9} {'predicted':>9} {'first step':>10} {'loss':>7}"
        )
        for repeat in range(arguments.repeats):
            for way in arguments.ways:
                if device == "cpu" and WAYS[way]["engine"] == "unsloth":
                    continue
                fields = {**recipe, **WAYS[way], "max_steps": arguments.steps, "save_steps": arguments.steps * 2}
                try:
                    found = train(fields, work, work / f"{way} {repeat}")
                except RetuneError as error:
                    print(f"{way:<16} failed: {error}", flush=True)
                    continue
                runs[way].append(found)
                print(
                    f"{way:<16} {found['tokens_per_second']:>9,.0f} {found['seconds_per_step']:>7.2f} "
                    f"{found['peak_gib']:>9.1f} {found['predicted_gib']:>9.1f} {found['first_step_after']:>9.0f}s "
                    f"{found['loss']:>7.3f}", flush=True,
                )  # fmt: skip
    summary = {
        "device": name, "torch": torch.__version__, "steps": arguments.steps,
        "ways": {
            way: {
                "tokens_per_second": statistics.median(run["tokens_per_second"] for run in found),
                "share_of_limit": statistics.median(run["tokens_per_second"] for run in found) / LIMIT
                if device == "cuda" else None,
                "runs": found,
            }
            for way, found in runs.items() if found
        },
    }  # fmt: skip
    Path(arguments.out).write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make_base"]:
        make_base(*sys.argv[2:])
    elif sys.argv[1:2] == ["make_rows"]:
        make_rows(*sys.argv[2:])
    else:
        main()
