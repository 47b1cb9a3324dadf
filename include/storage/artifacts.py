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
from pathlib import Path
from typing import Any

import orjson
from upath import UPath

from include.errors import NoPermission, NoSpace, RetuneError, TransientError
from include.paths import store_uri, var
from include.storage.files import (
    MANIFEST,
    OLD,
    atomic_write,
    describe_files,
    file_digest,
    installed_packages,
    now,
    to_json,
)
from include.storage.object_store import is_local as is_local
from include.storage.object_store import list_dir, list_files, object_errors, open_path, read_all, upload

INCOMING = ".incoming"  # in a folder: files on their way in, apart from what is read by listing a folder
FETCHED_AT_ONCE = 8  # files, from a store that is elsewhere
SETTING = "RETUNE_STORE"


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
    def metadata(self) -> dict[str, Any]:
        """What the stage found out, as plain JSON values."""
        return self.manifest["metadata"]

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
        if is_local(self.folder):
            return Path(self.folder.path)
        # what was made again at the same place has other files and so another folder
        training_inputs = hashlib.sha256(str(self.folder).encode() + orjson.dumps(self.manifest["files"])).hexdigest()[
            :16
        ]
        target = into or var() / "cache" / "store" / training_inputs
        single, below = set(names), tuple(f"{name}/" for name in names)
        wanted = [name for name in self.manifest["files"] if not names or name in single or name.startswith(below)]
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            for _ in pool.map(lambda name: self._fetch(name, target), wanted):
                pass
        if into is None:
            if not (target / MANIFEST).exists():
                atomic_write(target / MANIFEST, to_json(self.manifest))
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
        self.root = open_path(self.uri)

    @property
    def is_local(self) -> bool:
        """Whether the store is on this machine's disk, and perhaps on no other's."""
        return is_local(self.root)

    def path(self, *parts: str) -> UPath:
        """A place in the store."""
        return self.root.joinpath(*parts)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what file systems say into a sentence about the store; that a file is not there passes as it is.

        Raises:
            NoPermission, NotFound: it may not be read; its bucket does not exist.
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
            NoPermission, NotFound: the store cannot be written; its bucket does not exist.
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
            NoPermission, NotFound, NoSpace, TransientError: see `writing`.
        """
        with self.writing():
            atomic_write(self.path(".probe"), b"")

    def find(self, recipe: str, stage: str, fingerprint: str) -> Artifact | None:
        """The committed artifact, or None where there is none or a file of it is missing.

        Raises:
            NoPermission, NotFound, TransientError: it cannot be told; see `reading`.
        """
        folder = self.path(recipe, stage, fingerprint)
        try:
            with self.reading():
                manifest = orjson.loads(folder.fs.cat_file((folder / MANIFEST).path))
                wanted = {name: file["bytes"] for name, file in manifest["files"].items()}
                if is_local(folder):
                    there = {name: (folder / name).stat().st_size for name in wanted}
                else:
                    there = {name: info["size"] for name, info in list_files(folder).items()}
        except (FileNotFoundError, NotADirectoryError, orjson.JSONDecodeError, KeyError):
            return None
        whole = manifest["fingerprint"] == fingerprint and wanted.items() <= there.items()
        return Artifact(folder, manifest) if whole else None

    def commit(self, work: Path, recipe: str, stage: str, fingerprint: str, **facts: Any) -> Artifact:
        """Move a finished work folder into the store, its manifest last, and return the artifact.

        Raises:
            NoPermission, NotFound, TransientError: see `writing`; the work folder is left as it is.
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
            if is_local(folder):
                atomic_write(work / MANIFEST, to_json(manifest))
                _move(work, Path(folder.path))
            else:
                upload(work, manifest["files"], folder)
                atomic_write(folder / MANIFEST, to_json(manifest))
                shutil.rmtree(work)
        return Artifact(folder, orjson.loads(to_json(manifest)))

    def record(self, recipe: str, run_id: str, name: str, content: dict[str, Any]) -> None:
        """Write one small JSON document about a run, for the report and for whoever follows the run."""
        with self.writing():
            atomic_write(self.run_folder(recipe, run_id) / f"{name}.json", to_json(content))

    def documents(self, folder: UPath) -> dict[str, dict[str, Any]]:
        """The small JSON documents in a folder of the store, by name without the ending.

        Raises:
            NoPermission, NotFound, TransientError: see `reading`.
        """
        with self.reading():
            contents = read_all(folder / name for name in sorted(list_dir(folder)) if name.endswith(".json"))
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
