"""The artifact store: the output of each stage in a folder of its own, committed by a manifest that is written last.

`<store>/<recipe>/<stage>/<fingerprint>/manifest.json`. A folder with a valid manifest is complete and is never written
to again: on a disk it is read-only, and a stage that opens it compares it with the manifest. A folder without one is
ignored. `<store>/<recipe>/runs/<run>/` holds small JSON documents about a run. The
store is a URI that fsspec can open. Tasks share nothing else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from upath import UPath

from include.errors import Damaged, NoPermission, NoSpace, RetuneError, TransientError
from include.paths import store_uri, var
from include.storage.files import (
    DAMAGED,
    MANIFEST,
    atomic_write,
    changed_file,
    describe_files,
    file_digest,
    fingerprint,
    installed_packages,
    move_folder,
    now,
    seal,
    to_json,
)
from include.storage.locations import is_local, open_path
from include.storage.object_store import list_dir, list_files, log, object_errors, read_all, upload

INCOMING = ".incoming"  # sub-folder for unfinished downloads, so that a listing of the folder shows whole files only
PARALLEL_FETCHES = 8  # files
STORE_SETTING = "RETUNE_STORE"
RUNS = "runs"


@dataclass(frozen=True)
class Artifact:
    """One committed folder of the store."""

    folder: UPath
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Return the name of the folder: the digest of everything that decides the content."""
        return self.manifest["fingerprint"]

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the stage's results as plain JSON values."""
        return self.manifest["metadata"]

    def local(self, *names: str, into: Path | None = None) -> Path:
        """Return the folder on this machine's disk, with the named files in it.

        If the store is not on this disk, missing files are downloaded, several at once, and compared with the manifest.
        Tasks of one machine may download the same files at once.

        Args:
            names: files, or folders for everything below them; none: everything.
            into: a folder of the caller. By default a folder in `var/cache`, which maintenance removes when it has not
                been used for long.

        Raises:
            Damaged: see `check`.
            RetuneError: a file is no longer in the store.
            NoSpace: the disk is full.
            TransientError: a downloaded file differs from the manifest.
            OSError: the store or the disk failed.
        """
        if is_local(self.folder):
            self.check(*names)
            return Path(self.folder.path)
        # an artifact that was made again at the same location has other files and so another folder
        target = into or var() / "cache" / "store" / fingerprint([str(self.folder), self.manifest["files"]])
        wanted = self._named(names)
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            for _ in pool.map(lambda name: self._fetch(name, target), wanted):
                pass
        if into is None:
            if not (target / MANIFEST).exists():
                atomic_write(target / MANIFEST, to_json(self.manifest))
            with suppress(FileNotFoundError):
                os.utime(target / MANIFEST)  # maintenance reads the time of the last use
        return target

    def files(self, name: str, into: Path | None = None) -> list[Path]:
        """Return the files that the manifest names below a folder, on this machine's disk, sorted by name.

        What else lies in the folder is not among them. See `local` for the arguments and errors.
        """
        folder = self.local(name, into=into)
        return [folder / file for file in sorted(self._named([name]))]

    def check(self, *names: str) -> None:
        """Compare files of a local store with the manifest: by size and time, by digest if the time differs.

        Args:
            names: see `local`.

        Raises:
            Damaged: a file is missing or has changed. The artifact has been moved aside, so that it is made again.
        """
        at = self.manifest.get("made_at")
        if not is_local(self.folder) or at is None:  # without the time it is a stage's folder before its commit
            return
        folder, files = Path(self.folder.path), {name: self.manifest["files"][name] for name in self._named(names)}
        problem = changed_file(folder, files, at)
        if problem is None or not folder.exists():
            return
        kept = folder.with_name(f".{folder.name}{DAMAGED}{uuid.uuid4().hex[:8]}")
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(folder, kept)
        stage = self.manifest.get("stage", folder.parent.name)
        raise Damaged(
            f"the output of {stage} in {folder} is damaged: {problem}; it is now in {kept.name}",
            f"Clear the task {stage}, or run again: it is made again",
        )

    def _named(self, names: Iterable[str]) -> list[str]:
        single, below = set(names), tuple(f"{name}/" for name in names)
        return [name for name in self.manifest["files"] if not single or name in single or name.startswith(below)]

    def _fetch(self, name: str, folder: Path) -> None:
        expected, target = self.manifest["files"][name], folder / name
        tmp_path = folder / INCOMING / uuid.uuid4().hex
        at = self.manifest.get("made_at")
        if changed_file(folder, {name: expected}, at) is None:
            return
        try:
            for parent in (target.parent, tmp_path.parent):
                parent.mkdir(parents=True, exist_ok=True)
            self.folder.fs.get_file((self.folder / name).path, str(tmp_path))
            if file_digest(tmp_path) != expected["sha256"]:
                raise TransientError(
                    f"the downloaded {self.folder / name} has another sha256 than its manifest says",
                    "Retry the task; if the error persists, remove that folder and run again",
                )
            if at is not None:
                os.utime(tmp_path, (seconds := datetime.fromisoformat(at).timestamp(), seconds))
            tmp_path.chmod(0o444)
            os.replace(tmp_path, target)
        except FileNotFoundError as error:
            raise RetuneError(
                f"{self.folder / name} is no longer in the store", "Clear the stage that made it, or run again"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space is left for {target}", "Free some and retry the task") from error
            raise  # `recorded` translates the errors of the store's client
        finally:
            tmp_path.unlink(missing_ok=True)


class Store:
    """The artifact store at a URI (by default the one of the environment)."""

    def __init__(self, uri: str | None = None):
        self.uri = uri or store_uri()
        self.root = open_path(self.uri)

    @property
    def is_local(self) -> bool:
        """Return whether the store is on this machine's disk, which other machines may not share."""
        return is_local(self.root)

    def path(self, *parts: str) -> UPath:
        """Return a path below the root of the store."""
        return self.root.joinpath(*parts)

    @contextmanager
    def read_errors(self) -> Iterator[None]:
        """Translate errors of reading into errors about the store. The error about a missing file passes unchanged.

        Raises:
            NoPermission, NotFound: the store cannot be read; its bucket does not exist.
            TransientError: the store did not answer.
        """
        try:
            with object_errors(f"the store {self.uri}", STORE_SETTING):
                yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except PermissionError as error:
            raise NoPermission(
                f"the store {self.uri} cannot be read ({error.strerror or error})",
                "Set RETUNE_STORE to a location that this account can read, or correct its permissions",
            ) from error
        except OSError as error:
            raise TransientError(
                f"the store {self.uri} cannot be read ({error})",
                "Retry the task; check the store if the error persists",
            ) from error

    @contextmanager
    def write_errors(self) -> Iterator[None]:
        """Translate errors of writing into errors about the store.

        Raises:
            NoPermission, NotFound: the store cannot be written; its bucket does not exist.
            NoSpace, TransientError: no space is left, or the object store did not answer.
        """
        try:
            with object_errors(f"the store {self.uri}", STORE_SETTING):
                yield
        except (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError) as error:
            raise NoPermission(
                f"the store {self.uri} cannot be written ({error.strerror or error})",
                "Set RETUNE_STORE to a location that this account can write, or correct its permissions",
            ) from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise NoPermission(f"the store {self.uri} is on a read-only file system", "Set RETUNE_STORE") from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"the store {self.uri} has no space left", "Free some and retry the task") from error
            raise TransientError(
                f"the store {self.uri} cannot be written ({error})",
                "Retry the task; check the store if the error persists",
            ) from error

    def check_writable(self) -> None:
        """Write an empty file, to make sure that this account may write to the store.

        Raises:
            NoPermission, NotFound, NoSpace, TransientError: see `write_errors`.
        """
        with self.write_errors():
            atomic_write(self.path(".probe"), b"")

    def find(self, recipe: str, stage: str, fingerprint: str) -> Artifact | None:
        """Return the committed artifact, or None if there is none or it is damaged; see `open`.

        Raises:
            NoPermission, NotFound, TransientError: see `read_errors`.
        """
        try:
            return self.open(recipe, stage, fingerprint)
        except Damaged as error:
            log.warning("%s", error)
            return None

    def open(self, recipe: str, stage: str, fingerprint: str) -> Artifact | None:
        """Return the committed artifact, or None if there is none.

        Files of a local store are compared with the manifest (see `Artifact.check`); of files elsewhere, the sizes.
        Their digests are compared when they are fetched.

        Raises:
            Damaged: a file of a local store is missing or has changed.
            NoPermission, NotFound, TransientError: see `read_errors`.
        """
        folder = self.path(recipe, stage, fingerprint)
        try:
            with self.read_errors():
                manifest = orjson.loads(folder.fs.cat_file((folder / MANIFEST).path))
                expected = {name: file["bytes"] for name, file in manifest["files"].items()}
                artifact, complete = Artifact(folder, manifest), manifest["fingerprint"] == fingerprint
                if is_local(folder):
                    artifact.check()
                else:
                    complete &= expected.items() <= {(name, info["size"]) for name, info in list_files(folder).items()}
        except (FileNotFoundError, NotADirectoryError, orjson.JSONDecodeError, KeyError):
            return None
        return artifact if complete else None

    def commit(self, work: Path, recipe: str, stage: str, fingerprint: str, **facts: Any) -> Artifact:
        """Move a finished work folder into the store, its manifest last, and return the artifact.

        Args:
            facts: further entries of the manifest: `summary`, `metadata`, `inputs` ...

        Raises:
            NoPermission, NotFound, TransientError: see `write_errors`; the work folder is not lost.
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
        with self.write_errors():
            if is_local(folder):
                atomic_write(work / MANIFEST, to_json(manifest))
                move_folder(work, Path(folder.path))
                seal(Path(folder.path), manifest["files"], manifest["made_at"])
            else:
                upload(work, manifest["files"], folder)
                atomic_write(folder / MANIFEST, to_json(manifest))
                shutil.rmtree(work)
        return Artifact(folder, orjson.loads(to_json(manifest)))

    def run_folder(self, recipe: str, run_id: str) -> UPath:
        """Return the folder of the documents about a run."""
        return self.path(recipe, RUNS, re.sub(r"[^A-Za-z0-9_.-]", "_", run_id))

    def write_record(self, recipe: str, run_id: str, name: str, content: dict[str, Any]) -> None:
        """Write one small JSON document about a run, for the report and for programs that follow the run.

        Raises:
            NoPermission, NotFound, NoSpace, TransientError: see `write_errors`.
        """
        with self.write_errors():
            atomic_write(self.run_folder(recipe, run_id) / f"{name}.json", to_json(content))

    def read_records(self, recipe: str, run_id: str) -> dict[str, dict[str, Any]]:
        """Return the documents about a run, by name; see `read_documents` for the errors."""
        return self.read_documents(self.run_folder(recipe, run_id))

    def read_documents(self, folder: UPath) -> dict[str, dict[str, Any]]:
        """Return the small JSON documents in a folder of the store, by file name without the suffix.

        Raises:
            NoPermission, NotFound, TransientError: see `read_errors`.
        """
        with self.read_errors():
            contents = read_all(folder / name for name in sorted(list_dir(folder)) if name.endswith(".json"))
        documents = {}
        for path, content in contents.items():
            with suppress(orjson.JSONDecodeError):
                documents[path.name.removesuffix(".json")] = orjson.loads(content)
        return documents
