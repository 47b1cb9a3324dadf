"""Time several ways to train the same adapter on the same rows, on the device at hand: `make bench-train`.

On a GPU: a random-weight Llama-3.2-3B (weights change neither speed nor memory), 4-bit, r=16 on seven projections, rows
of FineTome's lengths. On a CPU: a tiny Llama, which shows that the ways run and how they compare there, and
nothing about a GPU. Each way runs in a process of its own, --repeats times in turn. The first steps, in which kernels
are compiled and graphs are captured, do not count. The ways:

- reference: Unsloth with the reference recipe's settings (2 x 4, its gradient checkpointing);
- Retune: the same recipe as the planner fits it to the device, the effective batch of 8 held;
- Retune in 8 GB: the same with no more than 8 GiB of the device's memory;
- Unsloth 8 x 1: the same with Unsloth;
- TRL: its own fastest settings, without Retune: 4 x 2,048 packed, Liger's kernels, no checkpointing;
- plain packed: 16 packed sequences of 2,048 tokens in each step, by transformers, PEFT and Liger (`kernels: plain`);
- Retune packed: the planner's choice for them;
- Retune packed, 8B: 8 packed sequences of 4,096 tokens, a random-weight Llama-3.1-8B;
- two GPUs: twice the sequences of each step, so that each GPU has as many as above.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
TRAINED = 5 / 8  # of the tokens of `make_rows`
FLOPS = 790e12  # FLOP/s, measured on an H200
LIMIT = FLOPS / (4 * 3.2e9)  # tokens/s: over the FLOPs of a token, forward and backward
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
             "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "8B": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    "cpu": {"vocab_size": 8_192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
}  # fmt: skip
ROWS = "rows/00000.arrow"


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        fields: of the recipe; the others have their defaults.
        steps, skipped: optimizer steps, and how many of the first do not count.
        gpus: that it needs.
        base: in `SIZES`; empty for the device's own.
        length: of the longest sequence on a GPU.
    """

    fields: dict[str, Any]
    steps: int = 14
    skipped: int = 4
    gpus: int = 1
    base: str = ""
    length: int = 2048


