"""Registries on an object store, on a real S3 server: killed, frozen and racing publishers."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from include.errors import NotFound
from include.registry import ObjectRegistry
from include.storage.files import MANIFEST, describe_files
from tests.services.s3 import S3, Proxy
from tests.services.workers import Worker, promote, publish

TTL = 4.0  # seconds: short, because a test waits as long for the lease of a dead publisher
LONG_TTL = 600.0  # no renewal during a test
TRIES = 30  # on a machine that is too busy to renew a short lease in time, as Airflow would


def check_complete(registry: ObjectRegistry, run: str, weights: bytes) -> None:
    """Check that there is one version, which is live and complete."""
    (version,) = registry.versions()
    assert (registry.live(), version.run) == (version, run)
    folder = registry.fetch(version.name)
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    assert json.loads((folder / MANIFEST).read_bytes())["files"].items() <= describe_files(folder).items()
    assert (folder / "README.md").read_text() == "card"
    assert [made["run"] for made in registry.manifests()] == [run]


def history(s3: S3, folder: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((s3.folder / folder / "history").iterdir())]


def version_folders(s3: S3, registry: str) -> set[str]:
    keys = (key.removeprefix(registry) for key in s3.objects("retune") if key.startswith(f"{registry}/versions/"))
    return {key.split("/")[2] for key in keys}


@contextmanager
def killed_after(s3: S3, request: int, uri: str, folder: Path) -> Iterator[Worker]:
    """Start a publisher that is killed when its nth writing request was done, before it gets the answer."""
    started = threading.Event()

    def strike(number: int, path: str) -> None:
        if number == request:
            assert started.wait(60)
            publisher.send(signal.SIGKILL)

    with Proxy(s3, strike) as proxy:
        publisher = Worker(publish, uri, folder, None, LONG_TTL, **proxy.environment)
        started.set()
        yield publisher


def test_a_publisher_killed_after_any_request_leaves_a_registry_in_which_the_next_try_makes_one_version(
    s3: S3, version: Callable
) -> None:
    one, two = version(b"one" * 1000, run="one"), version(b"two" * 1000, run="two")
    names = [f"killed-{request}" for request in range(1, 10)]
    with ExitStack() as stack:
        publishers = [
            stack.enter_context(killed_after(s3, request, f"s3://retune/{name}", one))
            for request, name in enumerate(names, start=1)
        ]
        results = [publisher.result() for publisher in publishers]
    # lease, three files, manifest, live, history; then the lease is removed
    assert results[:7] == [None] * 7, "killed before the end"
    assert results[8] == "v1", "there is no ninth request"
    incomplete = {
        name: {folder for folder in version_folders(s3, name) if f"{name}/versions/{folder}/{MANIFEST}" not in keys}
        for keys in [s3.objects("retune")]
        for name in names
    }
    assert [len(incomplete[name]) for name in names] == [0, 1, 1, 1, 0, 0, 0, 0, 0]

    next_tries = [Worker(publish, f"s3://retune/{name}", one, None, TTL, TRIES) for name in names]
    for name, done in zip(names, [each.result() for each in next_tries], strict=True):
        registry = ObjectRegistry(f"s3://retune/{name}")
        check_complete(registry, "one", b"one" * 1000)
        assert registry.live().name == done
        assert done not in incomplete[name], "the number of an incomplete version is not used again"
        assert [entry["live"] for entry in history(s3, f"retune/{name}")] == [done]
        assert not [key for key in s3.objects("retune") if key.startswith(f"{name}/leases/")]
        assert version_folders(s3, name) == {done}
        if name in ("killed-3", "killed-5"):
            after = registry.publish(two, done, True)
            assert [each.name for each in registry.versions()] == [done, after.name]


def test_of_many_publishers_at_once_one_wins_and_no_change_is_lost(s3: S3, version: Callable) -> None:
    uri, ttl = "s3://retune/registry/small", 20.0
    folders = [version(run.encode() * 1000, run=run) for run in "abcd"]
    racing = [Worker(publish, uri, folder, None, ttl, TRIES) for folder in folders]
    assert Counter(each.result().split()[0] for each in racing) == {"v1": 1, "Conflict": 3}
    registry = ObjectRegistry(uri)
    (first,) = registry.versions()
    assert registry.live() == first
    loser = next(folder for folder in folders if json.loads((folder / MANIFEST).read_bytes())["run"] != first.run)
    registry.publish(loser, "v1", True)

    promoting = [Worker(promote, uri, person, ttl) for person in ("ann", "bob", "cid")]
    for each in promoting:
        each.result()
    entries = history(s3, "retune/registry/small")
    assert [entry["entry"] for entry in entries] == list(range(1, len(entries) + 1))
    assert [entry["instead_of"] for entry in entries] == [None, *(entry["live"] for entry in entries[:-1])]
    assert registry.live().name == entries[-1]["live"]
    assert len({entry["reason"] for entry in entries[2:]}) == len(entries) - 2, "each entry is from another call"


def test_a_publisher_that_was_frozen_for_longer_than_its_lease_is_valid_changes_nothing_when_it_wakes(
    s3: S3, version: Callable
) -> None:
    uri = "s3://retune/registry"
    slow, quick = version(b"slow" * 1000, run="slow"), version(b"quick" * 1000, run="quick")
    started, frozen = threading.Event(), threading.Event()

    def strike(number: int, path: str) -> None:
        if "/versions/" in path and not frozen.is_set():
            assert started.wait(60)
            sleeper.send(signal.SIGSTOP)
            frozen.set()

    with Proxy(s3, strike) as proxy:
        for _ in range(TRIES):
            started.clear()
            sleeper = Worker(publish, uri, slow, None, TTL, **proxy.environment)
            started.set()
            while sleeper.running and not frozen.wait(0.05):
                pass
            if frozen.is_set():
                break  # otherwise the machine was too busy for the lease, and the publisher gave up
        try:
            assert frozen.is_set()
            assert Worker(publish, uri, quick, None, TTL, TRIES).result() == "v2"
        finally:
            sleeper.send(signal.SIGCONT)
        result = sleeper.result()
    assert result.startswith("TransientError"), result
    check_complete(ObjectRegistry(uri), "quick", b"quick" * 1000)


def test_a_damaged_live_object_or_manifest_is_reported_and_a_rollback_repairs_the_live_object(
    s3: S3, version: Callable
) -> None:
    registry = ObjectRegistry("s3://retune/registry")
    registry.publish(version(b"one"), None, True)
    registry.publish(version(b"two"), "v1", True)
    (s3.folder / "retune/registry/live.json").write_text("{")
    with pytest.raises(NotFound, match="live.json is damaged. Make a version live with the DAG rollback"):
        registry.live()
    assert registry.promote("v1", "live.json was damaged").name == "v1"
    assert registry.live().name == "v1"
    assert [entry["live"] for entry in history(s3, "retune/registry")] == ["v1", "v2", "v1"]
    manifest = registry.root / "versions" / "v2" / MANIFEST
    manifest.fs.rm_file(manifest.path)
    with pytest.raises(NotFound, match="the version v2 is not in s3://retune/registry, or its manifest is damaged"):
        registry.manifests()
    assert [each.name for each in registry.versions()] == ["v1"]
