"""Files and manifests: digests, readable JSON, atomic writes, and removal that never leaves a folder half valid."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import orjson
from upath import UPath

from include.storage.locations import is_local

MANIFEST = "manifest.json"
OLD = ".old-"  # in the name of a folder that is being removed
DAMAGED = ".damaged-"  # in the name of a folder that is kept for a person to look at
PACKAGES = (
    "apache-airflow", "accelerate", "bitsandbytes", "datasets", "great-expectations", "huggingface-hub", "peft",
    "tokenizers", "torch", "transformers", "trl", "unsloth",
)  # fmt: skip


def now(precision: str = "seconds") -> str:
    """Return the current time in UTC as ISO 8601.

    Args:
        precision: see `timespec` of `datetime.isoformat`.
    """
    return datetime.now(UTC).isoformat(timespec=precision)


def fingerprint(values: Any) -> str:
    """Return the first 16 hex digits of the sha256 of JSON values; the order of keys does not matter."""
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `bytes` and `sha256` of each file below a folder, by relative path; the manifest itself is left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, files)
        return {
            p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": digest}
            for p, digest in zip(files, digests, strict=True)
        }


def installed_packages() -> dict[str, str]:
    """Return the versions of the packages that decide what a run produces."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = package_version(name)
        except PackageNotFoundError:
            continue
    return found


def to_json(value: Any) -> bytes:
    """Return a value as indented JSON with a newline at the end; NumPy values and paths are accepted."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(value, option=options, default=str)


def atomic_write(path: UPath | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new content, never a part."""
    if isinstance(path, UPath) and not is_local(path):
        path.fs.pipe_file(path.path, content)  # object stores make an object visible only when it is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    target = _local_path(path)
    tmp_path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with tmp_path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, target)
    finally:
        tmp_path.unlink(missing_ok=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder to a new place where it may be written, also if the source is read-only."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def seal(folder: Path, files: Iterable[str], at: str) -> None:
    """Make a folder read-only. Its files get one modification time, so that a later change shows.

    Args:
        files: relative paths of the files that get the time.
        at: the time, ISO 8601.
    """
    for name in files:
        os.utime(folder / name, (seconds := datetime.fromisoformat(at).timestamp(), seconds))
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


def changed_file(folder: Path, files: dict[str, dict[str, Any]], at: str | None) -> str | None:
    """Return a clause about the first file that is not as described, or None if all are.

    A file of the right size and modification time is not read; any other is compared with its digest.

    Args:
        files: `bytes` and `sha256` by relative path.
        at: the modification time that `seal` gave the files, ISO 8601; None if it is not known.
    """
    sealed = int(datetime.fromisoformat(at).timestamp()) * 10**9 if at else None
    for name, expected in files.items():
        path = folder / name
        try:
            state = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        if state.st_size != expected["bytes"]:
            return f"{name} has {state.st_size:,} bytes instead of {expected['bytes']:,}"
        if state.st_mtime_ns != sealed:
            if file_digest(path) != expected["sha256"]:
                return f"{name} has changed (its sha256 differs)"
            with suppress(PermissionError):  # the file is another account's
                if sealed is not None:
                    os.utime(path, ns=(sealed, sealed))  # the next check need not read it
    return None


def remove_tree(folder: Path) -> None:
    """Remove a local folder, also if it is read-only, as far as the disk permits."""
    make_writable(folder)
    shutil.rmtree(folder, ignore_errors=True)


def make_writable(folder: Path) -> None:
    """Permit the owner to add and remove files in a folder and below it, after `seal`."""
    for root, _, _ in os.walk(folder):  # from the top: a folder must be readable before its content is listed
        with suppress(OSError):
            os.chmod(root, 0o755)


def move_folder(source: Path, target: Path) -> None:
    """Move a finished folder to its place in one step, also across file systems; an older folder there is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        os.rename(source, tmp_path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(source, tmp_path)
        remove_tree(source)
    if target.exists():
        os.rename(target, target.with_name(f".{target.name}{OLD}{uuid.uuid4().hex}"))
    os.rename(tmp_path, target)
    for old in target.parent.glob(f".{target.name}{OLD}*"):
        remove_tree(old)


def remove(folder: UPath | Path) -> None:
    """Remove a folder, manifests first, so that after a crash the remaining files do not count as a valid folder.

    On a disk the folder is renamed before its files are removed. Two processes may remove the same folder at once.

    Raises:
        PermissionError: the object store did not delete all objects.
    """
    if isinstance(folder, UPath) and not is_local(folder):
        _remove_objects(folder)
        return
    make_writable(_local_path(folder))
    with suppress(FileNotFoundError):  # another process was faster
        for manifest in (folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")):
            with suppress(FileNotFoundError):
                manifest.unlink()
        path = _local_path(folder)
        old = path.with_name(f".{path.name}{OLD}{uuid.uuid4().hex}")
        os.rename(path, old)
        remove_tree(old)


def _remove_objects(folder: UPath) -> None:
    objects = folder.fs.find(folder.path)
    manifests = [name for name in objects if name.rsplit("/", 1)[-1] == MANIFEST]
    with suppress(FileNotFoundError):
        if manifests:
            folder.fs.rm(manifests)
        folder.fs.rm(folder.path, recursive=True)
    # S3 answers which objects it did not delete, but s3fs does not raise an error for them
    if remaining := set(folder.fs.find(folder.path)) & set(objects):
        raise PermissionError(errno.EACCES, f"{len(remaining)} objects of {folder} cannot be deleted")


def _local_path(path: UPath | Path) -> Path:
    return Path(path.path if isinstance(path, UPath) else path)
