"""The data leg against its floor and against the notebook's way, on the same rows: `make bench-data`.

Three ways, each in fresh processes, one after another in one run:

- notebook: what the reference notebook does: `datasets.map` with `apply_chat_template`, then TRL's own preparation;
- floor: tiktoken alone, on all cores, over the same texts, the ids counted and thrown away;
- Retune: `validate`, `standardize` and `template`, a process each, with both Great Expectations suites and their docs.

The ids of Retune and of the tokenizer's `apply_chat_template` are compared on a sample; a difference is an error.
Speed is for people to read. Needs the Llama 3.2 tokenizer of ../shared/material.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
MATERIAL = PROJECT.parent / "shared" / "material"
TOKENIZER = MATERIAL / "tokenizers" / "llama-3.2"
SAMPLE = 200


def generate(path: Path, rows: int) -> None:
    """Conversations of FineTome's lengths (mean about 500 tokens), composed of sentences that people wrote."""
    import numpy as np

    texts = [row["response"] for row in json.loads((MATERIAL / "datasets" / "gpteacher_roleplay.json").read_text())]
    for line in (MATERIAL / "datasets" / "augmentoolkit_sft.jsonl").read_text().splitlines():
        texts += [turn["value"] for turn in json.loads(line)["conversations"]]
    sentences = [s for text in texts for s in re.split(r"(?<=[.!?\n])\s+", text) if 10 < len(s) < 400]
    chooser = random.Random(0)

    def text(characters: float) -> str:
        found: list[str] = []
        while characters > 0:
            found.append(chooser.choice(sentences))
            characters -= len(found[-1])
        return " ".join(found)

    with path.open("w") as file:
        for tokens in np.clip(np.random.default_rng(0).lognormal(5.95, 0.75, rows), 20, 2000):
            turns, exchanges = [], chooser.choice((1, 1, 1, 2))
            for _ in range(exchanges):
                turns.append({"from": "human", "value": text(tokens / exchanges)})
                turns.append({"from": "gpt", "value": text(3 * tokens / exchanges)})
            file.write(json.dumps({"conversations": turns, "source": "bench", "score": 5.0}) + "\n")


def floor(path: str) -> dict[str, Any]:
    """tiktoken over every text, in as many forked processes as there are cores."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    global _floor_texts, _floor_encoding
    from transformers import PreTrainedTokenizerFast

    from include.encoder import fast_encoder

    encoder = fast_encoder(PreTrainedTokenizerFast.from_pretrained(TOKENIZER).backend_tokenizer)
    _floor_encoding = encoder._encoding  # type: ignore[attr-defined]
    _floor_texts = [
        turn["value"] for line in Path(path).read_text().splitlines() for turn in json.loads(line)["conversations"]
    ]
    began = time.monotonic()
    cores = os.cpu_count() or 1
    starts = range(0, len(_floor_texts), 5_000)
    with ProcessPoolExecutor(cores, get_context("fork")) as pool:
        tokens = sum(pool.map(_floor_part, starts))
    return {"seconds": time.monotonic() - began, "tokens": tokens}


_floor_texts: list[str]
_floor_encoding: Any


def _floor_part(start: int) -> int:
    return sum(len(_floor_encoding.encode_ordinary(text)) for text in _floor_texts[start : start + 5_000])


def notebook(path: str) -> dict[str, Any]:
    """The reference notebook's way: text by `datasets.map`, ids and masks by TRL."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(TOKENIZER, pad_token="<|finetune_right_pad_id|>")
    tokenizer.chat_template = (PROJECT / "include" / "templates" / "llama-3.1.jinja").read_text()
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    began = time.monotonic()
    rows = Dataset.from_json(path, cache_dir=tempfile.mkdtemp())
    roles = {"human": "user", "gpt": "assistant"}

    def standardize(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "conversations": [
                [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
                for turns in batch["conversations"]
            ]
        }

    def to_text(batch: dict[str, Any]) -> dict[str, Any]:
        return {"text": [tokenizer.apply_chat_template(c, tokenize=False) for c in batch["conversations"]]}

    rows = rows.map(standardize, batched=True).map(to_text, batched=True)
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model, train_dataset=rows.select_columns(["text"]), processing_class=tokenizer,
            args=SFTConfig(out, max_length=2048, dataset_text_field="text", report_to="none", use_cpu=True, bf16=False),
        )  # fmt: skip
    return {"seconds": time.monotonic() - began, "tokens": sum(map(len, trainer.train_dataset["input_ids"]))}


