"""What a library raises in a job: one sentence with cause and remedy, of the class that decides about retries."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from include.errors import BadData, NoSpace, NotFound, PermanentError, ProcessLost, RetuneError, TransientError

# of errors that the same input raises again; RuntimeError and OSError may have a passing cause
REPEATABLE = (TypeError, ValueError, LookupError, AttributeError, ImportError, AssertionError, NotImplementedError)
MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
DEVICE = ("CUDA error", "CUDA driver", "cuDNN error", "NCCL", "CUBLAS_STATUS", "ECC error", "DistBackendError", "Gloo")
MAX_CHARS = 300


def explain(error: Exception, command: str, folder: Path) -> RetuneError:
    """Return the error to report for one that a library has raised.

    Args:
        command: the job's.
        folder: the job's output folder; it need not exist.
    """
    text, name = " ".join(str(error).split())[:MAX_CHARS], type(error).__name__
    if _is_disk_full(folder, error):
        return NoSpace(
            "the disk of the work folder is full",
            "Free some space and retry the task: it resumes from its last checkpoint",
        )
    if name == "SafetensorError":
        return NotFound(f"a file of weights is damaged or cut off ({text})", "Copy or download the model again")
    if isinstance(error, MemoryError) or any(sign in text for sign in MEMORY):
        return TransientError(
            f"the {command} process had too little memory ({text or name})",
            "Retry when nothing else uses the device; or use load_in_4bit, a smaller base, or a larger device",
        )
    if "device-side assert" in text:
        return PermanentError(
            f"the {command} process failed on the GPU: an id or index is out of range ({text})",
            "Check that the tokenizer belongs to the base, and set CUDA_LAUNCH_BLOCKING=1 to see the line",
        )
    if any(sign in f"{name}: {text}" for sign in DEVICE):
        return ProcessLost(
            f"the GPU or its connection failed in the {command} process ({text})", "Run again; see dmesg"
        )
    if "NaNs detected in the merged weights" in text or "probability tensor contains" in text:
        return BadData(
            f"the {command} process computed numbers that are not finite ({text})",
            "Adapter or base is damaged: train again, with a lower learning_rate",
        )
    if isinstance(error, ImportError):
        return PermanentError(
            f"the {command} process lacks a package ({text})",
            "pip install -r requirements.txt (and requirements-gpu.txt)",
        )
    kind = PermanentError if isinstance(error, REPEATABLE) else RetuneError
    return kind(f"the {command} process failed: {name}: {text}", "See engine.log")


def _is_disk_full(folder: Path, error: Exception) -> bool:
    """Return whether a full disk caused the error; PyTorch and safetensors raise errors of their own for it."""
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return no_space or "No space left" in str(error) or shutil.disk_usage(existing).free < 2**20
