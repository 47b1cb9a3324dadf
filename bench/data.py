"""The data leg against its floor and against the notebook's way, on the same rows: `make bench-data`.

Three ways, one after another in one run:

- floor: tiktoken alone, on all cores, over the same texts, the ids counted and thrown away; imports are not counted;
- Retune: `validate`, `standardize` and `template`, each in a fresh process as a task of Airflow runs it, imports
  counted, with both Great Expectations suites and their docs;
- notebook: what the reference notebook does: `datasets.map` with `apply_chat_template`, then TRL's own preparation.

Then the leg with other tokenizers and their own templates, against the tokenizer's own encoding of the same texts.

The ids of Retune and of the tokenizer's `apply_chat_template` are compared on a sample; a difference is an error.
Speed is for people to read. Needs the Llama 3.2 tokenizer of ../shared/material, and what its fetch.py brings.
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
from itertools import islice
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
MATERIAL = PROJECT.parent / "shared" / "material"
TOKENIZER = MATERIAL / "tokenizers" / "llama-3.2"
SAMPLE = 200
OTHERS = {"Qwen3": "qwen3", "Gemma 3": "gemma3"}  # names for people, and in fetch.py


def generate(path: str, rows: str) -> dict[str, Any]:
    """Write conversations of FineTome's lengths (mean about 500 tokens), composed of sentences that people wrote."""
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

    with open(path, "w") as file:
        for tokens in np.clip(np.random.default_rng(0).lognormal(5.95, 0.75, int(rows)), 20, 2000):
            turns, exchanges = [], chooser.choice((1, 1, 1, 2))
            for _ in range(exchanges):
                turns.append({"from": "human", "value": text(tokens / exchanges)})
                turns.append({"from": "gpt", "value": text(3 * tokens / exchanges)})
            file.write(json.dumps({"conversations": turns, "source": "bench", "score": 5.0}) + "\n")
    return {}


def floor(path: str) -> dict[str, Any]:
    """tiktoken over every text, in as many forked processes as there are cores."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    global _floor_texts, _floor_encoding
    import tiktoken

    settings = json.loads((TOKENIZER / "tokenizer.json").read_text())
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}  # GPT-2's table
    _floor_encoding = tiktoken.Encoding(
        "floor",
        pat_str=settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
        mergeable_ranks={bytes(byte_of[c] for c in t): id for t, id in settings["model"]["vocab"].items()},
        special_tokens={},
    )
    seconds, tokens, rows = 0.0, 0, 0
    with open(path, "rb") as file:
        while lines := list(islice(file, 100_000)):
            _floor_texts = [turn["value"] for line in lines for turn in json.loads(line)["conversations"]]
            began = time.monotonic()
            with ProcessPoolExecutor(os.cpu_count() or 1, get_context("fork")) as pool:
                tokens += sum(pool.map(_floor_part, range(0, len(_floor_texts), 5_000)))
            seconds += time.monotonic() - began
            rows += len(lines)
    return {"seconds": seconds, "tokens": tokens, "rows": rows}


_floor_texts: list[str]
_floor_encoding: Any


def _floor_part(start: int) -> int:
    return sum(len(_floor_encoding.encode_ordinary(text)) for text in _floor_texts[start : start + 5_000])


def tokenizer_floor(path: str, folder: str) -> dict[str, Any]:
    """Encode every text with the tokenizer itself, on all cores."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    seconds, tokens = 0.0, 0
    with open(path, "rb") as file:
        while lines := list(islice(file, 5_000)):
            texts = [turn["value"] for line in lines for turn in json.loads(line)["conversations"]]
            began = time.monotonic()
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            seconds += time.monotonic() - began
            tokens += sum(len(one.ids) for one in encoded)
    return {"seconds": seconds, "tokens": tokens}


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
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    began = time.monotonic()
    rows: Any = Dataset.from_json(path, cache_dir=tempfile.mkdtemp())
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
    ids: Any = trainer.train_dataset["input_ids"]  # type: ignore[index]
    return {"seconds": time.monotonic() - began, "tokens": sum(len(row) for row in ids)}


