"""Registries: where published adapters live. One interface, two kinds: a folder, and the Hugging Face Hub.

A version is immutable and is known by the digest of its content; the same content twice is one version. Publishing
names what was live when the candidate was judged, so that two runs cannot silently overwrite each other.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
from filelock import FileLock

from include.errors import BadRecipe, Missing, NoPermission, PermanentError
from include.settings import var
from include.sources import hub_errors
from include.store import MANIFEST, fingerprint, now

CARD = "README.md"
DESCRIBING = (CARD, MANIFEST, "training_log.jsonl", "loss.png")  # describe a version, do not decide what it does


@dataclass(frozen=True)
class Version:
    """One published adapter.

    Attributes:
        name: v1, v2, ...
        revision: what `fetch` takes: the name itself, or the Hub's commit sha.
        place: a folder or an address, for people.
        content: digest of the files that decide what the adapter does.
    """

    name: str
    revision: str
    place: str
    content: str


class Registry(Protocol):
    """What every kind of registry can do."""

    def live(self) -> Version | None:
        """What is live now."""

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """Make the folder's content a version, in one step, and make it live.

        Args:
            parent: the revision that was live when the candidate was judged, or None.

        Raises:
            PermanentError: something else has become live since.
        """

    def fetch(self, revision: str) -> Path:
        """A folder on this machine with the files of a version."""


def open_registry(uri: str) -> Registry:
    """The registry at `file:///folder` or `hf://owner/name`.

    Raises:
        BadRecipe: neither of the two.
    """
    if uri.startswith("hf://"):
        return HubRegistry(uri.removeprefix("hf://"))
    if uri.startswith("file:///"):
        return FolderRegistry(Path(uri.removeprefix("file://")))
    raise BadRecipe(f"field 'registry': {uri} is neither file:///folder nor hf://owner/name", "Correct it")


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """The digest of a version's content, from the description of its files (see `describe_files`)."""
    return fingerprint({name: file["sha256"] for name, file in files.items() if name not in DESCRIBING})


def _expect(live: Version | None, parent: str | None, where: str) -> None:
    if (live.revision if live else None) != parent:
        raise PermanentError(
            f"{live.name if live else 'nothing'} is live in {where}, not {parent or 'nothing'}, which the candidate "
            "was compared with",
            "Run again: the candidate will be compared with what is live now",
        )


class FolderRegistry:
    """A folder with `versions/v1`, `versions/v2` ... and `live`, a link to one of them; `history.jsonl` tells when."""

    def __init__(self, root: Path):
        self.root = root

    def live(self) -> Version | None:
        """What `live` points to."""
        try:
            return self._version(Path(os.readlink(self.root / "live")).name)
        except FileNotFoundError:
            return None

    def _version(self, name: str) -> Version:
        folder = self.root / "versions" / name
        try:
            manifest = orjson.loads((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise Missing(
                f"the version {name} is not in {self.root}", "Publish it again, or restore the folder"
            ) from None
        return Version(name, name, str(folder), manifest["content"])

    def _names(self) -> list[str]:
        found = [path.name for path in (self.root / "versions").glob("v*") if path.name[1:].isdigit()]
        return sorted(found, key=lambda name: int(name[1:]))

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """See `Registry`. The version appears whole, by a rename; `live` is switched afterwards, by another."""
        content = orjson.loads((folder / MANIFEST).read_bytes())["content"]
        with self._alone():
            live = self.live()
            if live and live.content == content:
                return live
            _expect(live, parent, str(self.root))
            same = [name for name in self._names() if self._version(name).content == content]
            name = same[-1] if same else self._add(folder)
            self._switch(name)
        return self._version(name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            (self.root / "versions").mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock"):
                yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise NoPermission(
                f"field 'registry': {self.root} cannot be written ({error.strerror})", "Name a folder that can be"
            ) from error

    def _add(self, folder: Path) -> str:
        names = self._names()
        name = f"v{int(names[-1][1:]) + 1 if names else 1}"
        aside = self.root / "versions" / f".{name}.{uuid.uuid4().hex}"
        shutil.copytree(folder, aside)
        for path in aside.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        os.rename(aside, self.root / "versions" / name)
        return name

    def _switch(self, name: str) -> None:
        aside = self.root / f".live.{uuid.uuid4().hex}"
        os.symlink(f"versions/{name}", aside)
        os.replace(aside, self.root / "live")
        with (self.root / "history.jsonl").open("ab") as history:
            history.write(orjson.dumps({"at": now(), "live": name}) + b"\n")

    def fetch(self, revision: str) -> Path:
        """The version's own folder."""
        return Path(self._version(revision).place)


class HubRegistry:
    """A model repository on the Hugging Face Hub; `main` is live, every version is a commit with a tag."""

    def __init__(self, repository: str):
        from huggingface_hub import HfApi

        self.repository, self.api = repository, HfApi()

    def live(self) -> Version | None:
        """The head of `main`, where a manifest of Retune's stands in it."""
        return self._at("main")

    def _at(self, revision: str) -> Version | None:
        from huggingface_hub import errors, hf_hub_download

        with hub_errors(f"the repository {self.repository}", "registry"):
            try:
                sha = str(self.api.model_info(self.repository, revision=revision).sha)
                path = hf_hub_download(self.repository, MANIFEST, revision=sha, cache_dir=var() / "cache" / "hub")
            except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
                if isinstance(error, (errors.GatedRepoError, errors.LocalEntryNotFoundError)):
                    raise
                return None
            refs = self.api.list_repo_refs(self.repository)
        names = [tag.name for tag in refs.tags if tag.target_commit == sha]
        manifest = orjson.loads(Path(path).read_bytes())
        place = f"{self.api.endpoint}/{self.repository}/tree/{sha}"
        return Version(names[0] if names else sha[:8], sha, place, manifest["content"])

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """See `Registry`. One commit, which names its parent, and a tag for it."""
        from huggingface_hub import CommitOperationAdd

        content = orjson.loads((folder / MANIFEST).read_bytes())["content"]
        live = self.live()
        if live and live.content == content:
            return live
        _expect(live, parent, self.repository)
        with hub_errors(f"the repository {self.repository}", "registry"):
            self.api.create_repo(self.repository, private=private, exist_ok=True)
            head = live.revision if live else str(self.api.model_info(self.repository).sha)
            tags = [tag.name[1:] for tag in self.api.list_repo_refs(self.repository).tags if tag.name[1:].isdigit()]
            name = f"v{max(map(int, tags), default=0) + 1}"
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            commit = self.api.create_commit(
                self.repository,
                [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
                commit_message=f"{name}: adapter published by Retune",
                parent_commit=head,
            )
            self.api.create_tag(self.repository, tag=name, revision=commit.oid, exist_ok=True)
        place = f"{self.api.endpoint}/{self.repository}/tree/{commit.oid}"
        return Version(name, commit.oid, place, content)

    def fetch(self, revision: str) -> Path:
        """A snapshot of the version in an empty cache of its own."""
        from huggingface_hub import snapshot_download

        with hub_errors(f"the repository {self.repository}", "registry"):
            return Path(
                snapshot_download(
                    self.repository, revision=revision, cache_dir=var() / "cache" / "published" / revision
                )
            )
