"""Worker processes of tests: forked from one process that has imported the storage and registry rooms already.

A worker is a real process with clients of its own, which a test may kill or stop; only the imports (a second of CPU
each) are shared.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from include.errors import RetuneError, TransientError
from include.pipeline.stage import Lineage
from include.registry import FolderRegistry, ObjectRegistry
from include.storage.artifacts import Store
from include.storage.files import remove

WAIT_SECONDS = 120.0
DONE = "done"

STAGES = ("tasks.standardize", "tasks.template", "pandas", "datasets", "tokenizers")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.services.workers", "s3fs", "aiobotocore.session", *STAGES])


class Worker:
    """A process that calls a function of this module.

    Args:
        arguments: for the function.
        environment: added to this process's environment.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, **environment: str):
        self._results, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_call, args=(sender, {**os.environ, **environment}, function, arguments), daemon=True
        )
        self._process.start()
        sender.close()

    @property
    def running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid or 0

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def result(self) -> Any:
        """Wait for the end of the process; return the function's value, or None if the process was killed."""
        try:
            assert self._results.poll(WAIT_SECONDS), "the worker does not answer"
            return self._results.recv()
        except EOFError:
            return None
        finally:
            self._process.join(WAIT_SECONDS)


def _call(sender: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sender.send(function(*arguments))


def publish(uri: str, folder: Path, parent: str | None, ttl: float, tries: int = 1) -> str:
    """Publish a folder; return the version's name, or the error. A slow machine may need several tries."""
    for left in reversed(range(tries)):
        try:
            return ObjectRegistry(uri, ttl).publish(folder, parent, True).name
        except TransientError as error:
            if not left:
                return f"TransientError {error}"
        except RetuneError as error:
            return f"{type(error).__name__} {error}"
    raise AssertionError("no try")


def promote(uri: str, person: str, ttl: float) -> None:
    """Make v1 and v2 live in turn."""
    for number in range(4):
        while True:
            try:
                ObjectRegistry(uri, ttl).promote(f"v{number % 2 + 1}", f"{person} {number}")
                break
            except TransientError:  # the machine was too slow
                continue


def race(root: Path, folder: Path, rounds: int, barrier: Barrier) -> list[str]:
    """Publish a folder to a new folder registry in each round, at the same moment as the other workers."""
    results = []
    for number in range(rounds):
        registry = FolderRegistry(root / str(number))
        barrier.wait(WAIT_SECONDS)
        try:
            results.append(registry.publish(folder, None, True).name)
        except (RetuneError, OSError) as error:  # an OSError would be the registry's fault, and fails the test
            results.append(type(error).__name__)
    return results


def commit(work: Path, by: str, fingerprint: str) -> None:
    """Commit an artifact of three files and write a record about it."""
    work.mkdir(parents=True)
    for number in range(3):
        (work / f"{number}.bin").write_bytes(by.encode())
    Store().commit(work, "small", "train", fingerprint, summary="", metadata={"by": by}, inputs={})
    Store().write_record("small", "run", fingerprint, {"by": by})


def run_stage(stage: str, way: str, lineage: Lineage, step: str, shard: Any) -> str:
    """Call a method of a sharded stage, or do one of its steps; return the method's value as JSON, or `DONE`.

    The worker leads a process group of its own, with the processes that it forks.
    """
    os.setsid()
    sharded = getattr(import_module(f"tasks.{stage}"), stage)
    if way != "do":
        return json.dumps(getattr(sharded, way)(lineage))
    sharded.run_step(lineage, next(one for one in sharded.steps if one.name == step), shard)
    return DONE


def remove_artifact(fingerprint: str) -> None:
    """Remove an artifact of `commit`."""
    remove(Store().path("small", "train", fingerprint))


def remove_file(*path: str) -> None:
    """Remove one file of the store."""
    file = Store().path(*path)
    file.fs.rm(file.path)
