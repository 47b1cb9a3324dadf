"""Object stores, on a real S3 server: other workers' writes, killed removals, clear failures."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.errors import NoPermission, NotFound, Unreachable
from include.paths import registry_root
from include.pipeline.records import recorded
from include.registry import ObjectRegistry
from include.storage.artifacts import Store
from tests.services.s3 import S3, Proxy, forget_clients
from tests.services.workers import Worker, commit, remove_artifact, remove_file


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("RETUNE_STORE", "s3://retune/store")
    monkeypatch.setenv("RETUNE_REGISTRY", "s3://retune/registry")
    assert registry_root() == "s3://retune/registry"
    return Store()


def commit_elsewhere(tmp_path: Path, by: str, fingerprint: str) -> None:
    """Commit an artifact in another process."""
    Worker(commit, tmp_path / f"{by}-{fingerprint}", by, fingerprint).result()


def test_writes_and_removals_of_another_worker_are_seen_at_once(store: Store, s3: S3, tmp_path: Path) -> None:
    commit_elsewhere(tmp_path, "one", "a")
    assert store.find("small", "train", "a")
    assert store.find("small", "train", "b") is None
    assert set(store.read_records("small", "run")) == {"a"}
    folder = store.path("small", "train")
    assert sorted(path.name for path in folder.iterdir()) == ["a"]
    commit_elsewhere(tmp_path, "two", "b")
    assert store.find("small", "train", "b").metadata == {"by": "two"}
    assert set(store.read_records("small", "run")) == {"a", "b"}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    commit_elsewhere(tmp_path, "three", "a")
    assert (store.find("small", "train", "a").local() / "0.bin").read_bytes() == b"three"
    Worker(remove_file, "small", "train", "b", "1.bin").result()
    assert store.find("small", "train", "b") is None


def test_many_files_are_committed_with_few_requests_at_a_time_and_found_with_two(
    store: Store, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "many"
    (work / "deep").mkdir(parents=True)
    for number in range(300):
        (work / "deep" / f"{number}.bin").write_bytes(b"x" * number)
    store.commit(work, "small", "template", "many", summary="", metadata={}, inputs={})
    requests: list[str] = []
    with Proxy(s3, lambda number, path: None, requests.append) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        forget_clients()
        assert len(Store().find("small", "template", "many").manifest["files"]) == 300
    assert len(requests) == 2, requests


@pytest.mark.parametrize("many", [1, 3])
def test_a_removal_removes_the_manifest_first_so_that_a_kill_leaves_nothing_half_valid(
    store: Store, s3: S3, tmp_path: Path, many: int
) -> None:
    commit_elsewhere(tmp_path, "one", "a")

    started = threading.Event()

    def strike(number: int, path: str) -> None:
        if number == many:
            assert started.wait(60)
            remover.send(signal.SIGKILL)

    with Proxy(s3, strike) as proxy:
        remover = Worker(remove_artifact, "a", **proxy.environment)
        started.set()
        remover.result()
    assert store.find("small", "train", "a") is None
    left = {key for key in s3.objects("retune") if key.startswith("store/small/train/a/")}
    assert len(left) == (3 if many == 1 else 0)


def broken(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()


FAILURES: dict[str, tuple[dict[str, str], type[Exception], str, str]] = {
    "no bucket": (
        {"RETUNE_STORE": "s3://nowhere/store", "RETUNE_REGISTRY": "s3://nowhere/registry"},
        NotFound, "the bucket of the {kind} s3://nowhere/{kind}.* does not exist", "Create it, or correct .*{setting}",
    ),
    "wrong secret": (
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
        NoPermission, "the {kind} s3://retune/{kind}.* denies access to this account", "Correct AWS_ACCESS_KEY_ID and",
    ),
    "unknown key": (
        {"AWS_ACCESS_KEY_ID": "nobody"},
        NoPermission, "the {kind} s3://retune/{kind}.* denies access to this account", "Correct AWS_ACCESS_KEY_ID and",
    ),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
        NoPermission, "the {kind} s3://retune/{kind}.* needs credentials, and there are none", "Set AWS_ACCESS_KEY_ID",
    ),
    "no server": (
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"},
        Unreachable, "the {kind} s3://retune/{kind}.* does not answer", "{setting} and AWS_ENDPOINT_URL_S3",
    ),
    "no address": (
        {"AWS_ENDPOINT_URL_S3": "minio:9000"},
        NoPermission, "the {kind} s3://retune/{kind}.* has no valid endpoint", "AWS_ENDPOINT_URL_S3 as http",
    ),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_a_clear_error_and_never_looks_like_an_empty_store(
    failure: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_elsewhere(tmp_path, "one", "a")
    environment, error, what, do = FAILURES[failure]
    broken(monkeypatch, **environment)
    store, registry = Store(), ObjectRegistry(f"{registry_root()}/small")
    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("store", "RETUNE_STORE", store.check_writable),
        ("store", "RETUNE_STORE", lambda: store.find("small", "train", "a")),
        ("store", "RETUNE_STORE", lambda: store.read_records("small", "run")),
        ("registry", "RETUNE_REGISTRY", registry.check),
        ("registry", "RETUNE_REGISTRY", registry.live),
        ("registry", "RETUNE_REGISTRY", registry.manifests),
    ]
    for name, setting, call in calls:
        with pytest.raises(error, match=what.format(kind=name, setting=setting)) as caught:
            call()
        assert re.search(do.format(kind=name, setting=setting), caught.value.do), caught.value.do
        assert "\n" not in str(caught.value)
    if failure == "no bucket":
        assert not (tmp_path / "s3" / "nowhere").exists(), "a misspelled bucket is not created"


def test_a_stage_reports_a_store_that_stops_answering_and_a_lost_progress_line_is_no_failure(
    store: Store, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()
    with (
        pytest.raises(Unreachable, match="the store s3://retune/store does not answer"),
        recorded(Store(), "small", "run", "train") as record,
    ):
        s3.stop()
        record.progress("step 1")
        (store.path("small") / "x").read_bytes()
    s3.start()
    assert store.read_records("small", "run")["train"]["state"] == "running"
