"""The training process: what it leaves, what survives when it is killed, what is said when it fails."""

from __future__ import annotations

import json
import os
import shutil
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

from include.chat.tokenized import load_rows
from include.engine import supervise
from include.errors import BadData, BadRecipe, NoSpace, NotFound, ProcessLost, ProcessTimeout
from include.recipe import MODULE_SETS
from tests.conftest import conversation


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The condition's first true value; an error after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def strike(folder: Path, step: int, with_signal: signal.Signals) -> threading.Thread:
    """Sends the training process of a folder a signal once its log has so many steps."""

    def wait() -> None:
        wait_until(lambda: any(len(log_of(log.parent)) >= step for log in folder.rglob("training_log.jsonl")))
        for pid in engines(folder):
            os.kill(pid, with_signal)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def log_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "training_log.jsonl"
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def engines(out: Path) -> list[int]:
    """The engine processes that work in a folder."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"include.engine" in command and str(out).encode() in command:
            found.append(pid)
    return found


@pytest.fixture
def job(small_recipe: Callable, pipeline: Callable, artifact: Callable, tiny_base: Path) -> Callable[..., dict]:
    """A train job on the tiny base; fields of the recipe by keyword."""

    def make(out: Path, **fields: Any) -> dict[str, Any]:
        from include.pipeline.stage import pinned_recipe
        from include.storage.artifacts import Store

        lineage = pipeline(small_recipe(**fields), "template")
        prepared = artifact(lineage).local()
        return {
            "recipe": pinned_recipe(Store(), lineage).model_dump(mode="json"), "base": str(tiny_base),
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

    killer = strike(killed, 10, signal.SIGKILL)
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


def test_a_training_goes_on_with_an_empty_disk_from_the_checkpoint_in_the_store(
    small_recipe: Callable, pipeline: Callable, artifact: Callable, var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETUNE_STORE", "memory://store")  # of this process: what the training process has is not in it
    recipe = small_recipe(max_steps=40, save_steps=4)

    killer = strike(var / "work" / "small" / "train", 10, signal.SIGKILL)
    with pytest.raises(ProcessLost, match="ended by SIGKILL"):
        pipeline(recipe, "train")
    killer.join()
    shutil.rmtree(var)
    found = artifact(pipeline(recipe, "train"))
    assert int(found.metadata.resumed_from.removeprefix("checkpoint-")) >= 4
    assert found.metadata.steps == 40
    assert not list(found.folder.parent.glob("*.checkpoints/*")), "no checkpoint is left behind"


def test_an_incomplete_or_damaged_checkpoint_is_passed_over(job: Callable, tmp_path: Path) -> None:
    from include.engine.train import newest_checkpoint
    from include.storage.files import describe_files, to_json

    for step in (4, 8, 12, 16):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * 100)
        if step != 12:  # not finished
            (folder / "manifest.json").write_bytes(to_json({"files": describe_files(folder)}))
    (tmp_path / "checkpoint-8" / "weights").write_bytes(b"x" * 50)
    (tmp_path / "checkpoint-16" / "weights").write_bytes(b"x" * 99 + b"y")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_two_processes_hold_the_effective_batch_stop_together_and_end_like_one(job: Callable, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    rows = tmp_path / "many.jsonl"  # no epoch ends within the 30 steps: at its end processes repeat rows to be even
    rows.write_text(
        "".join(json.dumps(conversation(f"What is {i} times 7?", f"It is {7 * i}.")) + "\n" for i in range(400))
    )
    fields = {"dataset": str(rows), "max_steps": 30, "save_steps": 100}
    supervise.run("train", job(alone, **fields), alone, lambda _: None)
    made = job(together, num_processes=2, **fields)

    stopper = strike(together, 5, signal.SIGTERM)
    with pytest.raises(ProcessLost, match=r"was asked to stop and saved step \d+"):
        supervise.run("train", made, together, lambda _: None)
    stopper.join()
    assert not engines(together)
    (checkpoint,) = (together / "checkpoints").glob("checkpoint-*")
    states = {"rng_state_0.pth", "rng_state_1.pth"}
    assert states < set(orjson.loads((checkpoint / "manifest.json").read_bytes())["files"])
    done = supervise.run("train", made, together, lambda _: None)
    assert done["resumed_from"] == checkpoint.name
    plan = done["plan"]
    assert (plan["processes"], plan["micro_batch"], plan["accumulation"]) == (2, 2, 2), "2 x 2 x 2 for 2 x 4"
    one, two = log_of(alone), log_of(together)
    assert [entry["step"] for entry in two] == list(range(1, 31))
    assert [entry["tokens"] for entry in two] == [entry["tokens"] for entry in one], "the same rows in every step"
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=2e-3)


def test_a_whole_model_is_trained_and_published(
    small_recipe: Callable, pipeline: Callable, artifact: Callable, tiny_base: Path
) -> None:
    recipe = small_recipe(full_finetuning=True, load_in_4bit=False, learning_rate=1e-3, max_steps=30)
    lineage = pipeline(recipe)
    base, trained = (
        load_file(folder / "model.safetensors")
        for folder in (tiny_base, artifact(lineage, "train").local() / "adapter")
    )
    assert not torch.equal(base["model.norm.weight"], trained["model.norm.weight"]), "no projection, and yet trained"
    assert artifact(lineage, "evaluate").metadata.verdict.publish
    assert artifact(lineage, "verify").metadata.largest_difference == 0
    published = AutoModelForCausalLM.from_pretrained(artifact(lineage, "publish").metadata.place)
    assert published.num_parameters() == sum(tensor.numel() for tensor in trained.values())


def test_a_full_disk_is_said_in_one_line_and_tried_again(job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "training_log.jsonl").symlink_to("/dev/full")  # takes nothing, as a full disk does
    with pytest.raises(NoSpace, match="the disk of the work folder is full. Free some space and retry") as caught:
        supervise.run("train", job(out), out, lambda _: None)
    assert caught.value.retryable


def test_packed_rows_do_not_see_each_other(job: Callable, tmp_path: Path, tiny_base: Path) -> None:
    fields = {
        "max_steps": 1,
        "load_in_4bit": False,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
    }
    losses = {}
    for packing in (False, True):
        out = tmp_path / str(packing)
        made = job(out, packing=packing, num_train_epochs=1, **fields)
        supervise.run("train", made, out, lambda _: None)
        losses[packing] = log_of(out)[0]["loss"]
    # all rows are in the one step, alone or packed: the same tokens in the same surroundings have the same loss
    assert losses[True] == pytest.approx(losses[False], abs=2e-4)


def test_a_silent_process_is_ended_as_hung_and_the_next_try_goes_on(job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = job(out, max_steps=40, save_steps=4)

    freezer = strike(out, 6, signal.SIGSTOP)
    with pytest.raises(ProcessTimeout, match="no sign of life for 15 s"):
        supervise.run("train", made, out, lambda _: None, silence=15)
    freezer.join()
    wait_until(lambda: not engines(out))
    done = supervise.run("train", made, out, lambda _: None)
    assert int(done["resumed_from"].removeprefix("checkpoint-")) >= 4


# put before the engine's own code: a device that holds so many conversations at once and no more
SMALL_MEMORY = """
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "trl" and "include.engine" in " ".join(sys.orig_argv):
            sys.meta_path.remove(self)
            import torch
            from transformers import LlamaModel
            forward = LlamaModel.forward
            def limited(self, *args, **kwargs):
                if self.training and kwargs["input_ids"].shape[0] > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")
                return forward(self, *args, **kwargs)
            LlamaModel.forward = limited
