"""`python -m include.engine COMMAND JOB.json FD`: one engine job; events go to file descriptor FD as JSON lines."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import orjson

from include.errors import RetuneError
from include.store import to_json

COMMANDS = {"train": "train", "generate": "answer", "losses": "measure", "logits": "measure"}
COMMANDS |= {"merge": "merge", "merged_logits": "merge"}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(command: str, arguments: str, descriptor: str) -> int:
    """Run the command; 0 when it gave a result."""
    # A supervisor that is killed cannot pass anything on: then the kernel asks this process to stop.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        return 1
    channel = os.fdopen(int(descriptor), "wb", buffering=0)

    def send(**event: object) -> None:
        try:
            channel.write(orjson.dumps(orjson.loads(to_json(event))) + b"\n")
        except BrokenPipeError:  # nobody listens any more; SIGTERM is on its way
            pass

    try:
        module = importlib.import_module(f"include.engine.{COMMANDS[command]}")
        job = orjson.loads(Path(arguments).read_bytes())
        result = getattr(module, command)(job, lambda line, **more: send(event="say", line=line, **more))
    except RetuneError as error:
        send(event="error", kind=type(error).__name__, what=error.what, do=error.do)
        return 1
    except Exception as error:
        traceback.print_exc()
        what = " ".join(f"{type(error).__name__}: {error}".split())
        send(event="error", kind="RetuneError", what=f"the {command} process failed: {what}", do="See engine.log")
        return 1
    send(event="result", result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
