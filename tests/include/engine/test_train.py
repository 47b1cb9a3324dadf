"""The training process: what it leaves, and what survives when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from include.chat.tokenized import load_rows
from include.engine import supervise
from include.engine.arguments import training_config
from include.engine.checkpoints import complete_checkpoint, newest_checkpoint
from include.engine.device_plan import Plan, make_plan
from include.engine.jobs import TrainJob
from include.engine.model import load_trainable
from include.engine.train import _trainer
from include.errors import BadData, BadRecipe, ProcessLost, RetuneError
from include.recipe import MODULE_SETS, validate_recipe
from include.storage.artifacts import Store
from include.storage.files import file_digest
from tests.conftest import conversation, unlock
from tests.services.engine import engines, log_of, strike, wait_until

ONE_STEP = {
    "max_steps": 1, "load_in_4bit": False, "per_device_train_batch_size": 256, "gradient_accumulation_steps": 1,
}  # fmt: skip

CPU_PLAN = Plan(
    device="cpu", device_name="", dtype="float32", engine="transformers", optim="adamw_torch",
    gradient_checkpointing=False, micro_batch=2, accumulation=4,
)  # fmt: skip


def ignore(_: str) -> None:
    """Take a line of progress."""


def test_a_killed_training_resumes_and_ends_with_the_same_adapter(train_job: Callable, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fields = {"max_steps": 60, "save_steps": 4}
    lines: list[str] = []
    result = supervise.run(train_job(straight, **fields), straight, lines.append)
    assert result.steps == len(log_of(straight)) == 60
    assert result.last_losses < result.first_losses
    config = orjson.loads((straight / "adapter" / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("owner/base", "abc", 16)
    weights = load_file(straight / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2, "A and B of seven projections in two layers"
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert any(line.startswith("step 60/60  loss") for line in lines)
    assert not (straight / "checkpoints").exists()

    job = train_job(killed, **fields)
    killer = strike(killed, 10, signal.SIGKILL)
    with pytest.raises(ProcessLost, match="ended by SIGKILL"):
        supervise.run(job, killed, ignore)
    killer.join()
    result = supervise.run(job, killed, lines.append)
    assert result.resumed_from
    step = int(result.resumed_from.removeprefix("checkpoint-"))
    assert step >= 8, "no more than one save interval is lost"
    assert f"resuming from checkpoint-{step}" in lines
    assert [e["loss"] for e in log_of(killed)] == [e["loss"] for e in log_of(straight)], "bitwise the same losses"
    again = load_file(killed / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_killed_preference_training_goes_on_with_the_adapter_that_it_had(train_job: Callable, tmp_path: Path) -> None:
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"Who knows {i}?"} for i in range(60)]
    pairs.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    job = train_job(out, method="dpo", dataset=str(pairs), max_steps=60, save_steps=4)
    killer = strike(out, 10, signal.SIGKILL)
    with pytest.raises(ProcessLost, match="ended by SIGKILL"):
        supervise.run(job, out, ignore)
    killer.join()
    before = [entry["loss"] for entry in log_of(out)]
    resumed_from = supervise.run(job, out, ignore).resumed_from
    step = int((resumed_from or "").removeprefix("checkpoint-"))
    losses = [entry["loss"] for entry in log_of(out)]
    assert losses[: len(before)] == before, "bitwise the same losses"
    assert max(losses[step:]) < min(losses[:3]), "a fresh adapter would begin at the logarithm of 2 again"


def test_a_training_resumes_with_an_empty_disk_from_the_checkpoint_in_the_store(
    small_recipe: Callable, pipeline: Callable, artifact: Callable, var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETUNE_STORE", "memory://store")  # of this process; the training process does not see it
    recipe, work = small_recipe(max_steps=100, save_steps=4), var / "work" / "small" / "train"

    def kill() -> None:
        stored = Store().path("small", "train")
        wait_until(lambda: any(path.name == "manifest.json" for path in stored.glob("*.checkpoints/checkpoint-*/*")))
        for pid in engines(work):
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ProcessLost, match="ended by SIGKILL"):
        pipeline(recipe, "train")
    killer.join()
    shutil.rmtree(var)
    output = artifact(pipeline(recipe, "train"))
    assert int(output.metadata.resumed_from.removeprefix("checkpoint-")) >= 4
    assert output.metadata.steps == 100
    assert not list(output.folder.parent.glob("*.checkpoints/*")), "no checkpoint is left behind"


def test_an_incomplete_or_damaged_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * 100)
        if step != 12:
            complete_checkpoint(folder)
    (tmp_path / "checkpoint-8" / "weights").write_bytes(b"x" * 50)
    (tmp_path / "checkpoint-16" / "weights").write_bytes(b"x" * 99 + b"y")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_two_processes_keep_the_effective_batch_stop_together_and_end_like_one(
    train_job: Callable, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    rows = tmp_path / "many.jsonl"  # no epoch ends within the 50 steps: at its end processes repeat rows to be even
    rows.write_text(
        "".join(json.dumps(conversation(f"What is {i} times 7?", f"It is {7 * i}.")) + "\n" for i in range(600))
    )
    fields = {"dataset": str(rows), "max_steps": 50, "save_steps": 100}
    supervise.run(train_job(alone, **fields), alone, ignore)
    job = train_job(together, num_processes=2, **fields)

    stopper = strike(together, 5, signal.SIGTERM)
    with pytest.raises(ProcessLost, match=r"was asked to stop and saved step \d+"):
        supervise.run(job, together, ignore)
    stopper.join()
    assert not engines(together)
    (checkpoint,) = (together / "checkpoints").glob("checkpoint-*")
    states = {"rng_state_0.pth", "rng_state_1.pth"}
    assert states < set(orjson.loads((checkpoint / "manifest.json").read_bytes())["files"])
    result = supervise.run(job, together, ignore)
    assert result.resumed_from == checkpoint.name
    plan = result.plan
    assert (plan.processes, plan.micro_batch, plan.accumulation) == (2, 4, 1), "2 x 4 x 1 for 2 x 4"
    one, two = log_of(alone), log_of(together)
    assert [entry["step"] for entry in two] == list(range(1, 51))
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
    place = Path(artifact(lineage, "publish").metadata.place)
    config = json.loads((place / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"], "for transformers 4, see test_save.py"
    for file in (artifact(lineage, "template").local() / "tokenizer").iterdir():
        assert (place / file.name).read_bytes() == file.read_bytes(), "the tokenizer that made the training's ids"
    published = AutoModelForCausalLM.from_pretrained(place)
    assert published.num_parameters() == sum(tensor.numel() for tensor in trained.values())


def test_the_loss_counts_assistant_tokens_only_and_packed_rows_do_not_see_each_other(
    train_job: Callable, tmp_path: Path, tiny_base: Path
) -> None:
    losses = {}
    for packing in (False, True):
        out = tmp_path / str(packing)
        job = train_job(out, packing=packing, num_train_epochs=1, **ONE_STEP)
        supervise.run(job, out, ignore)
        losses[packing] = log_of(out)[0]["loss"]
    assert [file.name for file in job.rows[0].parent.iterdir()] == ["00000.arrow"], "nothing is left beside the rows"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    total = count = 0.0
    with torch.inference_mode():
        for row in load_rows(job.rows):  # one at a time, no padding: the plain definition
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            labels = torch.tensor(row["labels"][1:])
            kept = labels != -100
            total -= logits[kept].gather(1, labels[kept][:, None]).sum().item()
            count += kept.sum().item()
    # all rows are in the one step, alone or packed: the same tokens in the same surroundings have the same loss
    assert losses[False] == pytest.approx(total / count, abs=1e-3), "in bfloat16, where the CPU has it"
    assert losses[True] == pytest.approx(total / count, abs=1e-3)


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
                starts = kwargs.get("cu_seq_lens_q")
                rows = len(kwargs["input_ids"]) if starts is None else len(starts) - 1
                if self.training and torch.is_grad_enabled() and rows > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")
                return forward(self, *args, **kwargs)
            LlamaModel.forward = limited
sys.meta_path.insert(0, Hook())
"""