def retune(path: Path, var: Path, tokenizer: Path = TOKENIZER, template: str = "llama-3.1") -> dict[str, Any]:
    """Run each stage in a process of its own, imports counted; return its seconds and peak memory (MB, the largest
    process), the number of `compared` rows, and the `encoder` that ran.
    """
    recipe = var / "bench.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    base = var / "base"
    base.mkdir(exist_ok=True)
    for file in tokenizer.iterdir():
        (base / file.name).unlink(missing_ok=True)
        (base / file.name).symlink_to(file)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # no tensors: only the tokenizer is read
    recipe.write_text(f"dataset: {path}\nbase_model: {base}\nholdout_share: 0.01\nchat_template: {template}\n")
    environment = {"RETUNE_VAR": str(var), "RETUNE_RECIPES": str(recipe)}
    os.environ.update(environment)
    from tasks.resolve import resolve

    lineage, found = resolve("bench", {}, "bench"), {}
    for stage in ("download", "validate", "standardize", "template"):
        measure = in_process("task", stage, json.dumps(lineage))
        lineage, found[stage] = measure.pop("lineage"), measure
    found["compared"] = in_process("compare", str(var), str(tokenizer), template)["rows"]
    (manifest,) = var.glob("store/bench/template/*/manifest.json")
    found["encoder"] = json.loads(manifest.read_text())["metadata"]["encoder"]
    return found


def task(stage: str, lineage: str) -> dict[str, Any]:
    """A stage as a task of Airflow runs it: from the lineage of the stages before it."""
    import importlib

    return {"lineage": getattr(importlib.import_module(f"tasks.{stage}"), stage)(json.loads(lineage))}


def compare(state: str, folder: str, template: str) -> dict[str, Any]:
    """Compare the ids of a sample with `apply_chat_template`; return how many `rows` were equal.

    Of a conversation in several sequences the last one is compared: it holds the whole conversation as it is rendered.

    Raises:
        AssertionError: a row differs.
    """
    from transformers import PreTrainedTokenizerFast

    from include.chat.tokenized import load_rows
    from include.data.conversation import conversations_in
    from include.data.tables import read_table

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    if template != "tokenizer":
        tokenizer.chat_template = (PROJECT / "include" / "templates" / f"{template}.jinja").read_text()
    (prepared,) = Path(state).glob("store/bench/template/*/train")
    (messages,) = Path(state).glob("store/bench/standardize/*/messages")
    rows = load_rows(sorted(prepared.iterdir()))
    last = {row: place for place, row in enumerate(rows["row"])}
    sample = random.Random(1).sample(sorted(last), min(SAMPLE, len(last)))
    wanted = {row: rows[last[row]]["input_ids"] for row in sample}
    for file in messages.iterdir():
        table = read_table(file)
        for row, conversation in zip(table["row"].to_pylist(), conversations_in(table), strict=True):
            if row in wanted:
                theirs = tokenizer.apply_chat_template(conversation.messages, tokenize=True, return_dict=False)
                assert list(wanted.pop(row)) == list(theirs), f"row {row} differs"
    assert not wanted
    return {"rows": len(sample)}


