"""Registries in a folder: read-only versions, what a killed try leaves, damage, and the lock."""

from __future__ import annotations

import logging
import os
import queue
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from include.errors import Conflict, NotFound
from include.registry import FolderRegistry
from include.storage.files import MANIFEST
from tests.services.workers import Worker, context, race

ONE, TWO, THREE = b"one" * 100, b"two" * 100, b"three" * 100


def test_a_version_is_read_only_and_live_is_a_link(tmp_path: Path, version: Callable) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    registry.publish(version(ONE), None, True)
    assert (tmp_path / "registry" / "live" / "adapter_model.safetensors").read_bytes() == ONE
    assert (registry.fetch("v1") / "adapter_model.safetensors").stat().st_mode & 0o222 == 0


def test_the_next_try_uses_the_version_that_a_killed_try_left(tmp_path: Path, version: Callable) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    registry.publish(version(ONE), None, True)
    (tmp_path / "registry" / "live").unlink()
    (tmp_path / "registry" / "history.jsonl").unlink()
    assert registry.publish(version(ONE), None, True).name == "v1"
    assert registry.live().name == "v1"


def test_a_damaged_version_is_not_listed_and_its_number_is_not_used_again(tmp_path: Path, version: Callable) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    one = registry.publish(version(ONE), None, True)
    two = registry.publish(version(TWO), one.revision, True)
    manifest = Path(two.place) / MANIFEST
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes()[:20])
    with pytest.raises(NotFound, match="its manifest is damaged. Restore it, or make another version live"):
        registry.live()
    assert registry.promote("v1", "v2 is damaged") == one
    assert (registry.live(), registry.versions()) == (one, [one])
    assert registry.publish(version(THREE), one.revision, True).name == "v3"


class _Messages(logging.Handler):
    """Puts each message of a logger into a queue."""

    def __init__(self, messages: queue.Queue[str]):
        super().__init__(logging.DEBUG)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.put(record.getMessage())


@pytest.fixture
def lock_messages() -> queue.Queue[str]:
    """The messages of filelock's own logger, which say when a lock is waited for."""
    messages: queue.Queue[str] = queue.Queue()
    logger, handler = logging.getLogger("filelock"), _Messages(messages)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize("call", ["publish", "promote"])
def test_a_change_waits_for_the_lock_and_reads_the_registry_after_it(
    call: str, tmp_path: Path, version: Callable, lock_messages: queue.Queue[str]
) -> None:
    root, other = tmp_path / "registry", FolderRegistry(tmp_path / "other")
    registry, candidate = FolderRegistry(root), version(TWO)
    other.publish(version(ONE), None, True)
    (root / "versions").mkdir(parents=True)
    calls = {
        "publish": lambda: registry.publish(candidate, None, True),
        "promote": lambda: registry.promote("v1", "to see"),
    }
    with ThreadPoolExecutor(1) as pool:
        with FileLock(root / ".lock"):
            change = pool.submit(calls[call])
            change.add_done_callback(lambda _: lock_messages.put("the call has ended"))
            while "not acquired" not in (message := lock_messages.get(timeout=60)):
                assert message != "the call has ended", "it did not wait for the lock"
            # what another process does that holds the lock
            shutil.copytree(other.root / "versions" / "v1", root / "versions" / "v1")
            if call == "publish":
                os.symlink("versions/v1", root / "live")
                shutil.copy(other.root / "history.jsonl", root)
            assert not change.done()
        if call == "publish":
            with pytest.raises(Conflict, match="v1 is live in"):
                change.result(60)
        else:
            assert change.result(60).name == "v1"
    assert (registry.live().name, [each.name for each in registry.versions()]) == ("v1", ["v1"])


def test_of_four_processes_that_publish_at_the_same_moment_one_wins(tmp_path: Path, version: Callable) -> None:
    rounds, folders = 12, [version(weights) for weights in (ONE, TWO, THREE, b"four")]
    barrier = context.Barrier(len(folders))
    workers = [Worker(race, tmp_path / "registries", folder, rounds, barrier) for folder in folders]
    results = [worker.result() for worker in workers]
    assert [sorted(each) for each in zip(*results, strict=True)] == [["Conflict"] * 3 + ["v1"]] * rounds
    for number in range(rounds):
        registry = FolderRegistry(tmp_path / "registries" / str(number))
        assert [each.name for each in registry.versions()] == ["v1"]
        assert len((registry.root / "history.jsonl").read_text().splitlines()) == 1
