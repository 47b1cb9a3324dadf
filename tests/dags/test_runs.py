"""Runs through Airflow other than the demo's: real input, bad input, refused candidates, the scheduler and its UI."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest

from include.registry import FolderRegistry
from tests.conftest import PROJECT, SHIPPED, last_run
from tests.services.airflow import SharedAirflow, eventually
from tests.services.hub import Hub
from tests.test_demo import processes


def test_real_rows_and_a_real_model_end_in_a_published_adapter(
    material: Path, var: Path, airflow_home: Path, write_recipe: Callable, retune: Callable
) -> None:
    recipe = write_recipe(
        "stories",
        dataset=str(material / "datasets" / "fastchat_dummy_conversation.json"),
        base_model=str(material / "models" / "stories260K"), chat_template="vicuna", max_seq_length=512, max_steps=30,
        prompts=["Who are you?"], required_checks=["not_empty", "no_special_tokens"], max_new_tokens=32,
    )  # fmt: skip
    done = retune("run", str(recipe), RETUNE_RECIPES="")
    assert done.returncode == 0, done.stdout
    summary = last_run(var)
    assert summary["verdict"] == "published"
    assert (Path(summary["place"]) / "adapter_model.safetensors").is_file()
    assert summary["stages"]["validate"]["summary"].startswith("500 good, 0 refused")


def test_a_template_that_the_vocabulary_cannot_write_is_reported(
    material: Path, write_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    recipe = write_recipe(
        "stories", dataset=str(material / "datasets" / "fastchat_dummy_conversation.json"),
        base_model=str(material / "models" / "stories260K"), chat_template="chatml", max_seq_length=512,
        missing_special_tokens="split",
    )  # fmt: skip
    facts = artifact(pipeline(recipe, "template")).metadata
    assert facts.missing_special_tokens == ["<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "dmeo"], "there is no recipe 'dmeo'. Choose one of: demo, demo_real, dpo_preferences, gemma3_4b"),
        (["run", "demo", "--set", "lora_rank=8"], "unknown field 'lora_rank'"),
        (["run", "demo", "--set", "r=many"], "field 'r': input should be a valid integer"),
        (["run", "demo", "--set", "r=0"], "field 'r': input should be greater than or equal to 1"),
        (["run", "demo", "--set", "r"], "'r' is not field=value"),
    ],
)
def test_a_typing_error_is_one_line_before_anything_starts(arguments: list[str], said: str, retune: Callable) -> None:
    done = retune(*arguments)
    assert done.returncode == 1
    assert said in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path, retune: Callable) -> None:
    (tmp_path / "file").write_text("")
    done = retune("run", "demo", RETUNE_STORE=f"file://{tmp_path}/file/store")
    assert done.returncode == 1
    assert "error: the store" in done.stdout
    assert "cannot be written" in done.stdout


def test_an_error_of_the_network_names_the_field_that_needs_it(write_recipe: Callable, pipeline: Callable) -> None:
    from include.errors import Unreachable

    with pytest.raises(Unreachable, match=r"field 'dataset': the dataset mlabonne/FineTome-100k needs the Hub, and "):
        pipeline(write_recipe("remote"), "download")


def test_a_candidate_that_is_not_better_is_refused_and_the_live_version_stays(
    var: Path, airflow_home: Path, small_recipe: Callable, trained: Path, pipeline: Callable, retune: Callable
) -> None:
    pipeline(small_recipe(dataset=str(trained)), "publish", run_id="first")
    worse = retune("run", "small", "--set", "max_steps=1", "--set", "learning_rate=1.0e-7")
    assert worse.returncode == 1
    assert "not better than the live adapter" in worse.stdout
    summary = last_run(var)
    assert (summary["verdict"], summary["error"]["kind"]) == ("refused", "GateRefused")
    versions = var / "registry" / "small" / "versions"
    assert [path.name for path in versions.glob("v*")] == ["v1"]


def test_a_tampered_version_is_found(var: Path, small_recipe: Callable, trained: Path, pipeline: Callable) -> None:
    from include.errors import PermanentError

    recipe = small_recipe(dataset=str(trained))
    pipeline(recipe, "publish")
    weights = var / "registry" / "small" / "versions" / "v1" / "adapter_model.safetensors"
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PermanentError, match="is not what was published: adapter_model.safetensors"):
        pipeline(recipe, run_id="again")


@pytest.mark.engine
def test_data_base_and_registry_on_the_hub(var: Path, small_recipe: Callable, tiny_base: Path, dataset: Path) -> None:
    with Hub() as hub:
        owner = next(iter(hub.tokens.values()))[0]
        sha = hub.put(f"{owner}/rows", {"data/train.jsonl": dataset.read_bytes()}, kind="dataset")
        base = hub.put(f"{owner}/base", {path.name: path.read_bytes() for path in tiny_base.iterdir()})
        small_recipe(dataset=f"{owner}/rows", base_model=f"{owner}/base", registry=f"hf://{owner}/adapter")
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.write_token}
        for verdict in ("published", "unchanged"):
            done = subprocess.run(
                [sys.executable, "-m", "retune", "stage", "small"], cwd=PROJECT, env=environment, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert last_run(var)["verdict"] == verdict
        repository = hub.repos[f"model:{owner}/adapter"]
        assert [commit.title for commit in repository.commits][1:] == ["v1: adapter published by Retune"]
        files = repository.head.files
        config = json.loads(files["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == (f"{owner}/base", base)
        manifest = json.loads(files["manifest.json"])
        assert (manifest["dataset"]["revision"], manifest["base"]["revision"]) == (sha, base)
        assert f"base_model: {owner}/base" in files["README.md"].decode()
        assert last_run(var)["place"] == f"{hub.url}/{owner}/adapter/tree/{repository.head.sha}"


@pytest.mark.xdist_group("up")
def test_the_scheduler_runs_a_recipe_triggered_with_values(
    shared: SharedAirflow, small_recipe: Callable, tmp_path: Path
) -> None:
    mistyped = small_recipe("mistyped", timeout_hours={"trian": 1})
    broken = mistyped.with_name("broken.yaml")
    broken.write_text("lora_rank: 8\n")
    shared.add(small_recipe("typed"), broken, mistyped)
    airflow, var = shared.api, shared.var
    recipes = {*SHIPPED, "typed", "broken", "mistyped"}
    dags = {dag["dag_id"]: dag for dag in airflow.call("GET", "/api/v2/dags")["dags"]}
    assert recipes | {"rollback", "maintenance"} <= set(dags)
    assert "unknown field 'lora_rank'" in dags["broken"]["description"]
    assert "there is no stage 'trian'" in dags["mistyped"]["description"], "and the other recipes keep their DAGs"
    assert airflow.call("GET", "/api/v2/importErrors")["total_entries"] == 0

    with pytest.raises(urllib.error.HTTPError) as refused:
        airflow.call("POST", "/api/v2/dags/typed/dagRuns", {"logical_date": None, "conf": {"r": 0}})
    assert refused.value.code == 400
    assert "0 is less than the minimum of 1" in refused.value.read().decode()

    run = airflow.trigger("typed", max_steps=5)
    state, tasks = airflow.ended("typed", run), airflow.tasks("typed", run)
    assert state == "success", {name: task["state"] for name, task in tasks.items()}
    assert {name for name, task in tasks.items() if task["queue"] == "gpu"} == {"train", "smoke_test", "evaluate"}
    assert tasks["train"]["pool"] == "gpu"
    assert airflow.call("GET", "/api/v2/pools/gpu")["slots"] == 1
    summary = last_run(var)
    assert (summary["verdict"], summary["run"]) == ("published", run)
    assert summary["stages"]["train"]["summary"].startswith("5 steps")
    assert any(line.startswith("step 5/5  loss") for line in airflow.log("typed", run, "train"))

    # a rollback, while another run trains
    registry = FolderRegistry(var / "registry" / "typed")
    folder = tmp_path / "two"
    shutil.copytree(registry.fetch("v1"), folder)
    (folder / "manifest.json").chmod(0o644)
    (folder / "manifest.json").write_text('{"content": "another"}')
    registry.publish(folder, "v1", True)
    assert registry.live().name == "v2"
    run = airflow.trigger("typed", max_steps=5000)
    eventually(lambda: list(var.glob("work/typed/train/*/training_log.jsonl")))
    for pid in processes(var, "include.engine"):
        os.kill(pid, signal.SIGKILL)
    said = eventually(lambda: [line for line in airflow.log("typed", run, "train") if "tried" in line])
    assert said[-1].startswith("train failed: the train process was ended by SIGKILL")
    assert said[-1].endswith("It will be tried again: training continues from the last checkpoint (try 2 of 7).")
    eventually(lambda: airflow.tasks("typed", run)["train"]["try_number"] == 2)
    for pid in eventually(lambda: processes(var, "include.engine")):
        os.kill(pid, signal.SIGSTOP)  # the training lasts until the rollback has ended
    runs = "/api/v2/dags/rollback/dagRuns"
    choice = {"recipe": "typed", "version": "v1", "reason": "v2 insults people"}
    for wrong in ({"recipe": "smal"}, {"reason": ""}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            airflow.call("POST", runs, {"logical_date": None, "conf": {**choice, **wrong}})
        assert refused.value.code == 400
    back = airflow.trigger("rollback", **choice)
    assert (airflow.ended("rollback", back), registry.live().name) == ("success", "v1")
    assert airflow.tasks("typed", run)["train"]["state"] == "running"
    for pid in processes(var, "include.engine"):
        os.kill(pid, signal.SIGCONT)
    last = json.loads((var / "registry" / "typed" / "history.jsonl").read_text().splitlines()[-1])
    assert (last["live"], last["instead_of"], last["reason"]) == ("v1", "v2", "v2 insults people")
    airflow.call("PATCH", f"/api/v2/dags/typed/dagRuns/{run}", {"state": "failed"})
    eventually(lambda: not processes(var, "include.engine"))
