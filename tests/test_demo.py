"""The demo through Airflow, as a person runs it: killed twice on the way, finished, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
from safetensors.torch import load_file

from include.storage.files import describe_files, file_digest
from tasks.stages import NAMES
from tests.conftest import PROJECT, last_run


def steps_done(var: Path) -> int:
    """Return the optimizer steps that the running training has logged."""
    return sum(len(log.read_bytes().splitlines()) for log in var.glob("work/demo/train/*/training_log.jsonl"))


def processes(var: Path, word: str = "") -> list[int]:
    """Return the ids of this test's living processes, found by its state folder, with a word in their command line."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            environment, command = Path(f"/proc/{pid}/environ").read_bytes(), Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if f"RETUNE_VAR={var}\0".encode() in environment and word.encode() in command and pid != os.getpid():
            found.append(pid)
    return found


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 900) -> None:
    """Wait until a condition holds, while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_demo_survives_being_killed_and_is_published_once(var: Path, retune: Callable) -> None:
    run = subprocess.Popen([sys.executable, "-m", "retune", "run", "demo"], cwd=PROJECT, stdout=subprocess.DEVNULL)
    wait_until(lambda: steps_done(var) >= 40, run)
    for pid in processes(var, "include.engine"):  # first only the training process: Airflow retries the task
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: steps_done(var) >= 120, run)
    for pid in processes(var):  # then every process at once, as in a power cut
        os.kill(pid, signal.SIGKILL)
    run.wait()
    assert not (var / "last_run.json").exists()
    assert not (var / "registry").exists(), "nothing is half published"

    finished = retune("run", "demo")
    assert finished.returncode == 0, finished.stdout
    assert "Published v1" in finished.stdout
    summary = last_run(var)
    assert (summary["recipe"], summary["verdict"], summary["version"]) == ("demo", "published", "v1")
    assert tuple(summary["stages"]) == tuple(stage for stage in NAMES if stage not in ("candidates", "choose"))
    assert summary["stages"]["make_base"]["reused"]
    assert "resumed from checkpoint-1" in summary["stages"]["train"]["summary"], "a checkpoint of step 100 or later"
    assert all(Path(s["folder"].removeprefix("file://")).is_dir() for s in summary["stages"].values())

    published = Path(summary["place"])
    manifest = orjson.loads((published / "manifest.json").read_bytes())
    assert {"adapter_config.json", "adapter_model.safetensors", "loss.png", "tokenizer.json"} <= set(manifest["files"])
    found = describe_files(published)
    assert {name: found[name] for name in manifest["files"]} == manifest["files"]
    assert file_digest(published / "manifest.json") in (published / "README.md").read_text()
    assert len(load_file(published / "adapter_model.safetensors")) == 2 * 7 * 4
    config = json.loads((published / "adapter_config.json").read_text())
    assert (config["r"], len(config["target_modules"])) == (16, 7)
    assert manifest["training"]["plan"]["engine"] == "transformers"
    assert manifest["recipe"]["load_in_4bit"] is True
    assert manifest["data"]["refused"] == 9
    answers = manifest["smoke_test"]["answers"]
    assert all(answer["checks"]["as_expected"] for answer in answers)
    assert not any(answer["checks"]["as_expected"] is None for answer in answers)
    assert not any(a["base"].strip().startswith(a["answer"].strip()) for a in answers), (
        "the base does not answer the prompts"
    )
    assert manifest["evaluation"]["verdict"]["against_base"]["high"] < -0.5
    page = Path(summary["report"].removeprefix("file://")).read_text()
    assert "The home of Alma is in Castle Hill." in page

    again = retune("run", "demo")
    assert again.returncode == 0, again.stdout
    assert "Unchanged, live is v1" in again.stdout
    second = last_run(var)
    assert second["verdict"] == "unchanged"
    assert all(stage["reused"] for stage in second["stages"].values())
    assert [path.name for path in (var / "registry" / "demo" / "versions").glob("v*")] == ["v1"]
    assert not processes(var), "no process is left running"
