"""Time several ways to train the same adapter on the same rows, on the device at hand: `make bench-train`.

On a GPU: a random-weight Llama-3.2-3B (weights change neither speed nor memory), 4-bit, r=16 on seven projections, rows
of FineTome's lengths. On a CPU: a tiny Llama, which shows that the ways run and how they compare there, and
nothing about a GPU. Each way runs in a process of its own, --repeats times in turn; the first steps, which compile and
warm up, do not count. The ways:

- plain: transformers, PEFT, bitsandbytes as the tutorial has them (2 x 4, gradient checkpointing);
- reference: Unsloth with the reference recipe's settings (2 x 4, its gradient checkpointing);
- Retune: the same recipe as the planner fits it to the device, the effective batch of 8 held;
- Retune in 8 GB: the same with no more than 8 GiB of the device's memory;
- TRL: its own fastest settings, without Retune: 4 x 2,048 packed, Liger's kernels, no checkpointing;
- Retune packed: the planner's choice for 16 packed sequences of 2,048 tokens in each step;
- Unsloth packed: the same with Unsloth;
- Retune packed, fused: the same with adamw_torch_fused in place of adamw_8bit, which waits for the GPU at every matrix.
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
TRAINED = 5 / 8  # of the tokens of `make_rows`
LIMIT = 790e12 / (4 * 3.2e9)  # tokens/s: measured FLOP/s of an H200 over the FLOPs of a token, forward and backward
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
             "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    "cpu": {"vocab_size": 8_192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
ROWS = "rows/00000.arrow"
AS_WRITTEN = {"fit_device": False, "kernels": "plain"}
PACKED = {"packing": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"engine": "transformers", **AS_WRITTEN},
    "reference": {"engine": "unsloth", **AS_WRITTEN},
    "Retune": {"engine": "auto"},
    "Retune in 8 GB": {"engine": "auto", "device_memory_gib": 8},
    "TRL": {"packing": True},
    "Retune packed": PACKED,
    "Unsloth packed": {**PACKED, "engine": "unsloth"},
    "Retune packed, fused": {**PACKED, "optim": "adamw_torch_fused"},
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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def make_rows(folder: str, rows: str, longest: str, vocabulary: str = "8000") -> None:
    """Write prepared rows: random ids below `vocabulary`, 5 of 8 trained. Lengths are like FineTome's (mean 378, median
    282 tokens) if `longest` is 2,040, and in proportion otherwise.
    """
    import numpy as np

    from include.chat.tokenized import Encoded, batch, write_rows

    random = np.random.default_rng(0)
    lengths = (np.clip(random.lognormal(5.8, 0.75, int(rows)), 20, 2040) * int(longest) / 2040).astype(int)
    ends, numbers = lengths.cumsum(), np.arange(len(lengths))
    ids = random.integers(10, int(vocabulary), ends[-1]).astype(np.int32)
    trained = np.arange(len(ids)) - np.repeat(ends - lengths, lengths) >= np.repeat(lengths * 3 // 8, lengths)
    Path(folder).mkdir()
    write_rows(Path(folder) / "00000.arrow", [batch(Encoded(ids, trained, ends), numbers, numbers)])


def train(fields: dict[str, Any], work: Path, out: Path) -> dict[str, Any]:
    """Run the train job of the engine, and read its log.

    Args:
        fields: of the recipe; the others have their defaults.

    Raises:
        RetuneError: the training failed.
    """
    from include.engine import supervise
    from include.engine.jobs import TrainJob
    from include.recipe import validate_recipe

    job = TrainJob(
        recipe=validate_recipe({"name": "bench", **fields}, "bench"), base=work / "base", base_name="bench",
        base_revision=None, tokenizer=work / "base", rows=[work / ROWS], holdout=[work / ROWS], out=out,
        run_name="bench",
    )  # fmt: skip
    began = time.monotonic()
    result = supervise.run(job, out, lambda _: None)
    seconds = time.monotonic() - began
    entries = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return _rates(entries) | {
        "first_step_after": seconds - result.seconds + entries[0]["seconds"],
        "peak_gib": result.peak_memory_bytes / 2**30, "predicted_gib": result.plan.predicted_bytes / 2**30,
        "plan": result.plan.as_dict(),
    }  # fmt: skip


def _rates(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rates of a training log (tokens without padding) without its first steps, and its last loss."""
    first, last = entries[SKIPPED - 1], entries[-1]
    seconds = last["seconds"] - first["seconds"]
    return {
        "tokens_per_second": (last["tokens"] - first["tokens"]) / seconds,
        "seconds_per_step": seconds / (last["step"] - first["step"]), "loss": last["loss"],
    }  # fmt: skip


