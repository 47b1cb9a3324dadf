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
from include.storage.lock import Lease, lock
from include.storage.object_store import (
    download,
    etag,
    list_dir,
    list_files,
    object_errors,
    open_path,
    read_all,
    upload,
)


class ObjectRegistry(NumberedRegistry):
    """A place on an object store: `versions/v1/` ..., each with `manifest.json` written last; `live.json`, which says
    what is live; and `history/`, an object for each time that it changed. Who changes it has a claim in `claims/`.

    `live.json` is what counts. It holds its own entry of the history, so that a try that was killed after it was
    written has lost nothing: who comes next writes the entry.

    Args:
        lapse: seconds after which a claim that is not renewed has lost its owner.
    """

    def __init__(self, uri: str, lapse: float = 60.0):
        self.where, self.root, self._lapse = uri, open_path(uri), lapse
        self._history = self.root / "history"

    def _errors(self) -> AbstractContextManager[None]:
        return object_errors(f"the registry {self.where}", "field 'registry' or RETUNE_REGISTRY")

    def _folder(self, name: str) -> UPath:
        return self.root / "versions" / name

    def _place(self, name: str) -> str:
        return str(self._folder(name))

    def _there(self) -> dict[str, bool]:
        """The folders of versions, and whether each is whole: one without a manifest is what a killed try left."""
        with self._errors():
            files = [name.split("/") for name in list_files(self.root / "versions")]
        whole = {parts[0] for parts in files if parts[1:] == [MANIFEST]}
        return {name: name in whole for name in sort_names(parts[0] for parts in files)}

    def _names(self) -> list[str]:
        return sort_names([*(name for name, whole in self._there().items() if whole), *self._once_live()])

    def _read(self, names: list[str]) -> dict[str, bytes]:
        with self._errors():
            found = read_all(self._folder(name) / MANIFEST for name in names)
        return {path.parent.name: content for path, content in found.items()}

    def _live(self) -> dict[str, Any] | None:
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
        entry = self._live()
        return entry["live"] if entry else None

    def _entries(self) -> dict[str, str]:
        """The history's objects, whose names tell what was live: the number and the version."""
        with self._errors():
            return dict(name.removesuffix(".json").split("-") for name in list_dir(self._history) if "-" in name)

    def _once_live(self) -> set[str]:
        found = set(self._entries().values())
        with suppress(NotFound):
            if live := self._live_name():
                found.add(live)
        return found

    def check(self) -> None:
        """See `Registry`. Only writing tells who may write; what is written is removed at once."""
        with self._errors():
            probe = self.root / ".probe"
            probe.fs.pipe_file(probe.path, b"")
            probe.fs.rm_file(probe.path)

    @contextmanager
    def _alone(self) -> Iterator[Lease]:
        with self._errors(), lock(self.root / "claims", self._lapse) as claim:
            with suppress(NotFound):  # damaged: what to do is said to whoever wants to know what is live
                if entry := self._live():
                    self._note(claim, entry)
            yield claim

    def _note(self, claim: Lease, entry: dict[str, Any]) -> None:
        """Write an entry of the history, unless it is there."""
        number = f"{entry['entry']:06}"
        if number not in self._entries():
            claim.write(self._history / f"{number}-{entry['live']}.json", to_json(entry))

    def _add(self, held: Lease, folder: Path) -> str:
        there = self._there()
        # the number of a half is not taken again: an owner of it that is not dead but late may go on writing there
        name = next_name([*there, *self._once_live()])
        for half in (name for name, whole in there.items() if not whole):
            remove(self._folder(half))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        upload(folder, (file for file in files if file != MANIFEST), self._folder(name))
        held.write(self._folder(name) / MANIFEST, (folder / MANIFEST).read_bytes())
        return name

    def _switch(self, held: Lease, name: str, instead_of: str | None, **facts: Any) -> None:
        number = max(map(int, self._entries()), default=0) + 1
        entry = {"entry": number, "at": now(), "live": name, "instead_of": instead_of, **facts}
        held.write(self.root / "live.json", to_json(entry))
        self._note(held, entry)

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """A copy of the version; fetched once into `var/cache`."""
        version = self._version(revision)
        target = (into or var() / "cache" / "published") / fingerprint([self._place(revision), version.content])
        if not (target / MANIFEST).exists():
            aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            with self._errors():
                download(self._folder(version.name), list_files(self._folder(version.name)), aside)
            try:
                os.rename(aside, target)
            except OSError:  # another task of this machine was faster
                shutil.rmtree(aside)
        os.utime(target / MANIFEST)  # its last use, for `tasks.maintain`
        return target

    def file_digests(self, revision: str) -> dict[str, str]:
        """See `Registry`; the digests are the store's own."""
        with self._errors():
            return {name: etag(info) or str(info) for name, info in list_files(self._folder(revision)).items()}
