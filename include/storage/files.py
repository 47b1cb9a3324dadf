"""Files and manifests: digests, readable JSON, atomic writes, and removal that never leaves a folder half valid."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
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
        shutil.rmtree(source)
    if target.exists():
        os.rename(target, target.with_name(f".{target.name}{OLD}{uuid.uuid4().hex}"))
    os.rename(tmp_path, target)
    for old in target.parent.glob(f".{target.name}{OLD}*"):
        shutil.rmtree(old, ignore_errors=True)


def remove(folder: UPath | Path) -> None:
    """Remove a folder, manifests first, so that after a crash the remaining files do not count as a valid folder.

    On a disk the folder is renamed before its files are removed. Two processes may remove the same folder at once.

    Raises:
        PermissionError: the object store did not delete all objects.
    """
    if isinstance(folder, UPath) and not is_local(folder):
        _remove_objects(folder)
        return
    with suppress(FileNotFoundError):  # another process was faster
        for manifest in (folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")):
            with suppress(FileNotFoundError):
                manifest.unlink()
        path = _local_path(folder)
        old = path.with_name(f".{path.name}{OLD}{uuid.uuid4().hex}")
        os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)


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