def retune(path: Path, var: Path) -> dict[str, Any]:
    """Seconds and peak memory (MB, the largest process) of each stage, in a process of its own, with its imports."""
    recipe = var / "bench.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    base = var / "base"
    base.mkdir(exist_ok=True)
    for file in TOKENIZER.iterdir():
        (base / file.name).unlink(missing_ok=True)
        (base / file.name).symlink_to(file)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"")  # the data leg reads the tokenizer only
    recipe.write_text(f"dataset: {path}\nbase_model: {base}\nholdout_share: 0.01\n")
    environment = {**os.environ, "RETUNE_VAR": str(var), "RETUNE_RECIPES": str(recipe)}
    found = {}
    for stage in ("download", "validate", "standardize", "template"):
        command = [sys.executable, "-m", "tasks", "bench", "--until", stage]
        found[stage] = measured(command, environment)
    found["compared"] = compare(var)
    return found


def compare(var: Path) -> int:
    """Compare the ids of a sample with `apply_chat_template`; returns how many rows were equal.

    Raises:
        AssertionError: a row differs.
    """
    import orjson
    import pyarrow.parquet as pq
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tokenizer.chat_template = (PROJECT / "include" / "templates" / "llama-3.1.jinja").read_text()
    (arrow,) = var.glob("store/bench/template/*/train.arrow")
    (messages,) = var.glob("store/bench/standardize/*/messages.parquet")
    rows = Dataset.from_file(str(arrow))
    chosen = rows.select(random.Random(1).sample(range(len(rows)), min(SAMPLE, len(rows))))
    table = pq.read_table(messages, filters=[("row", "in", list(chosen["row"]))])
    by_row = dict(zip(table["row"].to_pylist(), table["messages"].to_pylist(), strict=True))
    for row, ids in zip(chosen["row"], chosen["input_ids"], strict=True):
        theirs = tokenizer.apply_chat_template(orjson.loads(by_row[row]), tokenize=True, return_dict=False)
        assert list(ids) == list(theirs), f"row {row} differs"
    return len(chosen)


def measured(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall seconds and peak memory (MB) of a command, from the system's own accounting.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:])
    return {"seconds": seconds, "peak_mb": usage.ru_maxrss / 1024}


def in_process(way: str, path: Path) -> dict[str, float]:
    """One of the functions above in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        found = measured(
            [sys.executable, __file__, way, str(path), str(result)], {**os.environ, "PYTHONPATH": str(PROJECT)}
        )
        return {**json.loads(result.read_text()), "peak_mb": found["peak_mb"]}


def main() -> None:
    """Run the three ways for each number of rows, print the table, write bench/data.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--skip-notebook", action="store_true", help="the notebook's way takes minutes")
    arguments = parser.parse_args()
    results = []
    print(f"{'rows':>9} {'way':<28} {'seconds':>8} {'x floor':>8} {'peak MB':>8}")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            generate(path, rows)
            base = in_process("floor", path)
            stages = retune(path, Path(folder) / "var")
            book = None if arguments.skip_notebook else in_process("notebook", path)
        leg = stages["standardize"]["seconds"] + stages["template"]["seconds"]
        whole = leg + stages["validate"]["seconds"]
        peak = max(stage["peak_mb"] for stage in stages.values() if isinstance(stage, dict))
        result = {
            "rows": rows, "tokens": int(base["tokens"]), "floor_seconds": base["seconds"], "leg_seconds": leg,
            "whole_seconds": whole, "notebook_seconds": book and book["seconds"], "leg_by_floor": leg / base["seconds"],
            "whole_by_floor": whole / base["seconds"], "notebook_by_whole": book and book["seconds"] / whole,
            "floor_peak_mb": base["peak_mb"], "peak_mb": peak, "notebook_peak_mb": book and book["peak_mb"],
            "compared_rows": stages["compared"],
        }  # fmt: skip
        results.append(result)
        lines = [("floor: tiktoken alone", base["seconds"], base["peak_mb"])]
        lines += [(f"  {s}", v["seconds"], v["peak_mb"]) for s, v in stages.items() if isinstance(v, dict)]
        lines += [("Retune: standardize + template", leg, peak), ("Retune: + validate", whole, peak)]
        lines += [("notebook", book["seconds"], book["peak_mb"])] if book else []
        for way, seconds, megabytes in lines:
            print(f"{rows:>9,} {way:<28} {seconds:>8.1f} {seconds / base['seconds']:>8.2f} {megabytes:>8,.0f}")
        print(f"{rows:>9,} {stages['compared']} sampled rows have the ids of apply_chat_template")
    (PROJECT / "bench" / "data.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("floor", "notebook"):
        outcome = {"floor": floor, "notebook": notebook}[sys.argv[1]](sys.argv[2])
        Path(sys.argv[3]).write_text(json.dumps(outcome))
    else:
        main()