def trl(folder: str, out: str, steps: str, length: str) -> None:
    """Train with TRL alone, with its fastest settings; write what `train` returns."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer, pack_dataset

    from include.chat.tokenized import load_rows
    from include.recipe import PROJECTIONS

    class Meter(TrainerCallback):
        def __init__(self) -> None:
            self.entries: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                self.entries.append(
                    {"step": state.global_step, "tokens": int(state.num_input_tokens_seen), "seconds": time.monotonic(),
                     "loss": float(logs["loss"])}
                )  # fmt: skip

    began, gpu, meter = time.monotonic(), torch.cuda.is_available(), Meter()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/base", quantization_config=quantization, device_map={"": 0 if gpu else "cpu"},
        dtype=torch.bfloat16 if gpu else torch.float32,
    )  # fmt: skip
    rows = load_rows([Path(folder) / ROWS])
    trainer = SFTTrainer(
        model=model, processing_class=AutoTokenizer.from_pretrained(f"{folder}/base"), callbacks=[meter],
        train_dataset=pack_dataset(rows.select_columns(["input_ids", "labels"]), int(length)),
        peft_config=LoraConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM", target_modules=PROJECTIONS),
        args=SFTConfig(
            output_dir=out, per_device_train_batch_size=4, max_steps=int(steps), warmup_steps=5,
            learning_rate=2e-4, optim="adamw_torch_fused" if gpu else "adamw_torch", bf16=gpu, use_cpu=not gpu,
            use_liger_kernel=gpu, gradient_checkpointing=False, packing=True, max_length=int(length), report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True}, include_num_input_tokens_seen="non_padding",
            logging_steps=1, save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    found = _rates(meter.entries) | {
        "first_step_after": meter.entries[0]["seconds"] - began, "peak_gib": peak / 2**30, "predicted_gib": 0.0,
        "plan": None,
    }  # fmt: skip
    Path(out).mkdir(exist_ok=True)
    Path(out, "found.json").write_text(json.dumps(found))


def _alone(function: list[str]) -> Any:
    """Call a function of this module, with its arguments, in a process of its own; return what it wrote, if it did."""
    with tempfile.TemporaryFile("w+") as log:
        try:
            subprocess.run(
                [sys.executable, "-m", "bench.train", *function], check=True, cwd=PROJECT, stdout=log, stderr=log
            )
        except subprocess.CalledProcessError:
            log.seek(0)
            print(log.read()[-2000:], flush=True)
            raise
    written = Path(function[2]) / "found.json"
    return json.loads(written.read_text()) if written.is_file() else None


def main() -> None:
    """Run the ways in turn, print the table, write bench/train.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--add", action="store_true", help="keep the runs in --out, which must be of the same device")
    parser.add_argument("--out", help="bench/train.json on a GPU, var/train.json elsewhere")
    arguments = parser.parse_args()
    import torch

    from include.errors import RetuneError

    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    device, length = ("cuda", 2048) if torch.cuda.is_available() else ("cpu", 256)
    if not arguments.out:
        arguments.out = PROJECT / ("bench" if device == "cuda" else "var") / "train.json"
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU: a tiny Llama on the CPU"
    print(f"{name}, torch {torch.__version__}")
    runs: dict[str, list[Any]] = {way: [] for way in WAYS}
    if arguments.add:
        before = json.loads(Path(arguments.out).read_text())
        if before["device"] != name:
            parser.error(f"{arguments.out} was measured on another device, {before['device']}")
        runs.update({way: found["runs"] for way, found in before["ways"].items()})
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for function in (
            ["make_base", str(work / "base"), device],
            ["make_rows", str(work / "rows"), "4000", str(length - 8)],
        ):
            _alone(function)
        print(
            f"{'way':<24} {'tokens/s':>9} {'trained/s':>9} {'of limit':>8} {'peak GiB':>8} {'predicted':>9} "
            f"{'first step':>10} {'loss':>7}"
        )
        for repeat in range(arguments.repeats):
            for way in arguments.ways:
                if device == "cpu" and WAYS[way].get("engine") == "unsloth":
                    continue
                fields = {**WAYS[way], "max_steps": arguments.steps, "save_steps": arguments.steps * 2,
                          "max_seq_length": length}  # fmt: skip
                out = work / f"{way} {repeat}"
                try:
                    if way == "TRL":
                        found = _alone(["trl", str(work), str(out), str(arguments.steps), str(length)])
                    else:
                        found = train(fields, work, out)
                except (RetuneError, subprocess.CalledProcessError) as error:
                    print(f"{way:<24} failed: {error}", flush=True)
                    continue
                runs[way].append(found)
                rate = found["tokens_per_second"]
                share = f"{rate / LIMIT:.1%}" if device == "cuda" else ""
                print(
                    f"{way:<24} {rate:>9,.0f} {rate * TRAINED:>9,.0f} {share:>8} "
                    f"{found['peak_gib']:>8.1f} {found['predicted_gib']:>9.1f} {found['first_step_after']:>9.0f}s "
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
    Path(arguments.out).parent.mkdir(exist_ok=True)
    Path(arguments.out).write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    functions = {function.__name__: function for function in (make_base, make_rows, trl)}
    if sys.argv[1:2] and sys.argv[1] in functions:
        functions[sys.argv[1]](*sys.argv[2:])
    else:
        main()
