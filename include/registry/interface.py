"""The interface of every registry, its versions, and the rules for publishing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from include.errors import Conflict, GateRefused, NotFound
from include.storage.files import MANIFEST, fingerprint

CARD = "README.md"
METADATA_FILES = (CARD, MANIFEST, "training_log.jsonl", "loss.png")  # not part of a version's content digest
VERSION = r"v[1-9]\d*"


@dataclass(frozen=True)
class Version:
    """One published adapter.

    Attributes:
        name: v1, v2, ...
        revision: the argument of `fetch`: the name itself, or the commit sha on the Hub.
        place: the folder or the address, for people.
        content: digest of the files that decide what the adapter does.
        run: the run that made it.
    """

    name: str
    revision: str
    place: str
    content: str
    run: str | None = None


class Registry(Protocol):
    """The operations of every kind of registry.

    Each method that reads or writes the registry may raise NoPermission or Unreachable.
    """

    def live(self) -> Version | None:
        """Return the live version, or None if nothing is live.

        Raises:
            NotFound: the live version is damaged.
        """

    def versions(self) -> list[Version]:
        """Return all versions that were ever published, the oldest first."""

    def manifests(self) -> list[dict[str, Any]]:
        """Return the manifests of the live version and of all versions that were ever published.

        Raises:
            NotFound: one of them is damaged.
        """

    def check(self) -> None:
        """Check whether this account may publish, as far as possible without publishing.

        Raises:
            NoPermission: it may not; the message says what to change.
        """

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """Make a folder a version and make it live, in one step. The same content twice is one version.

        Args:
            folder: the files of the version, with `manifest.json`.
            parent: revision of the version that the candidate was compared with; None if nothing was live.
            private: whether a repository that has to be created is private.

        Raises:
            Conflict: another version has gone live since the candidate was compared.
            GateRefused: the content is an older version's; only `promote` makes that live again.
        """

    def promote(self, revision: str, reason: str) -> Version:
        """Make a published version live again, whatever is live now.

        Args:
            revision: the version's name or revision.
            reason: kept in the history.

        Raises:
            NotFound: there is no such version; the message lists the versions.
        """

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """Return a folder on this machine with the files of a version.

        Args:
            into: a new folder for the download. By default files that were downloaded earlier are used.
        """

    def file_digests(self, revision: str) -> dict[str, str]:
        """Return a digest of each file of a version as the registry holds it now, without a download."""


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """Return the digest of a version's content.

    Args:
        files: see `describe_files`.
    """
    return fingerprint({name: file["sha256"] for name, file in files.items() if name not in METADATA_FILES})


def find_version(versions: list[Version], wanted: str, where: str) -> Version:
    """Return the version with a name or a revision.

    Raises:
        NotFound: there is none; the message lists the versions.
    """
    for version in versions:
        if wanted in (version.name, version.revision):
            return version
    known = ", ".join(version.name for version in versions) or "none"
    raise NotFound(f"the version {wanted} is not in {where}", f"Choose one of these: {known}")


def next_name(names: list[str]) -> str:
    """Return the name with the number after the highest one of the given names."""
    return f"v{max((int(name[1:]) for name in names), default=0) + 1}"


def sort_names(names: Iterable[str]) -> list[str]:
    """Return the names of versions, sorted by number and without duplicates; other names are left out."""
    return sorted({name for name in names if re.fullmatch(VERSION, name)}, key=lambda name: int(name[1:]))


def check_publishable(
    content: str, versions: list[Version], live: Version | None, compared: Version | None, where: str
) -> None:
    """Raise the error that forbids publishing a content, if there is one.

    Args:
        versions: all versions that were ever live.
        live: the live version, which has another content.
        compared: the version that the candidate was compared with.

    Raises:
        Conflict, GateRefused: see `Registry.publish`.
    """
    for version in versions:
        if version.content == content:
            raise GateRefused(
                f"the candidate is {version.name} of {where}, which was published before and is not live any more",
                f"Run the DAG rollback with version {version.name} to make it live again",
            )
    if (live and live.content) != (compared and compared.content):
        raise Conflict(
            f"{live.name if live else 'nothing'} is live in {where}, not {compared.name if compared else 'nothing'}, "
            "which the candidate was compared with",
            "Clear the task evaluate and the tasks after it, or run again: finished stages are reused, and the "
            "candidate is compared with the version that is live then",
        )
