"""`python -m include.engine COMMAND JOB.json FD`: do one engine job; write events to file descriptor FD as JSON lines.

A training with several processes becomes torchrun, whose children are this program again.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import orjson

from include.engine.distributed import RANK, WORLD_SIZE
from include.engine.jobs import JOBS, TrainJob
from include.errors import RetuneError

MODULES = {
    "train": "train", "generate": "generate", "losses": "losses", "logits": "losses", "merge": "merge",
    "merged_logits": "merge",
}  # fmt: skip
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(command: str, job_file: str, descriptor: str) -> int:
    """Do the job and return the exit status: 0 when it gave a result."""
    gc.set_threshold(50_000)  # imports make a million objects that stay: collecting every 700 took a second
    # If the supervisor is killed, it cannot pass a signal on: the kernel then sends this process SIGTERM.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        return 1
    job = JOBS[command].from_json(Path(job_file).read_bytes())
    processes = job.recipe.num_processes if isinstance(job, TrainJob) else 1
    if processes > WORLD_SIZE:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "include.engine"]
        os.execv(sys.executable, [sys.executable, *run, command, job_file, descriptor])
    # torchrun does not pass descriptors to its children, but keeps them open itself.
    pipe = int(descriptor) if WORLD_SIZE == 1 else f"/proc/{os.getppid()}/fd/{descriptor}"
    channel = open(pipe, "wb", buffering=0)  # noqa: SIM115  (until the process ends)

    def send(**event: object) -> None:
        try:
            channel.write(orjson.dumps(event, default=str) + b"\n")
        except BrokenPipeError:  # the supervisor is gone; SIGTERM is on its way
            pass

    def progress(line: str, *, training: bool = False, checkpoint: Path | None = None) -> None:
        if RANK == 0:
            send(event="progress", line=line, training=training, checkpoint=checkpoint)

    try:
        module = importlib.import_module(f"include.engine.{MODULES[command]}")
        result = getattr(module, command)(job, progress)
    except RetuneError as error:
        send(event="error", kind=type(error).__name__, what=error.what, do=error.do)
        return 1
    except Exception as error:
        traceback.print_exc()
        if _is_disk_full(getattr(job, "out", Path()), error):
            do = "Free some space and retry the task: it resumes from its last checkpoint"
            send(event="error", kind="NoSpace", what="the disk of the work folder is full", do=do)
            return 1
        what = " ".join(f"{type(error).__name__}: {error}".split())
        send(event="error", kind="RetuneError", what=f"the {command} process failed: {what}", do="See engine.log")
        return 1
    if RANK == 0:
        send(event="result", result=orjson.Fragment(job.result_to_json(result)))
    return 0


def _is_disk_full(folder: Path, error: Exception) -> bool:
    """Return whether a full disk caused the error; PyTorch and safetensors raise errors of their own for it."""
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return no_space or "No space left" in str(error) or shutil.disk_usage(folder).free < 2**20


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