# as many steps as the reference recipe has, since each new shape of a batch is captured first
LONG: dict[str, Any] = {"steps": 60, "skipped": 30}
PACKED: dict[str, Any] = {"packing": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
WAYS = {
    "reference": Way({"engine": "unsloth", "fit_device": False}),
    "Retune": Way({}, **LONG),
    "Retune in 8 GB": Way({"device_memory_gib": 8}, **LONG),
    "Unsloth 8 x 1": Way({"engine": "unsloth"}),
    "TRL": Way({}),
    "plain packed": Way({**PACKED, "engine": "transformers", "kernels": "plain"}),
    "Retune packed": Way(PACKED, steps=20, skipped=10),
    "Retune packed, 8B": Way(
        {**PACKED, "per_device_train_batch_size": 4}, base="8B", length=4096, steps=16, skipped=8
    ),
    "Retune, two GPUs": Way({"num_processes": 2, "gradient_accumulation_steps": 8}, **LONG, gpus=2),
    "Retune packed, two GPUs": Way(
        {**PACKED, "num_processes": 2, "gradient_accumulation_steps": 4}, steps=20, skipped=10, gpus=2
    ),
}  # fmt: skip


def make_base(folder: str, size: str) -> None:
    """Write a Llama with random weights, of a size in `SIZES`, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if size == "cpu" else "cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], max_position_embeddings=4096))
    model.save_pretrained(folder)
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "<end>"]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def row_lengths(random: Any, rows: int, longest: int) -> Any:
    """Return lengths like FineTome's (median 282 tokens) if `longest` is 2,040, and in proportion otherwise."""
    import numpy as np

    return (np.clip(random.lognormal(5.8, 0.75, rows), 20, 2040) * longest / 2040).astype(int)


def make_rows(folder: str, rows: str, longest: str, vocabulary: str = "8000") -> None:
    """Write prepared rows: random ids below `vocabulary`, 5 of 8 trained, of `row_lengths`."""
    import numpy as np

    from include.chat.tokenized import Encoded, batch, write_rows

    random = np.random.default_rng(0)
    lengths = row_lengths(random, int(rows), int(longest))
    ends, numbers = lengths.cumsum(), np.arange(len(lengths))
    ids = random.integers(10, int(vocabulary), ends[-1]).astype(np.int32)
    trained = np.arange(len(ids)) - np.repeat(ends - lengths, lengths) >= np.repeat(lengths * 3 // 8, lengths)
    Path(folder).mkdir()
    write_rows(Path(folder) / "00000.arrow", [batch(Encoded(ids, trained, ends), numbers, numbers)])


def job_of(way: str, work: Path, out: Path, steps: int = 0) -> Any:
    """Return the train job of a way.

    Args:
        work: folder with the bases and the rows.
        steps: instead of the way's own.
    """
    import torch

    from include.engine.jobs import TrainJob
    from include.recipe import validate_recipe

    chosen, gpu = WAYS[way], torch.cuda.is_available()
    fields = {
        **chosen.fields, "name": "bench", "max_steps": steps or chosen.steps, "save_steps": 1000,
        "max_seq_length": chosen.length if gpu else 256,
    }  # fmt: skip
    base = work / f"base{chosen.base if gpu else ''}"
    return TrainJob(
        recipe=validate_recipe(fields, "bench"), base=base, base_name="bench", base_revision=None, tokenizer=base,
        rows=[work / ROWS], holdout=[work / ROWS], out=out, run_name="bench",
    )  # fmt: skip


def train(way: str, work: Path, out: Path) -> dict[str, Any]:
    """Run the train job of the engine, and read its log.

    Raises:
        RetuneError: the training failed.
    """
    from include.engine import supervise

    began = time.monotonic()
    result = supervise.run(job_of(way, work, out), out, lambda _: None)
    seconds = time.monotonic() - began
    entries = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return _rates(entries, WAYS[way].skipped) | {
        "first_step_after": seconds - result.seconds + entries[0]["seconds"],
        "peak_gib": result.peak_memory_bytes / 2**30, "predicted_gib": result.plan.predicted_bytes / 2**30,
        "plan": result.plan.as_dict(),
    }  # fmt: skip


def _rates(entries: list[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """Return the rates of a training log (tokens without padding) without its first steps, and its losses."""
    first, last = entries[skipped - 1], entries[-1]
    seconds = last["seconds"] - first["seconds"]
    return {
        "tokens_per_second": (last["tokens"] - first["tokens"]) / seconds,
        "seconds_per_step": seconds / (last["step"] - first["step"]),
        "losses": [round(entry["loss"], 5) for entry in entries],
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
    found = _rates(meter.entries, WAYS["TRL"].skipped) | {
        "first_step_after": meter.entries[0]["seconds"] - began, "peak_gib": peak / 2**30, "predicted_gib": 0.0,
        "plan": None,
    }  # fmt: skip
    Path(out).mkdir(exist_ok=True)
    Path(out, "found.json").write_text(json.dumps(found))


def _alone(module: str, *arguments: str) -> None:
    """Call a function of a module, with its arguments, in a process of its own."""
    with tempfile.TemporaryFile("w+") as log:
        try:
            subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=PROJECT, stdout=log, stderr=log)
        except subprocess.CalledProcessError:
            log.seek(0)
            print(log.read()[-2000:], flush=True)
            raise


def _run(way: str, work: Path, out: Path, profiled: bool) -> dict[str, Any]:
    if way == "TRL":
        _alone("bench.train", "trl", str(work), str(out), str(WAYS[way].steps), "2048" if _gpus() else "256")
        return json.loads((out / "found.json").read_text())
    found = train(way, work, out)
    if profiled:
        again = out.with_name(f"{out.name} profiled")
        _alone("bench.profile", way, str(work), str(again), str(WAYS[way].steps))
        found["profile"] = json.loads((again / "profile.json").read_text())
    return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _print_row(way: str, found: dict[str, Any]) -> None:
    rate, size = found["tokens_per_second"], 8.0 / 3.2 if WAYS[way].base else 1.0
    share = f"{rate * size / LIMIT / WAYS[way].gpus:.1%}" if _gpus() else ""
    print(
        f"{way:<24} {rate:>9,.0f} {rate * TRAINED:>9,.0f} {share:>8} {found['peak_gib']:>8.1f} "
        f"{found['predicted_gib']:>9.1f} {found['first_step_after']:>9.0f}s {found['losses'][-1]:>7.3f}", flush=True,
    )  # fmt: skip
    if profile := found.get("profile"):
        print(f"    a step of {profile['step_ms']:.0f} ms, {profile['idle_ms']:.0f} ms of it idle; ms of kernels:")
        print("    " + ", ".join(f"{group} {ms}" for group, ms in profile["groups_ms"].items()), flush=True)


def main() -> None:
    """Run the ways in turn, print the table, write bench/train.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="all that the device can run")
    parser.add_argument("--profile", action="store_true", help="also profile each way that takes one GPU, but not TRL")
    parser.add_argument("--add", action="store_true", help="keep the runs in --out, which must be of the same device")
    parser.add_argument("--out", help="bench/train.json on a GPU, var/train.json elsewhere")
    arguments = parser.parse_args()
    import torch

    from include.errors import RetuneError

    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    gpus = _gpus()
    arguments.out = arguments.out or PROJECT / ("bench" if gpus else "var") / "train.json"
    name = torch.cuda.get_device_name() if gpus else "no GPU: a tiny Llama on the CPU"
    print(f"{name}, torch {torch.__version__}")
    ways = arguments.ways or [way for way, chosen in WAYS.items() if chosen.gpus <= max(gpus, 1)]
    if not gpus:  # Unsloth needs one, and the larger base takes memory
        ways = [way for way in ways if WAYS[way].fields.get("engine") != "unsloth" and not WAYS[way].base]
    runs: dict[str, list[Any]] = {way: [] for way in WAYS}
    if arguments.add:
        before = json.loads(Path(arguments.out).read_text())
        if before["device"] != name:
            parser.error(f"{arguments.out} was measured on another device, {before['device']}")
        runs.update({way: found["runs"] for way, found in before["ways"].items()})
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for size in {WAYS[way].base for way in ways}:
            _alone("bench.train", "make_base", str(work / f"base{size}"), size or ("cuda" if gpus else "cpu"))
        _alone("bench.train", "make_rows", str(work / "rows"), "4000", "2040" if gpus else "248")
        print(
            f"{'way':<24} {'tokens/s':>9} {'trained/s':>9} {'of limit':>8} {'peak GiB':>8} {'predicted':>9} "
            f"{'first step':>10} {'loss':>7}"
        )
        for repeat in range(arguments.repeats):
            for way in ways:
                profiled = arguments.profile and repeat == 0 and WAYS[way].gpus == 1
                try:
                    found = _run(way, work, work / f"{way} {repeat}", profiled)
                except (RetuneError, subprocess.CalledProcessError) as error:
                    print(f"{way:<24} failed: {error}", flush=True)
                    continue
                runs[way].append(found)
                _print_row(way, found)
    summary = {
        "device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "ways": {
            way: {
                "tokens_per_second": statistics.median(run["tokens_per_second"] for run in found), "runs": found,
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
