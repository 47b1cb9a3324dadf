"""The artifact store: every stage's output in a folder of its own, committed by a manifest that is written last.

`<store>/<recipe>/<stage>/<fingerprint>/manifest.json`. A folder with a valid manifest is complete and is never
written again; one without is worth nothing. The store is a URI that fsspec understands; tasks share nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import orjson
from upath import UPath

from include.errors import NoPermission, NoSpace, RetuneError, TransientError
from include.objects import at, entries, object_errors, read_all, sizes, upload
from include.objects import is_local as _is_local
from include.settings import store_uri, var

MANIFEST = "manifest.json"
INCOMING = ".incoming"  # in a folder: files on their way in, apart from what is read by listing a folder
FETCHED_AT_ONCE = 8  # files, from a store that is elsewhere
SETTING = "RETUNE_STORE"
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


def write_aside(path: UPath | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    if isinstance(path, UPath) and not _is_local(path):
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
    if isinstance(folder, UPath) and not _is_local(folder):
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


@dataclass(frozen=True)
class Artifact:
    """One committed folder of the store."""

    folder: UPath
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The name of the folder: what the content was made of."""
        return self.manifest["fingerprint"]

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage found out, as plain JSON values."""
        return self.manifest["facts"]

    def local(self, *names: str, into: Path | None = None) -> Path:
        """The folder on this machine's disk, with the named files in it.

        Where the store is elsewhere, they are fetched several at once, unless they are there already; each is compared
        with the manifest. Tasks of one machine may fetch the same at once.

        Args:
            names: files, or folders for all that is in them; none: everything.
            into: a folder of the caller's, in place of `var/cache`, whose content stays until nobody has used it for
                long.

        Raises:
            RetuneError: a file is no longer in the store.
            TransientError: what came is not what the manifest says.
            OSError: the store or the disk does not do it.
        """
        if _is_local(self.folder):
            return Path(self.folder.path)
        # what was made again at the same place has other files and so another folder
        made_of = hashlib.sha256(str(self.folder).encode() + orjson.dumps(self.manifest["files"])).hexdigest()[:16]
        target = into or var() / "cache" / "store" / made_of
        single, below = set(names), tuple(f"{name}/" for name in names)
        wanted = [name for name in self.manifest["files"] if not names or name in single or name.startswith(below)]
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            for _ in pool.map(lambda name: self._fetch(name, target), wanted):
                pass
        if into is None:
            if not (target / MANIFEST).exists():
                write_aside(target / MANIFEST, to_json(self.manifest))
            with suppress(FileNotFoundError):
                os.utime(target / MANIFEST)  # its last use, for `tasks.maintain`
        return target

    def _fetch(self, name: str, folder: Path) -> None:
        said, target, aside = self.manifest["files"][name], folder / name, folder / INCOMING / uuid.uuid4().hex
        with suppress(FileNotFoundError):
            if target.stat().st_size == said["bytes"]:
                return
        try:
            for place in (target.parent, aside.parent):
                place.mkdir(parents=True, exist_ok=True)
            self.folder.fs.get_file((self.folder / name).path, str(aside))
            if file_digest(aside) != said["sha256"]:
                raise TransientError(
                    f"{self.folder / name} came with other bytes than were put there",
                    "Retry the task; if it persists, remove that folder and run again",
                )
            os.replace(aside, target)
        except FileNotFoundError as error:
            raise RetuneError(
                f"{self.folder / name} is no longer in the store", "Clear the stage that made it, or run again"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space is left for {target}", "Free some and retry the task") from error
            raise  # what the store's client says becomes a sentence where the stage is recorded
        finally:
            aside.unlink(missing_ok=True)


class Store:
    """The artifact store at a URI (by default the one of the environment)."""

    def __init__(self, uri: str | None = None):
        self.uri = uri or store_uri()
        self.root = at(self.uri)

    @property
    def is_local(self) -> bool:
        """Whether the store is on this machine's disk, and perhaps on no other's."""
        return _is_local(self.root)

    def path(self, *parts: str) -> UPath:
        """A place in the store."""
        return self.root.joinpath(*parts)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what file systems say into a sentence about the store; that a file is not there passes as it is.

        Raises:
            NoPermission, Missing: it may not be read; its bucket does not exist.
            TransientError: it did not answer.
        """
        try:
            with object_errors(f"the store {self.uri}", SETTING):
                yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except PermissionError as error:
            raise NoPermission(
                f"the store {self.uri} cannot be read ({error.strerror or error})",
                "Set RETUNE_STORE to a place that this account can read, or correct its permissions",
            ) from error
        except OSError as error:
            raise TransientError(
                f"the store {self.uri} cannot be read ({error})", "Retry the task; check the store if it persists"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what file systems say into a sentence about the store.

        Raises:
            NoPermission, Missing: the store cannot be written; its bucket does not exist.
            NoSpace, TransientError: no space is left, or the object store did not answer.
        """
        try:
            with object_errors(f"the store {self.uri}", SETTING):
                yield
        except (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError) as error:
            raise NoPermission(
                f"the store {self.uri} cannot be written ({error.strerror or error})",
                "Set RETUNE_STORE to a place that this account can write, or correct its permissions",
            ) from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise NoPermission(f"the store {self.uri} is on a read-only file system", "Set RETUNE_STORE") from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"the store {self.uri} has no space left", "Free some and retry the task") from error
            raise TransientError(
                f"the store {self.uri} did not take the files ({error})",
                "Retry the task; check the store if it persists",
            ) from error

    def probe(self) -> None:
        """Make sure that the store can be written.

        Raises:
            NoPermission, Missing, NoSpace, TransientError: see `writing`.
        """
        with self.writing():
            write_aside(self.path(".probe"), b"")

    def find(self, recipe: str, stage: str, fingerprint: str) -> Artifact | None:
        """The committed artifact, or None where there is none or a file of it is missing.

        Raises:
            NoPermission, Missing, TransientError: it cannot be told; see `reading`.
        """
        folder = self.path(recipe, stage, fingerprint)
        try:
            with self.reading():
                manifest = orjson.loads(folder.fs.cat_file((folder / MANIFEST).path))
                wanted = {name: file["bytes"] for name, file in manifest["files"].items()}
                if _is_local(folder):
                    there = {name: (folder / name).stat().st_size for name in wanted}
                else:
                    there = {name: info["size"] for name, info in sizes(folder).items()}
        except (FileNotFoundError, NotADirectoryError, orjson.JSONDecodeError, KeyError):
            return None
        whole = manifest["fingerprint"] == fingerprint and wanted.items() <= there.items()
        return Artifact(folder, manifest) if whole else None

    def commit(self, work: Path, recipe: str, stage: str, fingerprint: str, **facts: Any) -> Artifact:
        """Move a finished work folder into the store, its manifest last, and return the artifact.

        Raises:
            NoPermission, Missing, TransientError: see `writing`; the work folder is left as it is.
        """
        folder = self.path(recipe, stage, fingerprint)
        manifest = {
            "stage": stage,
            "recipe": recipe,
            "fingerprint": fingerprint,
            "made_at": now(),
            **facts,
            "packages": installed_packages(),
            "files": describe_files(work),
        }
        with self.writing():
            if _is_local(folder):
                write_aside(work / MANIFEST, to_json(manifest))
                _move(work, Path(folder.path))
            else:
                upload(work, manifest["files"], folder)
                write_aside(folder / MANIFEST, to_json(manifest))
                shutil.rmtree(work)
        return Artifact(folder, orjson.loads(to_json(manifest)))

    def record(self, recipe: str, run_id: str, name: str, content: dict[str, Any]) -> None:
        """Write one small JSON document about a run, for the report and for whoever follows the run."""
        with self.writing():
            write_aside(self.run_folder(recipe, run_id) / f"{name}.json", to_json(content))

    def documents(self, folder: UPath) -> dict[str, dict[str, Any]]:
        """The small JSON documents in a folder of the store, by name without the ending.

        Raises:
            NoPermission, Missing, TransientError: see `reading`.
        """
        with self.reading():
            contents = read_all(folder / name for name in sorted(entries(folder)) if name.endswith(".json"))
        found = {}
        for path, content in contents.items():
            with suppress(orjson.JSONDecodeError):
                found[path.name.removesuffix(".json")] = orjson.loads(content)
        return found

    def records(self, recipe: str, run_id: str) -> dict[str, dict[str, Any]]:
        """The documents about a run, by name; errors are those of `documents`."""
        return self.documents(self.run_folder(recipe, run_id))

    def run_folder(self, recipe: str, run_id: str) -> UPath:
        """Where the documents about a run are."""
        return self.path(recipe, "runs", re.sub(r"[^A-Za-z0-9_.-]", "_", run_id))


def _move(work: Path, target: Path) -> None:
    """Put a finished folder in its place in one step, also across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        os.rename(work, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(work, aside)
        shutil.rmtree(work)
    if target.exists():  # left by a run that lost a file of it
        os.rename(target, target.with_name(f".{target.name}{OLD}{uuid.uuid4().hex}"))
    os.rename(aside, target)
    for old in target.parent.glob(f".{target.name}{OLD}*"):
        shutil.rmtree(old, ignore_errors=True)
