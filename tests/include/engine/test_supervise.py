"""The supervisor: a process that hangs, and one whose disk is full."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from include.engine import supervise
from include.errors import BadRecipe, NoSpace, ProcessTimeout, TransientError
from tests.services.engine import engines, wait_until


def test_a_hung_process_is_killed_but_its_start_may_take_longer(
    train_job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    visible = []

    def freeze(line: str) -> None:
        if line.startswith("step 1/"):
            for pid in engines(out):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                visible.extend(v for v in variables if v.startswith(b"CUDA_VISIBLE_DEVICES="))
                os.kill(pid, signal.SIGSTOP)

    # Imports take longer than the timeout on any machine; the log follows the end of the first step at once.
    with pytest.raises(ProcessTimeout, match="no sign of life for 3 s"):
        supervise.run(train_job(out, max_steps=400), out, freeze, hang_timeout=3)
    wait_until(lambda: not engines(out))
    assert visible == [b"CUDA_VISIBLE_DEVICES=GPU-a"], "one process, one GPU"


@pytest.mark.parametrize(
    ("named", "processes", "visible"),
    [
        (None, 1, "0"),
        (None, 3, "0,1,2"),
        ("2,3", 1, "2"),
        ("3, 2,1", 2, "3,2"),
        ("GPU-8932f937-d72c,GPU-2", 1, "GPU-8932f937-d72c"),
        ("MIG-a/1/0,MIG-b", 2, "MIG-a/1/0,MIG-b"),
        ("1,-1,2", 1, "1"),
        ("", 1, ""),
        ("", 2, ""),
        ("-1", 1, "-1"),
        ("NoDevFiles", 2, "NoDevFiles"),
    ],
)
def test_a_process_sees_as_many_gpus_as_it_uses(
    named: str | None, processes: int, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert supervise.visible_gpus(processes) == visible
    assert supervise.environment(visible)["CUDA_VISIBLE_DEVICES"] == visible


def test_more_processes_than_visible_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,-1,5")
    with pytest.raises(
        BadRecipe, match="field 'num_processes': 2 processes need .* CUDA_VISIBLE_DEVICES=4,-1,5 shows 1"
    ):
        supervise.visible_gpus(2)


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
