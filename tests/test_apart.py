"""Beyond one machine: a whole run in separate processes that share nothing but an object store."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from include.data.sources import pin_dataset
from include.errors import Conflict
from include.pipeline.stage import find_output
from include.registry import ObjectRegistry
from include.storage.artifacts import Store
from include.storage.files import MANIFEST
from include.storage.locations import open_path
from tasks.maintenance import maintain_store
from tasks.report import report
from tasks.rollback import rollback
from tests.conftest import PROJECT
from tests.services.engine import engines, log_of, wait_until
from tests.services.s3 import S3

GPU = ("train", "smoke_test", "evaluate")
STAGE = """
import importlib, json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
names, lineage = sys.argv[1].split(","), json.loads(sys.argv[2])
for name in names:
    if name == "resolve":
        from tasks.resolve import resolve
        lineage = resolve(lineage["recipe"], {}, lineage["run"])
    elif name == "approve":
        from tasks.approve import approve
        lineage = approve(lineage)
    else:
        lineage = getattr(importlib.import_module(f"tasks.{name}"), name)(lineage)
print(json.dumps(lineage))
"""


@pytest.fixture
def apart(s3: S3, dataset: Path, small_recipe: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A recipe whose data, artifacts and versions are on the object store; fields by keyword."""
    monkeypatch.setenv("RETUNE_STORE", "s3://retune/store")
    monkeypatch.setenv("RETUNE_REGISTRY", "s3://retune/registry")
    rows = open_path("s3://retune/data/rows.jsonl")
    rows.fs.put_file(str(dataset), rows.path)
    return lambda **fields: small_recipe(dataset="s3://retune/data/rows.jsonl", **fields)