def in_process(way: str, *arguments: str) -> dict[str, Any]:
    """One of the functions above in a process of its own: what it returns, and from the system's own accounting
    `seconds` (unless it counted them itself), `cpu_seconds` and `peak_mb` (of the largest process).

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, way, str(result), *arguments]
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=said, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:])
        cost = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}
        return {"seconds": seconds, **cost, **json.loads(result.read_text())}


def main() -> None:
    """Run the three ways for each number of rows, print the table, put it into bench/data.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument(
        "--skip-notebook", action="store_true", help="it takes minutes; above 100,000 rows it is left out"
    )
    parser.add_argument("--tokenizers", type=int, metavar="ROWS", help="only the table of tokenizers, for so many rows")
    arguments = parser.parse_args()
    if arguments.tokenizers:
        compare_tokenizers(arguments.tokenizers)
        return
    results = []
    print(f"{'rows':>9} {'way':<28} {'seconds':>8} {'x floor':>8} {'peak MB':>8}")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            in_process(
                "generate", str(path), str(rows)
            )  # elsewhere: a process inherits the peak of the one it comes from
            base = in_process("floor", str(path))
            stages = retune(path, Path(folder) / "var")
            skipped = arguments.skip_notebook or rows > 100_000
            book = None if skipped else in_process("notebook", str(path))
        leg = stages["standardize"]["seconds"] + stages["template"]["seconds"]
        whole = leg + stages["validate"]["seconds"]
        peak = max(stages[stage]["peak_mb"] for stage in ("validate", "standardize", "template"))
        result = {
            "rows": rows, "tokens": int(base["tokens"]), "floor_seconds": base["seconds"], "leg_seconds": leg,
            "whole_seconds": whole, "notebook_seconds": book and book["seconds"], "leg_by_floor": leg / base["seconds"],
            "whole_by_floor": whole / base["seconds"], "notebook_by_whole": book and book["seconds"] / whole,
            "floor_peak_mb": base["peak_mb"], "peak_mb": peak, "notebook_peak_mb": book and book["peak_mb"],
            "compared_rows": stages.pop("compared"), "encoder": stages.pop("encoder"), "stages": stages,
        }  # fmt: skip
        results.append(result)
        lines = [("floor: tiktoken alone", base["seconds"], base["peak_mb"])]
        lines += [(f"  {s}", v["seconds"], v["peak_mb"]) for s, v in stages.items()]
        lines += [("Retune: standardize + template", leg, peak), ("Retune: + validate", whole, peak)]
        lines += [("notebook", book["seconds"], book["peak_mb"])] if book else []
        for way, seconds, megabytes in lines:
            print(f"{rows:>9,} {way:<28} {seconds:>8.1f} {seconds / base['seconds']:>8.2f} {megabytes:>8,.0f}")
        print(f"{rows:>9,} {result['compared_rows']} sampled rows have the ids of apply_chat_template")
    report = PROJECT / "bench" / "data.json"
    earlier = json.loads(report.read_text()) if report.exists() else []
    kept = [entry for entry in earlier if entry["rows"] not in {result["rows"] for result in results}]
    report.write_text(json.dumps(sorted([*kept, *results], key=lambda entry: entry["rows"]), indent=2) + "\n")


def compare_tokenizers(rows: int) -> None:
    """Run the leg with each tokenizer, print the table, put it into bench/tokenizers.json."""
    from tests.services.published import published

    places = {"Llama 3.2": (TOKENIZER, "llama-3.1")}
    places |= {name: (published(MATERIAL, short), "tokenizer") for name, short in OTHERS.items()}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        in_process("generate", str(path), str(rows))
        for name, (tokenizer, template) in places.items():
            own = in_process("tokenizer_floor", str(path), str(tokenizer))
            stages = retune(path, Path(folder) / name, tokenizer, template)
            leg = stages["standardize"]["seconds"] + stages["template"]["seconds"]
            results.append(
                {"tokenizer": name, "rows": rows, "encoder": stages.pop("encoder"), "tokens_in_texts": own["tokens"],
                 "tokenizer_seconds": own["seconds"], "leg_seconds": leg, "compared_rows": stages.pop("compared"),
                 "stages": stages}
            )  # fmt: skip
            print(f"{name:<10} {results[-1]['encoder']:<12} {leg:>7.1f} s, tokenizer alone {own['seconds']:>7.1f} s")
    (PROJECT / "bench" / "tokenizers.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    ways: dict[str, Any] = {
        "generate": generate,
        "floor": floor,
        "tokenizer_floor": tokenizer_floor,
        "notebook": notebook,
        "task": task,
        "compare": compare,
    }
    if sys.argv[1:2] and sys.argv[1] in ways:
        outcome = ways[sys.argv[1]](*sys.argv[3:])
        Path(sys.argv[2]).write_text(json.dumps(outcome))
    else:
        main()
