"""A registry on an object store."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
from upath import UPath

from include.errors import NotFound
from include.paths import var
from include.registry.interface import next_name, sort_names
from include.registry.numbered import NumberedRegistry
from include.storage.files import MANIFEST, fingerprint, now, remove, to_json
from include.storage.locations import open_path
from include.storage.lock import Lease, lock
from include.storage.object_store import download, etag, list_dir, list_files, object_errors, read_all, upload


class ObjectRegistry(NumberedRegistry):
    """A location on an object store.

    `versions/v1/` ... each have a `manifest.json` that is written last. `live.json` names the live version. `history/`
    has one object per change. The lock's leases are in `leases/`.

    `live.json` contains its own entry of the history. If a try is killed between `live.json` and its entry in
    `history/`, the next process that takes the lock writes the entry.

    Args:
        ttl: seconds after which the lease of a dead process expires (see `lock`).
    """

    def __init__(self, uri: str, ttl: float = 60.0):
        self.where, self.root, self._ttl = uri, open_path(uri), ttl
        self._history = self.root / "history"

    def _errors(self) -> AbstractContextManager[None]:
        return object_errors(f"the registry {self.where}", "field 'registry' or RETUNE_REGISTRY")

    def _folder(self, name: str) -> UPath:
        return self.root / "versions" / name

    def _place(self, name: str) -> str:
        return str(self._folder(name))

    def _version_folders(self) -> dict[str, bool]:
        """Return the name of each version's folder, and whether it is complete. A folder without a manifest is left
        over from a try that was killed."""
        with self._errors():
            files = [name.split("/") for name in list_files(self.root / "versions")]
        complete = {parts[0] for parts in files if parts[1:] == [MANIFEST]}
        return {name: name in complete for name in sort_names(parts[0] for parts in files)}

    def _names(self) -> list[str]:
        complete = (name for name, is_complete in self._version_folders().items() if is_complete)
        return sort_names([*complete, *self._once_live()])

    def _read_manifests(self, names: list[str]) -> dict[str, bytes]:
        with self._errors():
            contents = read_all(self._folder(name) / MANIFEST for name in names)
        return {path.parent.name: content for path, content in contents.items()}

    def _live_entry(self) -> dict[str, Any] | None:
        path = self.root / "live.json"
        with self._errors():
            content = read_all([path]).get(path)
        if content is None:
            return None
        try:
            entry = orjson.loads(content)
            return {**entry, "live": str(entry["live"]), "entry": int(entry["entry"])}
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            raise NotFound(f"{path} is damaged", "Make a version live with the DAG rollback") from None

    def _live_name(self) -> str | None:
        entry = self._live_entry()
        return entry["live"] if entry else None

    def _history_entries(self) -> dict[str, str]:
        """Return number and live version of each entry, from the objects' names: `000001-v1.json`."""
        with self._errors():
            return dict(name.removesuffix(".json").split("-") for name in list_dir(self._history) if "-" in name)

    def _once_live(self) -> set[str]:
        names = set(self._history_entries().values())
        with suppress(NotFound):
            if live := self._live_name():
                names.add(live)
        return names

    def check(self) -> None:
        """See `Registry`. Writes an empty object and removes it, because only a write shows who may write."""
        with self._errors():
            path = self.root / ".probe"
            path.fs.pipe_file(path.path, b"")
            path.fs.rm_file(path.path)

    @contextmanager
    def _locked(self) -> Iterator[Lease]:
        with self._errors(), lock(self.root / "leases", self._ttl) as lease:
            with suppress(NotFound):  # a damaged `live.json` is reported by `live`, and repaired by `promote`
                if entry := self._live_entry():
                    self._add_history(lease, entry)
            yield lease

    def _add_history(self, lease: Lease, entry: dict[str, Any]) -> None:
        """Write an entry of the history, unless the history has it."""
        number = f"{entry['entry']:06}"
        if number not in self._history_entries():
            lease.write(self._history / f"{number}-{entry['live']}.json", to_json(entry))

    def _add_version(self, lease: Lease, folder: Path) -> str:
        folders = self._version_folders()
        # the number of an incomplete folder is not used again: its writer may be slow, not dead, and go on writing
        name = next_name([*folders, *self._once_live()])
        for incomplete in (name for name, is_complete in folders.items() if not is_complete):
            remove(self._folder(incomplete))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        upload(folder, (file for file in files if file != MANIFEST), self._folder(name))
        lease.write(self._folder(name) / MANIFEST, (folder / MANIFEST).read_bytes())
        return name

    def _set_live(self, lease: Lease, name: str, instead_of: str | None, **facts: Any) -> None:
        number = max(map(int, self._history_entries()), default=0) + 1
        entry = {"entry": number, "at": now(), "live": name, "instead_of": instead_of, **facts}
        lease.write(self.root / "live.json", to_json(entry))
        self._add_history(lease, entry)

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """See `Registry`. A version is downloaded once into `var/cache`."""
        version = self._version(revision)
        target = (into or var() / "cache" / "published") / fingerprint([self._place(revision), version.content])
        if not (target / MANIFEST).exists():
            tmp_path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            with self._errors():
                download(self._folder(version.name), list_files(self._folder(version.name)), tmp_path)
            try:
                os.rename(tmp_path, target)
            except OSError:  # another task of this machine was faster
                shutil.rmtree(tmp_path)
        os.utime(target / MANIFEST)  # maintenance reads the time of the last use
        return target

    def file_digests(self, revision: str) -> dict[str, str]:
        """See `Registry`; the digests are the ETags of the store."""
        with self._errors():
            return {name: etag(info) or str(info) for name, info in list_files(self._folder(revision)).items()}
