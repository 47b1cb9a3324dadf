"""Run one engine job in a subprocess, pass its progress on, and turn its end into a result or an error."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import orjson

from include import errors
from include.engine.jobs import Job, TrainJob
from include.errors import BadRecipe, ProcessLost, ProcessTimeout, RetuneError
from include.paths import PROJECT, var

LOG, JOB = "engine.log", "job.json"
GRACE = 120.0  # seconds from SIGTERM (the process saves a checkpoint first) to SIGKILL
START_TIMEOUT = 900.0  # seconds that imports, loading and compilation may take, however short hang_timeout is
RESUME = "Run again: it resumes from its last checkpoint"

R = TypeVar("R")


def run(
    job: Job[R],
    folder: Path,
    progress: Callable[[str], None],
    hang_timeout: float = 1800,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> R:
    """Do a job in a process of its own and return its result.

    Args:
        job: its class decides the command.
        folder: where the job's arguments and the process's log (its stdout and stderr) are written.
        progress: called with each line that the process has for people.
        hang_timeout: seconds without a sign of life after which the process counts as hung. Until the first training
            step is done, it is at least `START_TIMEOUT`.
        on_checkpoint: called with the folder of each checkpoint that is saved in full.

    Raises:
        ProcessTimeout: the process gave no sign of life for too long, and was killed.
        BadRecipe: the training has more processes than GPUs.
        RetuneError: the error that the process reported, of the same class.
        ProcessLost: the process was killed or asked to stop; its checkpoints are in its output folder.
    """
    processes = job.recipe.num_processes if isinstance(job, TrainJob) else 1
    gpus = visible_gpus(processes)
    folder.mkdir(parents=True, exist_ok=True)
    job_file = folder / JOB
    job_file.write_bytes(job.to_json())
    reader, writer = os.pipe()
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "include.engine", job.command, str(job_file), str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            cwd=PROJECT,  # the checkout is on the process's path
            env=environment(gpus),
            start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor only, which passes it on
        )
    os.close(writer)
    result: Any = None
    failure: RetuneError | None = None
    with _stopping(process) as stop, os.fdopen(reader, "rb") as pipe:
        for event in _events(pipe, process, hang_timeout):
            if event["event"] == "progress":
                if event["line"]:
                    progress(event["line"])
                if on_checkpoint and event["checkpoint"]:
                    on_checkpoint(Path(event["checkpoint"]))
            elif event["event"] == "result":
                result = job.result_from_json(orjson.dumps(event["result"]))
            elif event["event"] == "error":
                failure = failure or getattr(errors, event["kind"], RetuneError)(event["what"], event["do"])
        process.wait()
    if failure:
        raise failure
    if stop.requested:
        raise ProcessLost(f"the {job.command} process was asked to stop", RESUME)
    if result is None or process.returncode != 0:
        raise _lost(job.command, process.returncode, folder / LOG)
    return result


def visible_gpus(processes: int) -> str:
    """Return CUDA_VISIBLE_DEVICES for as many processes: the first of the GPUs that this process may use.

    More GPUs than processes must not be visible: transformers would spread one process's batch over all of them, and
    multiply it. The ids are numbers, or the UUIDs of GPUs or of their slices (MIG), as CUDA reads them.

    Raises:
        BadRecipe: CUDA_VISIBLE_DEVICES names fewer GPUs than there are processes.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return ",".join(map(str, range(processes)))  # on a machine without a GPU this has no effect
    ids = [id.strip() for id in named.split(",")]
    ids = list(takewhile(lambda id: id.isdigit() or id.startswith(("GPU-", "MIG-")), ids))  # CUDA ends there, too
    if 0 < len(ids) < processes:
        raise BadRecipe(
            f"field 'num_processes': {processes} processes need as many GPUs, CUDA_VISIBLE_DEVICES={named} shows "
            f"{len(ids)}",
            "Lower num_processes, or run the gpu queue's worker with more GPUs",
        )
    return ",".join(ids[:processes]) if ids else named


def environment(gpus: str) -> dict[str, str]:
    """Return the process's environment: its GPUs, offline, no bars, compiled kernels in the cache, not in the checkout.

    Unsloth writes `unsloth_compiled_cache` into the current directory unless UNSLOTH_COMPILE_LOCATION names another.
    """
    cache = var() / "cache"
    caches = {"UNSLOTH_COMPILE_LOCATION": str(cache / "unsloth"), "TRITON_CACHE_DIR": str(cache / "triton")}
    return {**caches, **os.environ, "CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def _events(pipe: Any, process: subprocess.Popen[bytes], hang_timeout: float) -> Iterator[dict[str, Any]]:
    """Yield the process's events until it closes the pipe.

    Raises:
        ProcessTimeout: none came for too long; the process has been killed.
    """
    os.set_blocking(pipe.fileno(), False)
    rest, timeout = b"", max(hang_timeout, START_TIMEOUT)
    while True:
        ready, _, _ = select.select([pipe], [], [], timeout)
        if not ready:
            process.kill()
            raise ProcessTimeout(
                f"the process gave no sign of life for {timeout:,.0f} s and was killed",
                f"{RESUME}; raise hang_timeout if its steps take that long",
            )
        part = pipe.read()
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            event = orjson.loads(line)
            if event.get("training"):
                timeout = hang_timeout
            yield event


class _Stop:
    requested = False


@contextmanager
def _stopping(process: subprocess.Popen[bytes]) -> Iterator[_Stop]:
    """Pass SIGTERM on to the process; at the end, however it comes, no process is left."""
    stop = _Stop()

    def on_sigterm(*_: Any) -> None:
        stop.requested = True
        process.terminate()

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, on_sigterm) if in_main_thread else None
    try:
        yield stop
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _lost(command: str, status: int, log: Path) -> RetuneError:
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return ProcessLost(f"the {command} process was ended by {name}{hint}", RESUME)
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["its log is empty"]
    return ProcessLost(f"the {command} process ended with status {status}: {last[0]}", f"See {log}")
