"""The common part of the registries in a folder and on an object store: numbered versions, one of them live."""

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
    """A registry of `versions/v1`, `versions/v2` ..., one live version and a history, changed under a lock only.

    Attributes:
        where: the location, for messages.
    """

    where: str

    @abstractmethod
    def _place(self, name: str) -> str:
        """Return the location of a version, for people."""

    @abstractmethod
    def _names(self) -> list[str]:
        """Return the names of all complete versions, also of damaged ones that were live, the oldest first."""

    @abstractmethod
    def _read_manifests(self, names: list[str]) -> dict[str, bytes]:
        """Return the manifest of each version that has one, by name."""

    @abstractmethod
    def _live_name(self) -> str | None:
        """Return the name of the live version."""

    @abstractmethod
    def _once_live(self) -> set[str]:
        """Return the names of all versions that are live or were live before."""

    @abstractmethod
    def _locked(self) -> AbstractContextManager[Any]:
        """Hold the registry's lock; the value of the context is the `lease` of `_add_version` and `_set_live`."""

    @abstractmethod
    def _add_version(self, lease: Any, folder: Path) -> str:
        """Copy a folder into a new version, which becomes visible when it is complete; return its name."""

    @abstractmethod
    def _set_live(self, lease: Any, name: str, instead_of: str | None, **facts: Any) -> None:
        """Make a version live in one step, and add an entry to the history."""

    def live(self) -> Version | None:
        """See `Registry`."""
        name = self._live_name()
        return self._version(name) if name else None

    def versions(self) -> list[Version]:
        """See `Registry`; damaged versions are left out."""
        versions = []
        for name, content in self._read_manifests(self._names()).items():
            with suppress(NotFound):
                versions.append(self._version(name, content))
        return versions

    def manifests(self) -> list[dict[str, Any]]:
        """See `Registry`."""
        live = self._live_name()
        names = sorted({*self._names(), *([live] if live else [])})
        contents = self._read_manifests(names)
        return [self._parse_manifest(name, contents.get(name)) for name in names]

    def _version(self, name: str, content: bytes | None = None) -> Version:
        if content is None:
            content = self._read_manifests([name]).get(name)
        manifest = self._parse_manifest(name, content)
        return Version(name, name, self._place(name), manifest["content"], manifest.get("run"))

    def _parse_manifest(self, name: str, content: bytes | None) -> dict[str, Any]:
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
        """See `Registry`. The version becomes visible when it is complete; then it is made live, in one step."""
        content = orjson.loads((folder / MANIFEST).read_bytes())["content"]
        with self._locked() as lease:
            live, versions, once_live = self.live(), self.versions(), self._once_live()
            if live and live.content == content:
                return live
            compared = self._version(parent) if parent else None
            check_publishable(content, [v for v in versions if v.name in once_live], live, compared, self.where)
            # a version that was never live is left over from a try that was killed before `_set_live`
            leftovers = [version.name for version in versions if version.content == content]
            name = leftovers[-1] if leftovers else self._add_version(lease, folder)
            self._set_live(lease, name, live.name if live else None)
        return self._version(name)

    def promote(self, revision: str, reason: str) -> Version:
        """See `Registry`. The reason is kept in the history."""
        with self._locked() as lease:
            version, live = find_version(self.versions(), revision, self.where), None
            with suppress(NotFound):  # promoting repairs a damaged `live`
                live = self._live_name()
            if version.name != live:
                self._set_live(lease, version.name, live, reason=reason)
        return version
