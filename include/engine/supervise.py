"""Runs one engine job in a subprocess, passes on what it says, and turns its end into a result or an error."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from include import errors
from include.errors import ProcessLost, ProcessTimeout, RetuneError
from include.paths import PROJECT
from include.storage.files import to_json

LOG, JOB = "engine.log", "job.json"
GRACE = 120.0  # seconds from asking the process to stop (it saves a checkpoint first) to killing it


def run(
    command: str,
    job: dict[str, Any],
    folder: Path,
    say: Callable[[str], None],
    silence: float = 1800,
    saved: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Run `python -m include.engine COMMAND` and return its result.

    Args:
        command: train, generate, losses or logits.
        job: the command's arguments, plain JSON values.
        folder: where the job's arguments and the log of the process (its stdout and stderr) go.
        say: called with each line that the process has for people.
        silence: seconds without a word of the process after which it is taken to hang.
        saved: called with each checkpoint that is whole.

    Raises:
        ProcessTimeout: it was silent for too long, and was killed.
        RetuneError: what the process reported, of the class it reported.
        ProcessLost: it was killed or asked to stop; what it had saved is in its output folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = folder / JOB
    arguments.write_bytes(to_json(job))
    reader, writer = os.pipe()
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "include.engine", command, str(arguments), str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            cwd=PROJECT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},  # cwd puts the checkout on its path
            start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor only, which then decides
        )
    os.close(writer)
    result: dict[str, Any] | None = None
    failure: RetuneError | None = None
    with _stopping(process) as stop, os.fdopen(reader, "rb") as events:
        for line in _lines(events, process, silence):
            event = orjson.loads(line)
            if event["event"] == "say":
                if event["line"]:  # an empty one is a sign of life
                    say(event["line"])
                if saved and "saved" in event:
                    saved(Path(event["saved"]))
            elif event["event"] == "result":
                result = event["result"]
            elif event["event"] == "error":
                failure = failure or getattr(errors, event["kind"], RetuneError)(event["what"], event["do"])
        process.wait()
    if failure:
        raise failure
    if stop.asked:
        raise ProcessLost(f"the {command} process was asked to stop", "Run again: it goes on from its last checkpoint")
    if result is None or process.returncode != 0:
        raise _lost(command, process.returncode, folder / LOG)
    return result


def _lines(events: Any, process: subprocess.Popen[bytes], silence: float) -> Iterator[bytes]:
    """The lines of a pipe until it is closed."""
    os.set_blocking(events.fileno(), False)
    rest = b""
    while True:
        ready, _, _ = select.select([events], [], [], silence)
        if not ready:
            process.kill()
            raise ProcessTimeout(
                f"the process gave no sign of life for {silence:,.0f} s and was ended",
                "Run again: it goes on from its last checkpoint; raise hang_timeout if it only takes long",
            )
        part = events.read()
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


class _Stop:
    asked = False


@contextmanager
def _stopping(process: subprocess.Popen[bytes]) -> Iterator[_Stop]:
    """Passes SIGTERM on to the process, and leaves no process behind whatever ends the wait for it."""
    stop = _Stop()

    def on_sigterm(*_: Any) -> None:
        stop.asked = True
        process.terminate()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, on_sigterm) if main else None
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
        if main:
            signal.signal(signal.SIGTERM, before)


def _lost(command: str, code: int, log: Path) -> RetuneError:
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return ProcessLost(
            f"the {command} process was ended by {name}{hint}", "Run again: it goes on from its last checkpoint"
        )
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    return ProcessLost(f"the {command} process ended with status {code}: {last[0]}", f"See {log}")
