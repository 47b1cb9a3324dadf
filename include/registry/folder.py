"""A registry in a folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from include.errors import NoPermission
from include.registry.interface import next_name, sort_names
from include.registry.numbered import NumberedRegistry
from include.storage.files import MANIFEST, describe_files, now


class FolderRegistry(NumberedRegistry):
    """A folder with `versions/v1`, `versions/v2` ..., `live` (a link to one of them) and `history.jsonl`."""

    def __init__(self, root: Path):
        self.root, self.where = root, str(root)

    def _place(self, name: str) -> str:
        return str(self.root / "versions" / name)

    def _names(self) -> list[str]:
        try:
            names = os.listdir(self.root / "versions")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise NoPermission(
                f"field 'registry': {self.root} cannot be read ({error.strerror})", "Correct its permissions"
            ) from error
        return sort_names(names)

    def _read_manifests(self, names: list[str]) -> dict[str, bytes]:
        contents = {}
        for name in names:
            with suppress(OSError):
                contents[name] = (self.root / "versions" / name / MANIFEST).read_bytes()
        return contents

    def _live_name(self) -> str | None:
        try:
            return Path(os.readlink(self.root / "live")).name
        except FileNotFoundError:
            return None

    def check(self) -> None:
        """See `Registry`."""
        nearest = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise self._not_writable(f"{nearest} is a file" if nearest.is_file() else "Permission denied")

    def _not_writable(self, reason: str | None) -> NoPermission:
        return NoPermission(f"field 'registry': {self.root} cannot be written ({reason})", "Name another folder")

    def _once_live(self) -> set[str]:
        history = self.root / "history.jsonl"
        entries = [orjson.loads(line) for line in history.read_bytes().splitlines()] if history.exists() else []
        return {str(entry.get(key)) for entry in entries for key in ("live", "instead_of")}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            (self.root / "versions").mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock"):
                yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise self._not_writable(error.strerror) from error

    def _add_version(self, lease: None, folder: Path) -> str:
        name = next_name(self._names())
        tmp_path = self.root / "versions" / f".{name}.{uuid.uuid4().hex}"
        shutil.copytree(folder, tmp_path)
        for path in tmp_path.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        os.rename(tmp_path, self.root / "versions" / name)
        return name

    def _set_live(self, lease: None, name: str, instead_of: str | None, **facts: Any) -> None:
        tmp_path = self.root / f".live.{uuid.uuid4().hex}"
        os.symlink(f"versions/{name}", tmp_path)
        os.replace(tmp_path, self.root / "live")
        with (self.root / "history.jsonl").open("ab") as history:
            history.write(orjson.dumps({"at": now(), "live": name, "instead_of": instead_of, **facts}) + b"\n")

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """Return the version's own folder; nothing is copied."""
        return Path(self._version(revision).place)

    def file_digests(self, revision: str) -> dict[str, str]:
        """See `Registry`; the digests are sha256."""
        return {name: file["sha256"] for name, file in describe_files(self.fetch(revision)).items()}
