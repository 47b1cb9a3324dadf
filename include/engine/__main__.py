"""`python -m include.engine COMMAND JOB.json FD`: one engine job; events go to file descriptor FD as JSON lines.

A training with several processes becomes torchrun, whose children are this program again.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import orjson

from include.engine.distributed import COUNT, RANK
from include.errors import RetuneError
from include.storage.files import to_json

COMMANDS = {
    "train": "train", "generate": "generate", "losses": "losses", "logits": "losses", "merge": "merge",
    "merged_logits": "merge",
}  # fmt: skip
GO_ON = "Free some space and retry the task: it goes on from its last checkpoint"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(command: str, arguments: str, descriptor: str) -> int:
    """Run the command; 0 when it gave a result."""
    # A supervisor that is killed cannot pass anything on: then the kernel asks this process to stop.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        return 1
    job = orjson.loads(Path(arguments).read_bytes())
    processes = job["recipe"]["num_processes"] if command == "train" else 1
    if processes > COUNT:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "include.engine"]
        os.execv(sys.executable, [sys.executable, *run, command, arguments, descriptor])
    # torchrun hands no descriptors on, but keeps them open itself
    place = int(descriptor) if COUNT == 1 else f"/proc/{os.getppid()}/fd/{descriptor}"
    channel = open(place, "wb", buffering=0)  # noqa: SIM115  (until the process ends)

    def send(**event: object) -> None:
        try:
            channel.write(orjson.dumps(orjson.loads(to_json(event))) + b"\n")
        except BrokenPipeError:  # nobody listens any more; SIGTERM is on its way
            pass

    def say(line: str, **more: object) -> None:
        if RANK == 0:
            send(event="say", line=line, **more)

    try:
        module = importlib.import_module(f"include.engine.{COMMANDS[command]}")
        result = getattr(module, command)(job, say)
    except RetuneError as error:
        send(event="error", kind=type(error).__name__, what=error.what, do=error.do)
        return 1
    except Exception as error:
        traceback.print_exc()
        if _is_full(job.get("out", "."), error):
            send(event="error", kind="NoSpace", what="the disk of the work folder is full", do=GO_ON)
            return 1
        what = " ".join(f"{type(error).__name__}: {error}".split())
        send(event="error", kind="RetuneError", what=f"the {command} process failed: {what}", do="See engine.log")
        return 1
    if RANK == 0:
        send(event="result", result=result)
    return 0


def _is_full(folder: str, error: Exception) -> bool:
    """Whether an error comes of a full disk; PyTorch and safetensors say so in other words than the system."""
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return no_space or "No space left" in str(error) or shutil.disk_usage(folder).free < 2**20


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
