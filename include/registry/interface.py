"""What every registry can do, and what a version is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from include.errors import Conflict, GateRefused, NotFound
from include.storage.files import MANIFEST, fingerprint

CARD = "README.md"
DESCRIBING = (CARD, MANIFEST, "training_log.jsonl", "loss.png")  # describe a version, do not decide what it does
VERSION = r"v[1-9]\d*"


@dataclass(frozen=True)
class Version:
    """One published adapter.

    Attributes:
        name: v1, v2, ...
        revision: what `fetch` takes: the name itself, or the Hub's commit sha.
        place: a folder or an address, for people.
        content: digest of the files that decide what the adapter does.
        run: the run that made it.
    """

    name: str
    revision: str
    place: str
    content: str
    run: str | None = None


class Registry(Protocol):
    """What every kind of registry can do."""

    def live(self) -> Version | None:
        """What is live now."""

    def versions(self) -> list[Version]:
        """Everything that was ever published, the oldest first."""

    def manifests(self) -> list[dict[str, Any]]:
        """The manifest of what is live and of everything that was ever published.

        Raises:
            NotFound: one of them is damaged.
            NoPermission, Unreachable: the registry cannot be read, or does not answer.
        """

    def check(self) -> None:
        """Make sure, as far as can be told without a trace, that this account may publish.

        Raises:
            NoPermission: it may not, and what to change.
        """

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """Make the folder's content a version, in one step, and make it live.

        Args:
            parent: the revision that was live when the candidate was judged, or None.

        Raises:
            Conflict: something else has become live since.
            GateRefused: it is an older version, which only `promote` makes live again.
        """

    def promote(self, revision: str, reason: str) -> Version:
        """Make a version that was published before live again, whatever is live now.

        Args:
            revision: its name or its revision.
            reason: why, for those who read the history.

        Raises:
            NotFound: there is no such version; the message lists those that there are.
        """

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """A folder on this machine with the files of a version.

        Args:
            into: a new folder for the download, so that nothing fetched earlier takes its place.
        """

    def file_digests(self, revision: str) -> dict[str, str]:
        """A digest of each file of a version as it is in the registry now; nothing is downloaded."""


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """The digest of a version's content, from the description of its files (see `describe_files`)."""
    return fingerprint({name: file["sha256"] for name, file in files.items() if name not in DESCRIBING})


def find_version(versions: list[Version], wanted: str, where: str) -> Version:
    """The version of a name or a revision.

    Raises:
        NotFound: lists the versions that there are.
    """
    for version in versions:
        if wanted in (version.name, version.revision):
            return version
    known = ", ".join(version.name for version in versions) or "none"
    raise NotFound(f"the version {wanted} is not in {where}", f"Choose one of those that are: {known}")


def next_name(names: list[str]) -> str:
    return f"v{max((int(name[1:]) for name in names), default=0) + 1}"


def check_publishable(
    content: str, versions: list[Version], live: Version | None, compared: Version | None, where: str
) -> None:
    """Raises what `Registry.publish` raises.

    Args:
        versions: those that were ever live.
        live: what is live now; not the candidate itself.
        compared: what was live when the candidate was judged.
    """
    for version in versions:
        if version.content == content:
            raise GateRefused(
                f"the candidate is {version.name} of {where}, which was published before and is not live any more",
                f"Run the DAG rollback with version {version.name} if it is to go live again",
            )
    if (live and live.content) != (compared and compared.content):
        raise Conflict(
            f"{live.name if live else 'nothing'} is live in {where}, not {compared.name if compared else 'nothing'}, "
            "which the candidate was compared with",
            "Clear the task evaluate and what follows it, or run again: what is finished is reused, and the candidate "
            "is compared with what is live now",
        )


def sort_names(names: Iterable[str]) -> list[str]:
    """Names of versions by their number; other names are left out."""
    return sorted({name for name in names if re.fullmatch(VERSION, name)}, key=lambda name: int(name[1:]))
