"""Maintenance removes what has expired, keeps what is live, published or in use, and survives a crash."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from include.errors import NotFound
from include.registry import FolderRegistry, HubRegistry
from include.storage.artifacts import Store
from include.storage.files import MANIFEST, to_json
from tasks.maintenance import maintain_disk, maintain_store
from tasks.report import report
from tasks.rollback import rollback
from tests.conftest import PROJECT, unlock
from tests.services.hub import Hub

TIMES = ("made_at", "started_at", "finished_at")
LOCK = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()"


def age(days: float, *places: Path) -> None:
    """Make files, and the times in manifests and records, older."""
    unlock(*places)
    for path in (path for place in places for path in (place, *place.rglob("*"))):
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            times = [key for key in TIMES if key in content]
            for key in times:
                content[key] = (datetime.fromisoformat(content[key]) - timedelta(days=days)).isoformat()
            if times:  # the digests of other files stay valid
                path.write_bytes(to_json(content))
        os.utime(path, (time.time() - 86_400 * days,) * 2, follow_symlinks=False)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def artifacts(var: Path) -> set[str]:
    """Return `stage/fingerprint` of each complete artifact."""
    found = {path.parent for path in (var / "store" / "small").glob(f"*/*/{MANIFEST}")}
    assert all(Store().find("small", folder.parent.name, folder.name) for folder in found)
    return {f"{folder.parent.name}/{folder.name}" for folder in found}


def steps(*lineages: dict[str, str]) -> set[str]:
    return {
        f"{stage}/{fingerprint}"
        for lineage in lineages
        for stage, fingerprint in lineage.items()
        if stage not in ("recipe", "run")
    }


def test_expired_artifacts_and_runs_are_removed_and_live_published_or_used_ones_are_kept(
    var: Path, small_recipe: Callable, trained: Path, pipeline: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small_recipe(dataset=str(trained), gate_margin=20)
    first = pipeline(recipe, run_id="first")
    second = pipeline(recipe, "publish", run_id="second", max_steps=6)
    old = pipeline(recipe, "template", run_id="old", max_seq_length=128)
    for run in ("first", "second", "old"):
        report("small", run)
    store, registry = var / "store" / "small", FolderRegistry(var / "registry" / "small")
    assert [version.name for version in registry.versions()] == ["v1", "v2"]
    age(31, store)
    waiting = pipeline(recipe, "standardize", run_id="waiting", max_rows=50)  # it never ends
    age(31, store / "runs" / "waiting", *(store / step for step in steps(waiting)))
    young = pipeline(recipe, "template", run_id="young", max_seq_length=200)
    report("small", "young")
    age(29, store / "runs" / "young", *(store / step for step in steps(young)))
    (store.parent / "gone" / "train" / "x").mkdir(parents=True)

    before = snapshot(var)
    caplog.set_level("INFO", "airflow.task.retune")
    (line,) = maintain_store(dry_run=True)
    assert snapshot(var) == before
    assert line.startswith("would remove 7 artifacts and 1 run of small, "), line
    listed = re.findall(r"would remove \S+/store/small/(\S+), ", caplog.text)
    gone = {f"{stage}/{lineage[stage]}" for lineage in (first, second) for stage in ("resolve", "publish")}
    gone |= {f"verify/{first['verify']}", f"resolve/{old['resolve']}", f"template/{old['template']}"}
    assert set(listed) == gone | {"runs/old"}
    assert "gone: there is no recipe of that name" in caplog.text

    whole = shutil.copytree(registry.root / "versions" / "v1", var / "v1")
    (registry.root / "versions" / "v1" / MANIFEST).unlink()
    (line,) = maintain_store("small")
    assert line.startswith("removed nothing of small: the registry cannot be read"), line
    shutil.copy(whole / MANIFEST, registry.root / "versions" / "v1")
    elsewhere = registry.root.rename(var / "elsewhere")
    (line,) = maintain_store("small")
    assert "but there is no version in " in line
    elsewhere.rename(registry.root)
    assert snapshot(store).keys() == {path for path in before if path.startswith(str(store))}
    with pytest.raises(NotFound, match="there is no recipe 'smal'"):
        maintain_store("smal")

    there = artifacts(var)
    (line,) = maintain_store()
    assert re.fullmatch(
        r"removed 7 artifacts and 1 run of small, [\d.]+ [kM]B; kept \d+ \(\d+ published, \d+ in use\)", line
    )
    assert artifacts(var) == there - gone
    assert {path.name for path in (store / "runs").iterdir()} == {"first", "second", "waiting", "young"}
    assert (store / "outcomes").is_dir()
    assert (store.parent / "gone" / "train" / "x").is_dir()
    assert maintain_store()[0].startswith("removed 0 artifacts of small, 0 Bytes; kept ")

    assert rollback("small", "v1", "to see").startswith("v1 is live again")
    assert rollback("small", "v2", "to see").startswith("v2 is live again")
    pipeline(recipe, "publish", run_id="after", max_steps=6)
    assert registry.live().name == "v2", "it was made again from kept artifacts, and is the same version"

    age(5, store / "runs" / "waiting")  # longer than any stage may take: the run is given up
    maintain_store()
    assert not steps(waiting) & artifacts(var)


def commit(store: Store, tmp_path: Path, fingerprint: str, stage: str = "train", files: int = 20, **facts: Any) -> None:
    work = tmp_path / "made"
    work.mkdir()
    for number in range(files):
        (work / f"{number}.bin").write_bytes(b"x" * 100)
    store.commit(work, "small", stage, fingerprint, **{"summary": "", "metadata": {}, "inputs": {}, **facts})


def test_a_killed_maintenance_leaves_nothing_half_valid_and_two_at_once_finish_its_work(
    var: Path, tmp_path: Path, write_recipe: Callable
) -> None:
    write_recipe()
    commit(Store(), tmp_path, f"{0:016x}")
    stage = var / "store" / "small" / "train"
    made = (stage / f"{0:016x}" / MANIFEST).read_text()
    unlock(stage)
    for fingerprint in (f"{number:016x}" for number in range(1, 200)):
        shutil.copytree(stage / f"{0:016x}", stage / fingerprint)
        (stage / fingerprint / MANIFEST).write_text(made.replace(f"{0:016x}", fingerprint))
    age(40, stage)
    command = [sys.executable, "-c", "from tasks.maintenance import *; maintain_store('small')"]
    killed = subprocess.Popen(command, cwd=PROJECT)
    deadline = time.monotonic() + 60
    while len(list(stage.glob("0*"))) == 200:
        assert killed.poll() is None and time.monotonic() < deadline
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = [path for path in stage.iterdir() if (path / MANIFEST).exists()]
    assert 0 < len(left) < 200, "it was killed before the end"
    assert all(Store().find("small", "train", path.name) for path in left)

    both = [subprocess.Popen(command, cwd=PROJECT) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert list(stage.iterdir()) == []


def test_incomplete_folders_and_checkpoints_on_an_object_store_expire(
    tmp_path: Path, write_recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETUNE_STORE", f"memory://{tmp_path.name}")
    write_recipe()
    store = Store()
    commit(store, tmp_path, "old")
    commit(store, tmp_path, "young")
    for name in ("half", "new-half", "old.checkpoints/checkpoint-4", "new.checkpoints/checkpoint-4"):
        store.path("small", "train", name, "weights").parent.mkdir(parents=True)
        store.path("small", "train", name, "weights").write_bytes(b"x" * 1000)
        if "checkpoint" in name:
            store.path("small", "train", name, MANIFEST).write_bytes(b"{}")
    folder = store.path("small", "train")
    manifest = folder / "old" / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"made_at": "20', b'"made_at": "19'))
    for name, file in folder.fs.store.items():
        if any(f"/train/{part}/" in name for part in ("half", "old.checkpoints/checkpoint-4")):
            file.modified -= timedelta(days=31)
    assert maintain_store() == ["removed 1 artifact and 2 leftovers of small, 4.0 kB; kept 1 (1 in use)"]
    assert sorted(path.name for path in folder.iterdir()) == ["new-half", "new.checkpoints", "young"]
    assert store.find("small", "train", "young")


def test_old_work_caches_and_logs_are_removed_from_a_disk_but_locked_work_is_kept(
    var: Path, write_recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe()
    work, cache = var / "work" / "small" / "train", var / "cache"
    for place in (work / "locked", work / "old", work / "young", cache / "store" / "old", cache / "store" / "young",
                  cache / "published" / "old", cache / "datasets" / "old" / "deep", var / "logs"):  # fmt: skip
        place.mkdir(parents=True)
        (place / "small-20260101-000000.log").write_bytes(b"x" * 1000)
        if place.parent == work:
            (work / f".{place.name}.lock").touch()
    (work / ".finished.lock").touch()
    (var / "logs" / "up.log").touch()
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for revision in (b"one", b"two"):
            sha = hub.put("owner/base", {"config.json": b"{}", "model.safetensors": revision * 1000})
            snapshot_download("owner/base", revision=sha, cache_dir=cache / "hub", endpoint=hub.url)
            if revision == b"one":
                age(34, cache / "hub")
    revisions = cache / "hub" / "models--owner--base" / "snapshots"
    age(34, *(path for path in (*work.iterdir(), *cache.glob("*/old"), var / "logs") if "young" not in path.name))

    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(work / ".locked.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        before = snapshot(var)
        assert maintain_disk(dry_run=True) == [
            "would remove 1 work folder of small on this machine, 1.0 kB; kept 2",
            "would remove 3 caches, 1 log and 1 revision of this machine, 7.0 kB",
        ]
        assert snapshot(var) == before
        assert maintain_disk("small") == ["removed 1 work folder of small on this machine, 1.0 kB; kept 2"]
        assert {path.name for path in work.iterdir()} == {"locked", ".locked.lock", "young", ".young.lock"}
        assert maintain_disk()[1] == "removed 3 caches, 1 log and 1 revision of this machine, 7.0 kB"
    finally:
        holder.communicate(b"")
    assert [path.name for path in cache.glob("*/*") if path.name in ("old", "young")] == ["young"]
    assert [path.name for path in revisions.iterdir()] == [sha]
    assert (revisions / sha / "model.safetensors").read_bytes() == b"two" * 1000
    assert [path.name for path in (var / "logs").iterdir()] == ["up.log"]
    assert maintain_disk("small") == ["removed 1 work folder of small on this machine, 1.0 kB; kept 1"]


def test_a_recipe_that_names_an_unknown_stage_is_skipped_and_the_others_are_maintained(
    tmp_path: Path, write_recipe: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"dataset": "rows.jsonl", "registry": f"file://{tmp_path / 'registry'}"}
    mistyped = write_recipe("mistyped", timeout_hours={"trian": 1}, **fields)
    monkeypatch.setenv("RETUNE_RECIPES", f"{mistyped}:{write_recipe(**fields)}")
    for name in ("mistyped", "small"):
        Store().path(name).mkdir(parents=True)
    with caplog.at_level("INFO"):
        (line,) = maintain_store()
        (caches,) = maintain_disk()
    assert line.startswith("removed 0 artifacts of small, ") and caches.startswith("removed 0 caches ")
    assert "there is no stage 'trian'" in caplog.text


def test_versions_on_the_hub_are_kept_and_if_the_hub_cannot_be_read_everything_is_kept(
    tmp_path: Path, write_recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(registry="hf://owner/adapter")
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.write_token)
        store = Store()
        commit(store, tmp_path, "rows", "template")
        commit(store, tmp_path, "used", inputs={"template": "rows"})
        commit(store, tmp_path, "unused", inputs={"template": "rows"})
        age(40, Path(store.root.path))
        folder = tmp_path / "version"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        (folder / MANIFEST).write_bytes(to_json({"content": "c", "files": {}, "fingerprints": {"train": "used"}}))
        HubRegistry("owner/adapter").publish(folder, None, True)

        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        (line,) = maintain_store()
        assert line.startswith("removed nothing of small: the registry cannot be read"), line
        monkeypatch.setenv("HF_TOKEN", hub.write_token)
        (line,) = maintain_store()
        assert line.startswith("removed 1 artifact of small, ") and line.endswith("; kept 2 (2 published)")