def test_out_of_memory_halves_the_micro_batch_keeps_the_effective_one_and_resumes(
    small_recipe: Callable, pipeline: Callable, artifact: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SMALL_MEMORY)
    fields = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "lora_dropout": 0.0}
    straight = artifact(pipeline(small_recipe("straight", **fields), "train"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    capped = artifact(pipeline(small_recipe("capped", **fields), "train"))
    events = capped.metadata.out_of_memory
    assert [event.micro_batch for event in events] == [4, 2]
    assert "a micro-batch of 8 did not fit into memory" in events[0].what
    assert (capped.metadata.plan.micro_batch, capped.metadata.plan.accumulation) == (2, 4)
    one, other = ([e["loss"] for e in log_of(a.local())] for a in (straight, capped))
    assert len(one) == 8
    assert other == pytest.approx(one, rel=1e-3), "the same eight conversations in every step"


def test_memory_too_small_for_a_single_conversation_names_the_remedy(
    small_recipe: Callable, pipeline: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SMALL_MEMORY.replace("> 2", "> 0"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(BadRecipe, match="a single conversation does not fit .* Lower max_seq_length"):
        pipeline(small_recipe(per_device_train_batch_size=1), "train")


def test_a_loss_that_breaks_ends_the_run_and_names_step_and_rows(
    train_job: Callable, tmp_path: Path, tiny_base: Path
) -> None:
    job: TrainJob = train_job(tmp_path / "out", max_steps=40, load_in_4bit=False, save_steps=100)
    holders: dict[int, set[int]] = {}
    for row in load_rows(job.rows):
        for id in row["input_ids"]:
            holders.setdefault(id, set()).add(row["row"])
    broken, guilty = min(holders.items(), key=lambda entry: len(entry[1]))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = float("nan")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(BadData, match=r"the loss is nan at step \d+; rows of that step: ") as caught:
        supervise.run(replace(job, base=tmp_path / "base"), tmp_path / "out", ignore)
    named = {int(n) for n in caught.value.what.rsplit(": ", 1)[1].split(", ")}
    assert named & guilty
    assert len(named) == 8


def contents(var: Path) -> dict[str, str]:
    """Return the digest of each file in the store, apart from the records of runs."""
    files = (path for path in (var / "store").rglob("*") if path.is_file() and "runs" not in path.parts)
    return {str(path): file_digest(path) for path in files}


def test_trainings_write_nothing_into_artifacts_and_a_packed_one_resumes_with_the_same_losses(
    small_recipe: Callable, pipeline: Callable, artifact: Callable, tmp_path: Path, var: Path
) -> None:
    fields = {"packing": True, "early_stopping_patience": 1, "max_steps": 60, "save_steps": 4}
    recipe = small_recipe(learning_rate=0.02, sweep={"lora_alpha": [16, 32]}, **fields)
    prepared = pipeline(recipe, "candidates")
    before = contents(var)
    assert any("/template/" in name for name in before)
    pipeline(recipe, "train")  # trains two candidates on the same packed rows; each may stop early
    after = contents(var)
    assert before.items() <= after.items()
    assert {name.split("/small/")[1].split("/")[0] for name in after.keys() - before.keys()} <= {"train", "outcomes"}

    template, candidates = artifact(prepared, "template"), [*(var / "store/small/train").iterdir()]
    logs = {
        json.loads((folder / "manifest.json").read_text())["settings"]["lora_alpha"]: folder for folder in candidates
    }
    job = TrainJob(
        recipe=validate_recipe({**yaml.safe_load(recipe.read_text()), "name": "small", "sweep": {}}, "small"),
        base=Path(yaml.safe_load(recipe.read_text())["base_model"]), base_name="b", base_revision=None,
        tokenizer=template.local() / "tokenizer", rows=template.files("train"), holdout=template.files("holdout"),
        out=tmp_path / "killed", run_name="small",
    )  # fmt: skip
    unlock(template.local())
    (template.local() / "train" / "cache-1.arrow").write_bytes(
        (template.local() / "train" / "00000.arrow").read_bytes()
    )
    killer = strike(job.out, 6, signal.SIGKILL)
    with pytest.raises(ProcessLost, match="ended by SIGKILL"):
        supervise.run(job, job.out, ignore)
    killer.join()
    assert supervise.run(job, job.out, ignore).resumed_from
    assert [e["loss"] for e in log_of(job.out)] == [e["loss"] for e in log_of(logs[16])], "bitwise the same losses"
    (template.local() / "train" / "cache-1.arrow").unlink()
    assert contents(var) == after


def test_settings_that_the_trainer_refuses_and_a_second_visible_gpu_end_in_one_sentence(
    tiny_base: Path, tmp_path: Path
) -> None:
    recipe = validate_recipe(
        {"name": "x", "target_modules": ["q_proj", "lm_head"], "load_in_4bit": False, "max_steps": 1,
         "training_arguments": {"loss_type": "chunked_nll"}}, "x",
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]})
    job: Any = SimpleNamespace(recipe=recipe)
    config = training_config(recipe, CPU_PLAN, tmp_path, "x")
    model, tokenizer = load_trainable(tiny_base, recipe, CPU_PLAN), AutoTokenizer.from_pretrained(tiny_base)
    with pytest.raises(BadRecipe, match="field 'training_arguments': the trainer refuses the recipe: .*chunked_nll"):
        _trainer(job, CPU_PLAN, config, model, rows, 3, tokenizer, TrainerCallback(), ignore)
    config._n_gpu = 2
    with pytest.raises(RetuneError, match="this process sees 2 GPUs and may use one"):
        _trainer(job, CPU_PLAN, config, model, rows, 3, tokenizer, TrainerCallback(), ignore)


def test_training_stops_early_when_the_holdout_loss_no_longer_falls(train_job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = train_job(out, max_steps=200, save_steps=5, early_stopping_patience=2, learning_rate=0.05)
    assert supervise.run(job, out, ignore).steps < 200
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_settings_of_the_recipe_reach_adapter_and_trainer(train_job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fields = {
        "target_modules": "minimal", "use_rslora": True, "bias": "lora_only", "max_steps": 4,
        "lr_scheduler_type": "constant_with_warmup", "training_arguments": {"warmup_ratio": 0.5},
    }  # fmt: skip
    supervise.run(train_job(out, **fields), out, ignore)
    config = orjson.loads((out / "adapter" / "adapter_config.json").read_bytes())
    assert sorted(config["target_modules"]) == sorted(MODULE_SETS["minimal"])
    assert (config["use_rslora"], config["bias"]) == (True, "lora_only")
    rates = [entry["learning_rate"] for entry in log_of(out)]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01]), "two of four steps warm up"


def test_a_tracker_that_is_not_installed_is_named(train_job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadRecipe, match="field 'report_to': .*tensorboard"):
        supervise.run(train_job(out, report_to=["tensorboard"]), out, ignore)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unsloth_without_a_gpu_is_refused_with_the_remedy(tiny_base: Path) -> None:
    with pytest.raises(BadRecipe, match="field 'engine': unsloth needs a GPU"):
        make_plan(validate_recipe({"name": "x", "engine": "unsloth"}, "x"), tiny_base)
