"""Files: digests, atomic writes, removal that leaves no half a reader could take for whole."""

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

from include.storage.object_store import is_local

MANIFEST = "manifest.json"
OLD = ".old-"  # in the name of a folder that is on its way out
PACKAGES = (
    "apache-airflow", "accelerate", "bitsandbytes", "datasets", "great-expectations", "huggingface-hub", "peft",
    "tokenizers", "torch", "transformers", "trl", "unsloth",
)  # fmt: skip


def now(precision: str = "seconds") -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=precision)


def fingerprint(facts: Any) -> str:
    """sha256 (hex, first 16 digits) of JSON values, independent of the order of keys."""
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file below a folder, by relative path, the manifest itself left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, files)
        return {
            p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": digest}
            for p, digest in zip(files, digests, strict=True)
        }


def installed_packages() -> dict[str, str]:
    """Versions of the packages that decide what a run produces."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = package_version(name)
        except PackageNotFoundError:
            continue
    return found


def to_json(value: Any) -> bytes:
    """Readable JSON bytes with a newline at the end; NumPy scalars and paths are understood."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(value, option=options, default=str)


def atomic_write(path: UPath | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    if isinstance(path, UPath) and not is_local(path):
        path.fs.pipe_file(path.path, content)  # object stores make an object visible only when it is whole
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    target = Path(path.path if isinstance(path, UPath) else path)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def remove(folder: UPath | Path) -> None:
    """Remove a folder, manifests first: what is left of it at any moment, also after a crash, is worth nothing.

    On a disk it goes out of the way in one step before its files are removed. Two may remove the same folder at once.
    """
    if isinstance(folder, UPath) and not is_local(folder):
        _remove_objects(folder)
        return
    with suppress(FileNotFoundError):  # somebody else was faster
        for manifest in (folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")):
            with suppress(FileNotFoundError):
                manifest.unlink()
        place = Path(folder.path if isinstance(folder, UPath) else folder)
        aside = place.with_name(f".{place.name}{OLD}{uuid.uuid4().hex}")
        os.rename(place, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _remove_objects(folder: UPath) -> None:
    found = folder.fs.find(folder.path)
    manifests = [name for name in found if name.rsplit("/", 1)[-1] == MANIFEST]
    with suppress(FileNotFoundError):
        if manifests:
            folder.fs.rm(manifests)
        folder.fs.rm(folder.path, recursive=True)
    if left := set(folder.fs.find(folder.path)) & set(found):  # S3 tells what was not deleted, and s3fs keeps it quiet
        raise PermissionError(errno.EACCES, f"{len(left)} objects of {folder} cannot be deleted")
