"""Engine processes from outside: find them, read their training log, and hold a training at a step."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

TRAINING_LOG = "training_log.jsonl"
PAGE = 4096  # bytes, the smallest pipe
ENTRY = 160  # bytes of the longest entry of a training log; the shortest has 88


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Return the condition's first true value; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"the condition was not met within {seconds:g} s")


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a training log."""
    path = folder / TRAINING_LOG
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def engines(folder: Path) -> list[int]:
    """Return the ids of the engine processes that work in a folder."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"include.engine" in command and str(folder).encode() in command:
            found.append(pid)
    return found


def strike(out: Path, step: int, with_signal: signal.Signals) -> threading.Thread:
    """Send the training in a folder a signal once its log has so many entries, however fast the machine is.

    The training log is a named pipe of one page, which nobody reads before the signal: it holds fewer than 47 entries,
    so that a training of more steps waits for the signal. At the end the log is a file again.
    """
    path = out / TRAINING_LOG
    out.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PAGE)

    def run() -> None:
        wait_until(lambda: _bytes_in(pipe) >= step * ENTRY)
        for pid in engines(out):
            os.kill(pid, with_signal)
        entries = b""
        while engines(out) or _bytes_in(pipe):
            if _bytes_in(pipe):
                entries += os.read(pipe, PAGE)
            else:
                time.sleep(0.02)
        os.close(pipe)
        path.unlink()
        path.write_bytes(entries)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def _bytes_in(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
