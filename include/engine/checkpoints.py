"""The files of a training: its log, and checkpoints that a later try resumes from."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
from upath import UPath

from include.storage.files import MANIFEST, atomic_write, describe_files, to_json

ADAPTER, CHECKPOINTS, TRAINING_LOG = "adapter", "checkpoints", "training_log.jsonl"


def checkpoint_step(checkpoint: Path | UPath) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def complete_checkpoint(checkpoint: Path) -> None:
    """Write a checkpoint's manifest with the digests of its files: from then on it counts as whole."""
    content = {"step": checkpoint_step(checkpoint), "files": describe_files(checkpoint)}
    atomic_write(checkpoint / MANIFEST, to_json(content))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, whose files have the digests in its manifest. Remove newer ones that are
    incomplete or damaged.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        try:
            files = orjson.loads((checkpoint / MANIFEST).read_bytes())["files"]
            if describe_files(checkpoint) == files:
                return checkpoint
        except (OSError, orjson.JSONDecodeError, KeyError):
            pass
        shutil.rmtree(checkpoint, ignore_errors=True)  # another process of this training may do the same
    return None
