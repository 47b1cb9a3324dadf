"""Cleanup: remove old folders, unfinished work, caches and logs, or only report what would be removed.

The callers decide how old is too old (see `include.pipeline.retention`).
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from jinja2.filters import do_filesizeformat
from upath import UPath

from include.storage.files import remove
from include.storage.object_store import log

CACHES = ("store", "published", "datasets", "unsloth", "triton")  # in `var/cache`: a folder per artifact, version ...
HUB_CACHES = ("hub", "huggingface/hub")  # with the layout of huggingface_hub; `datasets` writes into the second one
HEADLESS_LOGS = "*-????????-??????.log"
LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass
class Removal:
    """Removes folders and files, or only logs them, and counts them.

    Attributes:
        owner: the recipe or machine to which everything belongs, for messages.
        dry_run: only log and count.
        counts: number of removed things by kind.
        bytes: size of all of them.
    """

    owner: str
    dry_run: bool
    counts: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    def add(self, path: UPath | Path, kind: str, size: int) -> None:
        """Log and count one thing, without removing it.

        Args:
            kind: a singular noun: artifact, cache, log ...
            size: bytes.
        """
        log.info("%s %s, %s", "would remove" if self.dry_run else "removing", path, do_filesizeformat(size))
        self.counts[kind] += 1
        self.bytes += size

    def remove_folder(self, folder: UPath | Path, kind: str, size: int) -> None:
        """Log and count a folder, and remove it unless this is a dry run; see `add` for the arguments."""
        self.add(folder, kind, size)
        if not self.dry_run:
            remove(folder)

    def summary(self, *kinds: str) -> str:
        """Return one line with all counts; the given kinds are named also if there was nothing to remove."""
        parts = [
            f"{self.counts[kind]} {kind}{'' if self.counts[kind] == 1 else 's'}"
            for kind in dict.fromkeys([*kinds, *self.counts])
        ]
        things = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
        verb = "would remove" if self.dry_run else "removed"
        return f"{verb} {things} of {self.owner}, {do_filesizeformat(self.bytes)}"


def remove_work(folder: Path, oldest: datetime, removal: Removal) -> int:
    """Remove unfinished work of a recipe on this machine, except what a running process has locked.

    Args:
        folder: `var/work/<recipe>`, with a folder per stage.
        oldest: work that was used later is kept.

    Returns:
        How many work folders are kept.
    """
    kept = 0
    names = {(path.parent, _work_name(path.name)) for path in folder.glob("*/*")}
    for stage, name in sorted(names):
        work, lock = stage / name, stage / f".{name}.lock"
        if max(last_used(work), last_used(lock)) > oldest:
            kept += work.exists()
            continue
        lock_existed = lock.exists()
        try:
            with FileLock(lock, timeout=0):
                if work.exists():
                    removal.remove_folder(work, "work folder", folder_size(work))
                if not (removal.dry_run and lock_existed):
                    lock.unlink(missing_ok=True)  # a process that waits for the lock notices and creates it again
        except Timeout:
            kept += 1
    return kept


def _work_name(name: str) -> str:
    return name[1:].removesuffix(".lock") if name.startswith(".") and name.endswith(".lock") else name


def remove_caches(var: Path, oldest: datetime, removal: Removal) -> None:
    """Remove caches and logs of headless runs that were not used since a time. Caches can be downloaded again.

    Args:
        var: the state folder of this machine.
    """
    cache = var / "cache"
    for folder in (path for name in CACHES for path in cache.glob(f"{name}/*")):
        if folder.is_dir() and last_used(folder) < oldest:
            removal.remove_folder(folder, "cache", folder_size(folder))
    for name in HUB_CACHES:
        if (cache / name).is_dir():
            _remove_revisions(cache / name, oldest, removal)
    for path in var.glob(f"logs/{HEADLESS_LOGS}"):
        if last_used(path) < oldest:
            removal.add(path, "log", path.stat().st_size)
            if not removal.dry_run:
                path.unlink(missing_ok=True)


def _remove_revisions(cache: Path, oldest: datetime, removal: Removal) -> None:
    """Remove old revisions of models and datasets from a cache of huggingface_hub; files that newer revisions share
    are kept."""
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(cache)
    old = [
        revision
        for repository in info.repos
        for revision in repository.revisions
        if max((file.blob_last_accessed for file in revision.files), default=0) < oldest.timestamp()
        and revision.last_modified < oldest.timestamp()
    ]
    if old:
        strategy = info.delete_revisions(*(revision.commit_hash for revision in old))
        for revision in old:
            log.info("%s %s", "would remove" if removal.dry_run else "removing", revision.snapshot_path)
        removal.counts["revision"] += len(old)
        removal.bytes += strategy.expected_freed_size
        if not removal.dry_run:
            strategy.execute()


def last_modified(folder: UPath) -> datetime:
    """Return when a file in a folder of the store was last written: `LONG_AGO` if the folder is empty, the current time
    if the store does not say."""
    newest = LONG_AGO
    try:
        for name, info in folder.fs.find(folder.path, detail=True).items():
            newest = max(newest, info.get("LastModified") or folder.fs.modified(name))  # S3 says it in the listing
        if folder.name.startswith(".") and newest > LONG_AGO:
            newest = max(newest, folder.fs.modified(folder.path))  # a running copy keeps the times of its source files
    except (FileNotFoundError, NotImplementedError):
        return datetime.now(UTC)
    return newest


def last_used(path: Path) -> datetime:
    """Return when a local file, or any file in a folder, was last written or read; 1970 if there is none."""
    newest = 0.0
    for file in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            if not file.is_dir():
                state = file.lstat()
                newest = max(newest, state.st_mtime, state.st_atime)
    return datetime.fromtimestamp(newest, UTC)


def folder_size(folder: UPath | Path) -> int:
    """Return the bytes of all files below a folder."""
    if isinstance(folder, UPath):
        return sum(info["size"] for info in folder.fs.find(folder.path, detail=True).values())
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