sys.meta_path.insert(0, Hook())
"""


def test_out_of_memory_halves_the_micro_batch_holds_the_effective_one_and_goes_on(
    small_recipe: Callable, pipeline: Callable, artifact: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SMALL_MEMORY)
    fields = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "lora_dropout": 0.0}
    straight = artifact(pipeline(small_recipe("straight", **fields), "train"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    found = artifact(pipeline(small_recipe("capped", **fields), "train"))
    assert [event["micro_batch"] for event in found.metadata.out_of_memory] == [4, 2]
    assert "a micro-batch of 8 did not fit into memory" in found.metadata.out_of_memory[0]["what"]
    assert (found.metadata.plan.micro_batch, found.metadata.plan.accumulation) == (2, 4)
    one, other = ([e["loss"] for e in log_of(a.local())] for a in (straight, found))
    assert len(one) == 8
    assert other == pytest.approx(one, rel=1e-3), "the same eight conversations in every step"


def test_memory_too_small_for_a_single_conversation_says_what_to_change(
    small_recipe: Callable, pipeline: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SMALL_MEMORY.replace("> 2", "> 0"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(BadRecipe, match="a single conversation does not fit .* Lower max_seq_length"):
        pipeline(small_recipe(per_device_train_batch_size=1), "train")


def test_a_loss_that_breaks_ends_the_run_and_names_step_and_rows(
    job: Callable, tmp_path: Path, tiny_base: Path
) -> None:
    made = job(tmp_path / "out", max_steps=40, load_in_4bit=False, save_steps=100)
    rows = load_rows(made["rows"])
    holders: dict[int, set[int]] = {}
    for row in rows:
        for id in row["input_ids"]:
            holders.setdefault(id, set()).add(row["row"])
    broken, guilty = min(holders.items(), key=lambda entry: len(entry[1]))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = float("nan")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(BadData, match=r"the loss is nan at step \d+; rows of that step: ") as caught:
        supervise.run("train", {**made, "base": str(tmp_path / "base")}, tmp_path / "out", lambda _: None)
    named = {int(n) for n in caught.value.what.rsplit(": ", 1)[1].split(", ")}
    assert named & guilty
    assert len(named) == 8


def test_training_stops_early_when_the_holdout_loss_no_longer_falls(job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = job(out, max_steps=200, save_steps=5, early_stopping_patience=2, learning_rate=0.05)
    done = supervise.run("train", made, out, lambda _: None)
    assert done["steps"] < 200
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "fields",
    [
        {"load_in_4bit": False, "target_modules": "minimal", "use_rslora": True},
        {"load_in_4bit": False, "target_modules": "standard", "bias": "lora_only", "lr_scheduler_type": "cosine"},
        {"optim": "adafactor", "report_to": ["tensorboard"]},
    ],
)
def test_every_setting_of_the_recipe_reaches_the_adapter(job: Callable, tmp_path: Path, fields: dict) -> None:
    out = tmp_path / "out"
    made = job(out, max_steps=2, **fields)
    if fields.get("report_to"):
        with pytest.raises(BadRecipe, match="field 'report_to': .*tensorboard"):
            supervise.run("train", made, out, lambda _: None)
        return
    supervise.run("train", made, out, lambda _: None)
    config = orjson.loads((out / "adapter" / "adapter_config.json").read_bytes())
    assert sorted(config["target_modules"]) == sorted(MODULE_SETS[fields["target_modules"]])
    assert (config["use_rslora"], config["bias"]) == (fields.get("use_rslora", False), fields.get("bias", "none"))


def test_a_missing_base_and_a_wrong_projection_are_said_in_one_line(job: Callable, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="field 'base_model': .* cannot be loaded"):
        supervise.run("train", {**job(tmp_path / "a"), "base": str(tmp_path)}, tmp_path / "a", lambda _: None)
    with pytest.raises(BadRecipe, match="field 'target_modules'"):
        supervise.run("train", job(tmp_path / "b", target_modules=["w_proj"]), tmp_path / "b", lambda _: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unsloth_without_a_gpu_is_refused_with_the_remedy(job: Callable, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="field 'engine': unsloth needs a GPU"):
        supervise.run("train", job(tmp_path / "a", engine="unsloth"), tmp_path / "a", lambda _: None)
