"""The training process: what it leaves, what survives when it is killed, what is said when it fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from include.engine import supervise
from include.errors import BadRecipe, Missing, ProcessLost
from include.rows import load as load_rows


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The condition's first true value; an error after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def log_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "training_log.jsonl"
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@pytest.fixture
def job(small_recipe: Callable, pipeline: Callable, artifact: Callable, tiny_base: Path) -> Callable[..., dict]:
    """A train job on the tiny base; fields of the recipe by keyword."""

    def make(out: Path, **fields: Any) -> dict[str, Any]:
        from include.stage import frozen_recipe
        from include.store import Store

        trail = pipeline(small_recipe(**fields), "template")
        prepared = artifact(trail).local()
        return {
            "recipe": frozen_recipe(Store(), trail).model_dump(mode="json"), "base": str(tiny_base),
            "base_name": "owner/base", "base_revision": "abc", "tokenizer": str(prepared / "tokenizer"),
            "rows": str(prepared / "train"), "holdout": str(prepared / "holdout"), "out": str(out),
        }  # fmt: skip

    return make


def test_it_trains_lora_on_a_four_bit_base_and_names_the_pinned_base(job: Callable, tmp_path: Path) -> None:
    said: list[str] = []
    done = supervise.run("train", job(tmp_path / "out"), tmp_path / "out", said.append)
    assert done["steps"] == 8
    assert done["last_losses"] < done["first_losses"] or len(log_of(tmp_path / "out")) == 8
    config = orjson.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("owner/base", "abc", 16)
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2, "A and B of seven projections in two layers"
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert any(line.startswith("step 8/8  loss") for line in said)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_loss_counts_assistant_tokens_only(job: Callable, tmp_path: Path, tiny_base: Path) -> None:
    made = job(
        tmp_path / "out", max_steps=1, load_in_4bit=False, per_device_train_batch_size=64, gradient_accumulation_steps=1
    )
    supervise.run("train", made, tmp_path / "out", lambda _: None)
    rows = load_rows(made["rows"])
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    total = count = 0.0
    with torch.inference_mode():
        for row in rows:  # one at a time, no padding: the plain definition
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            labels = torch.tensor(row["labels"][1:])
            kept = labels != -100
            total -= logits[kept].gather(1, labels[kept][:, None]).sum().item()
            count += kept.sum().item()
    assert log_of(tmp_path / "out")[0]["loss"] == pytest.approx(total / count, abs=2e-4)


def test_a_killed_training_goes_on_and_ends_as_if_it_had_not_been(job: Callable, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fields = {"max_steps": 40, "save_steps": 4}  # long enough to be caught on the way
    supervise.run("train", job(straight, **fields), straight, lambda _: None)
    made = job(killed, **fields)

    def kill() -> None:
        wait_until(lambda: len(log_of(killed)) >= 10)
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"include.engine" in command and str(killed).encode() in command:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ProcessLost, match="ended by SIGKILL"):
        supervise.run("train", made, killed, lambda _: None)
    killer.join()
    said: list[str] = []
    done = supervise.run("train", made, killed, said.append)
    step = int(done["resumed_from"].removeprefix("checkpoint-"))
    assert step >= 8, "no more than one save interval is lost"
    assert f"going on from checkpoint-{step}" in said
    assert [e["loss"] for e in log_of(killed)] == [e["loss"] for e in log_of(straight)], "bitwise the same losses"
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_incomplete_checkpoint_is_passed_over(job: Callable, tmp_path: Path) -> None:
    from include.engine.train import newest_checkpoint
    from include.store import describe_files, to_json

    for step in (4, 8, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * 100)
        if step != 12:
            (folder / "manifest.json").write_bytes(to_json({"files": describe_files(folder)}))
    (tmp_path / "checkpoint-8" / "weights").write_bytes(b"x" * 50)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_missing_base_and_a_wrong_projection_are_said_in_one_line(job: Callable, tmp_path: Path) -> None:
    with pytest.raises(Missing, match="field 'base_model': .* cannot be loaded"):
        supervise.run("train", {**job(tmp_path / "a"), "base": str(tmp_path)}, tmp_path / "a", lambda _: None)
    with pytest.raises(BadRecipe, match="field 'target_modules'"):
        supervise.run("train", job(tmp_path / "b", target_modules=["w_proj"]), tmp_path / "b", lambda _: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unsloth_without_a_gpu_is_refused_with_the_remedy(job: Callable, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="field 'engine': unsloth needs a GPU"):
        supervise.run("train", job(tmp_path / "a", engine="unsloth"), tmp_path / "a", lambda _: None)
