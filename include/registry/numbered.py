"""What a folder and an object store have in common: numbered versions, and which is live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import orjson

from include.errors import NotFound
from include.registry.interface import Version, check_publishable, find_version
from include.storage.files import MANIFEST


class NumberedRegistry(ABC):
    """What a folder and an object store have in common: `versions/v1`, `versions/v2` ..., which is live, a history.

    Attributes:
        where: the registry's place, for people.
    """

    where: str

    @abstractmethod
    def _place(self, name: str) -> str:
        """A version's place, for people."""

    @abstractmethod
    def _names(self) -> list[str]:
        """Versions that are there, and those that should be, the oldest first."""

    @abstractmethod
    def _read(self, names: list[str]) -> dict[str, bytes]:
        """The manifests of versions, where there are any."""

    @abstractmethod
    def _live_name(self) -> str | None:
        """What is live."""

    @abstractmethod
    def _once_live(self) -> set[str]:
        """What is live, or was at some time."""

    @abstractmethod
    def _alone(self) -> AbstractContextManager[Any]:
        """Nobody else changes the registry meanwhile; gives what `_add` and `_switch` want to have."""

    @abstractmethod
    def _add(self, held: Any, folder: Path) -> str:
        """Make a folder a version, which appears whole; returns its name."""

    @abstractmethod
    def _switch(self, held: Any, name: str, instead_of: str | None, **facts: Any) -> None:
        """Make a version live in one step, and write down that it is."""

    def live(self) -> Version | None:
        """See `Registry`."""
        name = self._live_name()
        return self._version(name) if name else None

    def versions(self) -> list[Version]:
        """See `Registry`; a damaged one is left out."""
        found = []
        for name, content in self._read(self._names()).items():
            with suppress(NotFound):
                found.append(self._version(name, content))
        return found

    def manifests(self) -> list[dict[str, Any]]:
        """See `Registry`."""
        live = self._live_name()
        names = sorted({*self._names(), *([live] if live else [])})
        found = self._read(names)
        return [self._manifest(name, found.get(name)) for name in names]

    def _version(self, name: str, content: bytes | None = None) -> Version:
        manifest = self._manifest(name, content if content is not None else self._read([name]).get(name))
        return Version(name, name, self._place(name), manifest["content"], manifest.get("run"))

    def _manifest(self, name: str, content: bytes | None) -> dict[str, Any]:
        try:
            manifest = orjson.loads(content or b"")
            manifest["content"]
            return manifest
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise NotFound(
                f"the version {name} is not in {self.where}, or its manifest is damaged",
                "Restore it, or make another version live with the DAG rollback",
            ) from None

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """See `Registry`. The version appears whole; what is live is switched afterwards, in one step."""
        content = orjson.loads((folder / MANIFEST).read_bytes())["content"]
        with self._alone() as held:
            live, versions, once = self.live(), self.versions(), self._once_live()
            if live and live.content == content:
                return live
            compared = self._version(parent) if parent else None
            check_publishable(content, [v for v in versions if v.name in once], live, compared, self.where)
            # one that is there and was never live is what a try left that was killed before it switched
            left = [version.name for version in versions if version.content == content]
            name = left[-1] if left else self._add(held, folder)
            self._switch(held, name, live.name if live else None)
        return self._version(name)

    def promote(self, revision: str, reason: str) -> Version:
        """See `Registry`. The reason stands in the history."""
        with self._alone() as held:
            version, live = find_version(self.versions(), revision, self.where), None
            with suppress(NotFound):  # what says so may be damaged: all the more reason
                live = self._live_name()
            if version.name != live:
                self._switch(held, version.name, live, reason=reason)
        return version