def start(stages: str, lineage: dict[str, str], var: Path) -> subprocess.Popen[str]:
    """A worker of one's own, with a disk of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, stages, json.dumps(lineage)], cwd=PROJECT,
        env={**os.environ, "RETUNE_VAR": str(var)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(worker: subprocess.Popen[str]) -> dict[str, str]:
    out, err = worker.communicate(timeout=900)
    assert worker.returncode == 0, err[-3000:]
    return json.loads(out)


def run(name: str, run_id: str, disks: Path, *machines: str) -> dict[str, str]:
    """Run stages, those of each machine in a process; every disk is empty at first."""
    lineage = {"recipe": name, "run": run_id}
    for number, stages in enumerate(machines):
        lineage = done(start(stages, lineage, disks / f"{run_id}-{number}"))
    return lineage


@pytest.mark.engine
def test_a_run_in_separate_processes_with_separate_disks_is_published_reported_rolled_back_and_kept(
    apart: Callable, s3: S3, tmp_path: Path, var: Path
) -> None:
    recipe = apart(gate_margin=20, keep_days=1)
    disks = tmp_path / "disks"
    data, gpu = ("resolve,download,validate", "standardize,template"), ",".join(GPU)
    lineage = run("small", "first", disks, *data, gpu, "approve,publish", "verify")
    summary = report("small", "first")
    assert (summary["verdict"], summary["version"]) == ("published", "v1")
    assert summary["place"] == "s3://retune/registry/small/versions/v1"
    assert summary["report"] == "s3://retune/store/small/runs/first/report.html"
    page = (s3.folder / "retune/store/small/runs/first/report.html").read_text()
    assert "data:image/png;base64" in page, "the loss picture"
    assert summary["stages"]["publish"]["summary"] == "v1 is live: s3://retune/registry/small/versions/v1"
    registry = ObjectRegistry("s3://retune/registry/small")
    (manifest,) = registry.manifests()
    assert manifest["dataset"]["name"] == "s3://retune/data/rows.jsonl"
    assert manifest["fingerprints"]["train"] == lineage["train"]
    assert not (var / "registry").exists() and not (var / "store").exists()

    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "max_steps": 6}))
    run("small", "second", disks, ",".join((*data, gpu, "approve,publish")))
    assert report("small", "second")["version"] == "v2"
    assert rollback("small", "v1", "to see").startswith("v1 is live again instead of v2: s3://retune/registry/small/")
    assert registry.live().name == "v1"

    published = {f"train/{made['fingerprints']['train']}" for made in registry.manifests()}
    assert len(published) == 2
    for path in (s3.folder / "retune/store/small").rglob(f"*/{MANIFEST}"):  # all older than the recipe keeps
        content = path.read_bytes().replace(b'"made_at": "20', b'"made_at": "19')
        path.write_bytes(content)
    for path in (s3.folder / "retune/store/small/runs").rglob("*.json"):
        path.write_bytes(path.read_bytes().replace(b'_at": "20', b'_at": "19'))
    (line,) = maintain_store("small")
    assert re.match(r"removed \d+ artifacts of small, ", line), line
    kept = {
        f"{path.parent.parent.name}/{path.parent.name}"
        for path in open_path("s3://retune/store/small").glob("*/*/" + MANIFEST)
    }
    assert published <= kept
    assert not any(name.startswith(("publish/", "verify/")) for name in kept)


@pytest.mark.engine
def test_a_training_killed_on_one_machine_goes_on_on_another_from_the_newest_stored_checkpoint(
    apart: Callable, s3: S3, tmp_path: Path
) -> None:
    apart(max_steps=40, save_steps=4)
    disks = tmp_path / "disks"
    lineage = done(
        start("resolve,download,validate,standardize,template", {"recipe": "small", "run": "killed"}, disks / "cpu")
    )

    def killed_on(machine: str, steps: int) -> int:
        """Train until there are so many steps and a newer checkpoint is stored; return the step of the newest one."""
        work = disks / machine / "work" / "small" / "train"
        worker = start("train", lineage, disks / machine)
        before = max(stored_steps(s3), default=0)
        wait_until(lambda: any(len(log_of(log.parent)) >= steps for log in work.rglob("training_log.jsonl")), 900)
        for pid in engines(work):
            os.kill(pid, signal.SIGSTOP)  # it makes no more steps while its checkpoint goes to the store
        wait_until(lambda: max(stored_steps(s3), default=0) > before, 900)
        for pid in (worker.pid, *engines(work)):
            os.kill(pid, signal.SIGKILL)
        worker.communicate()
        assert worker.returncode == -signal.SIGKILL, "it was killed on the way"
        return max(stored_steps(s3))

    first = killed_on("one", 6)
    second = killed_on("two", first + 6)
    assert second > first
    lineage = done(start("train", lineage, disks / "one"))  # which has an older checkpoint of its own
    found = find_output(Store(), "small", "train", lineage["train"])
    assert found
    assert int(found.metadata.resumed_from.removeprefix("checkpoint-")) == second
    log = [
        json.loads(line)
        for line in (s3.folder / "retune/store" / "small/train" / lineage["train"] / "training_log.jsonl")
        .read_text()
        .splitlines()
    ]
    assert [entry["step"] for entry in log] == list(range(1, 41)), "also of the steps that other machines made"
    assert not [key for key in s3.objects("retune") if ".checkpoints/" in key]


def stored_steps(s3: S3) -> list[int]:
    manifests = (s3.folder / "retune/store/small/train").glob(f"*.checkpoints/checkpoint-*/{MANIFEST}")
    return [int(path.parent.name.split("-")[1]) for path in manifests]


def test_a_dataset_that_was_replaced_on_the_object_store_is_another_revision(apart: Callable, dataset: Path) -> None:
    from include.recipe import dataset_ref, find_recipe, load_recipe

    apart()
    recipe = load_recipe(find_recipe("small"))
    first = pin_dataset(dataset_ref(recipe))
    assert pin_dataset(dataset_ref(recipe), first) == first
    rows = open_path("s3://retune/data/rows.jsonl")
    rows.fs.pipe_file(rows.path, dataset.read_bytes() + b"\n")
    with pytest.raises(Conflict, match="s3://retune/data/rows.jsonl has changed"):
        pin_dataset(dataset_ref(recipe), first)
