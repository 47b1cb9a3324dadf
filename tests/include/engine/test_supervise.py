"""The supervisor: a process that hangs, and one whose disk is full."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from include.engine import supervise
from include.errors import NoSpace, ProcessTimeout, TransientError
from tests.services.engine import engines, wait_until


def test_a_hung_process_is_killed_but_its_start_may_take_longer(train_job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def freeze(line: str) -> None:
        if line.startswith("step 1/"):
            for pid in engines(out):
                os.kill(pid, signal.SIGSTOP)

    # Imports take longer than the timeout on any machine; the log follows the end of the first step at once.
    with pytest.raises(ProcessTimeout, match="no sign of life for 3 s"):
        supervise.run(train_job(out, max_steps=400), out, freeze, hang_timeout=3)
    wait_until(lambda: not engines(out))


def test_a_full_disk_is_reported_in_one_line_and_retried(train_job: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "training_log.jsonl").symlink_to("/dev/full")  # refuses every write, as a full disk does
    with pytest.raises(NoSpace, match="the disk of the work folder is full. Free some space and retry") as caught:
        supervise.run(train_job(out), out, lambda _: None)
    assert isinstance(caught.value, TransientError)


def test_compiled_kernels_are_not_written_into_the_checkout(var: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = supervise.environment("0")
    assert environment["UNSLOTH_COMPILE_LOCATION"] == str(var / "cache" / "unsloth")
    assert environment["TRITON_CACHE_DIR"] == str(var / "cache" / "triton")
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "/elsewhere")
    assert supervise.environment("0")["UNSLOTH_COMPILE_LOCATION"] == "/elsewhere"
