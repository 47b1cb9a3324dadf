"""Registries: where published adapters live. One interface, two kinds: a folder, and the Hugging Face Hub.

A version is immutable and is known by the digest of its content; the same content twice is one version. Publishing
names what was live when the candidate was judged, so that two runs cannot silently overwrite each other. An older
version goes live again only when a person says so and why (`promote`).
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import orjson
from filelock import FileLock

from include.errors import BadRecipe, Missing, NoPermission, Overtaken, Refused
from include.hub import hub_api, hub_errors, no_permission, patient
from include.recipe import Recipe
from include.settings import var
from include.store import MANIFEST, describe_files, fingerprint, now

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
            Missing: one of them is damaged.
            NoPermission, Unreachable: the registry cannot be read, or does not answer.
        """

    def check(self) -> None:
        """Make sure, as far as can be told without writing, that this account may publish.

        Raises:
            NoPermission: it may not, and what to change.
        """

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """Make the folder's content a version, in one step, and make it live.

        Args:
            parent: the revision that was live when the candidate was judged, or None.

        Raises:
            Overtaken: something else has become live since.
            Refused: it is an older version, which only `promote` makes live again.
        """

    def promote(self, revision: str, reason: str) -> Version:
        """Make a version that was published before live again, whatever is live now.

        Args:
            revision: its name or its revision.
            reason: why, for those who read the history.

        Raises:
            Missing: there is no such version; the message lists those that there are.
        """

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """A folder on this machine with the files of a version.

        Args:
            into: a new folder for the download, so that nothing fetched earlier takes its place.
        """

    def holds(self, revision: str) -> dict[str, str]:
        """A digest of each file of a version as it is in the registry now; nothing is downloaded."""


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


def registry_uri(recipe: Recipe) -> str:
    """Where the recipe's adapters are published: as it says, or in a folder under `var/`."""
    return recipe.registry or f"file://{var() / 'registry' / recipe.name}"


def merged_uri(uri: str) -> str:
    """Where the merged model of a registry's adapter is published: a repository of its own, since vLLM takes no
    subfolder. The version made of an adapter has the adapter's `content`."""
    return f"{uri}-merged"


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """The digest of a version's content, from the description of its files (see `describe_files`)."""
    return fingerprint({name: file["sha256"] for name, file in files.items() if name not in DESCRIBING})


def choose(versions: list[Version], wanted: str, where: str) -> Version:
    """The version of a name or a revision.

    Raises:
        Missing: lists the versions that there are.
    """
    for version in versions:
        if wanted in (version.name, version.revision):
            return version
    known = ", ".join(version.name for version in versions) or "none"
    raise Missing(f"the version {wanted} is not in {where}", f"Choose one of those that are: {known}")


def _next(names: list[str]) -> str:
    return f"v{max((int(name[1:]) for name in names), default=0) + 1}"


def _may_publish(
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
            raise Refused(
                f"the candidate is {version.name} of {where}, which was published before and is not live any more",
                f"Run the DAG rollback with version {version.name} if it is to go live again",
            )
    if (live and live.content) != (compared and compared.content):
        raise Overtaken(
            f"{live.name if live else 'nothing'} is live in {where}, not {compared.name if compared else 'nothing'}, "
            "which the candidate was compared with",
            "Clear the task evaluate and what follows it, or run again: what is finished is reused, and the candidate "
            "is compared with what is live now",
        )


class FolderRegistry:
    """A folder with `versions/v1`, `versions/v2` ... and `live`, a link to one of them; `history.jsonl` tells when."""

    def __init__(self, root: Path):
        self.root = root

    def live(self) -> Version | None:
        """What `live` points to."""
        name = self._live_name()
        return self._version(name) if name else None

    def _live_name(self) -> str | None:
        try:
            return Path(os.readlink(self.root / "live")).name
        except FileNotFoundError:
            return None

    def versions(self) -> list[Version]:
        """See `Registry`; a damaged one is left out."""
        found = []
        for name in self._names():
            with suppress(Missing):
                found.append(self._version(name))
        return found

    def _names(self) -> list[str]:
        found = [path.name for path in (self.root / "versions").glob("v*") if re.fullmatch(VERSION, path.name)]
        return sorted(found, key=lambda name: int(name[1:]))

    def manifests(self) -> list[dict[str, Any]]:
        """See `Registry`."""
        try:
            there = set(os.listdir(self.root / "versions"))
        except FileNotFoundError:
            there = set()
        except OSError as error:
            raise NoPermission(
                f"field 'registry': {self.root} cannot be read ({error.strerror})", "Correct its permissions"
            ) from error
        names = {name for name in there if re.fullmatch(VERSION, name)} | ({self._live_name()} - {None})
        return [self._manifest(str(name)) for name in sorted(names, key=str)]

    def _version(self, name: str) -> Version:
        manifest = self._manifest(name)
        return Version(name, name, str(self.root / "versions" / name), manifest["content"], manifest.get("run"))

    def _manifest(self, name: str) -> dict[str, Any]:
        try:
            manifest = orjson.loads((self.root / "versions" / name / MANIFEST).read_bytes())
            manifest["content"]
            return manifest
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
            raise Missing(
                f"the version {name} is not in {self.root}, or its manifest is damaged",
                "Restore the folder, or make another version live with the DAG rollback",
            ) from None

    def check(self) -> None:
        """See `Registry`."""
        nearest = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise self._not_writable("a file is in the way" if nearest.is_file() else "Permission denied")

    def _not_writable(self, why: str | None) -> NoPermission:
        return NoPermission(f"field 'registry': {self.root} cannot be written ({why})", "Name a folder that can be")

    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """See `Registry`. The version appears whole, by a rename; `live` is switched afterwards, by another."""
        content = orjson.loads((folder / MANIFEST).read_bytes())["content"]
        with self._alone():
            live, versions, once = self.live(), self.versions(), self._once_live()
            if live and live.content == content:
                return live
            compared = self._version(parent) if parent else None
            _may_publish(content, [v for v in versions if v.name in once], live, compared, str(self.root))
            # one that is there and was never live is what a try left that was killed before it switched
            left = [version.name for version in versions if version.content == content]
            name = left[-1] if left else self._add(folder, _next(self._names()))
            self._switch(name)
        return self._version(name)

    def _once_live(self) -> set[str]:
        history = self.root / "history.jsonl"
        entries = [orjson.loads(line) for line in history.read_bytes().splitlines()] if history.exists() else []
        return {str(entry.get(key)) for entry in entries for key in ("live", "instead_of")}

    def promote(self, revision: str, reason: str) -> Version:
        """See `Registry`. The reason stands in `history.jsonl`."""
        with self._alone():
            version, live = choose(self.versions(), revision, str(self.root)), self._live_name()
            if version.name != live:
                self._switch(version.name, instead_of=live, reason=reason)
        return version

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            (self.root / "versions").mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock"):
                yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise self._not_writable(error.strerror) from error

    def _add(self, folder: Path, name: str) -> str:
        aside = self.root / "versions" / f".{name}.{uuid.uuid4().hex}"
        shutil.copytree(folder, aside)
        for path in aside.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        os.rename(aside, self.root / "versions" / name)
        return name

    def _switch(self, name: str, **facts: Any) -> None:
        aside = self.root / f".live.{uuid.uuid4().hex}"
        os.symlink(f"versions/{name}", aside)
        os.replace(aside, self.root / "live")
        with (self.root / "history.jsonl").open("ab") as history:
            history.write(orjson.dumps({"at": now(), "live": name, **facts}) + b"\n")

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """The version's own folder: nothing stands between it and its reader."""
        return Path(self._version(revision).place)

    def holds(self, revision: str) -> dict[str, str]:
        """See `Registry`."""
        return {name: file["sha256"] for name, file in describe_files(self.fetch(revision)).items()}


@dataclass(frozen=True)
class _Refs:
    """The repository's head (of `main`) and its versions' tags, the oldest first: name -> commit sha."""

    head: str
    tags: dict[str, str]


class HubRegistry:
    """A model repository on the Hugging Face Hub; `main` is live, every version is a commit with a tag.

    Every call looks at the repository anew and is repeated, after a pause, when the Hub does not answer: a commit
    whose answer was lost is then found at the head.
    """

    def __init__(self, repository: str):
        self.repository, self.api = repository, hub_api()

    def _errors(self, write: bool = False) -> Any:
        return hub_errors(f"the repository {self.repository}", "registry", write)

    @patient
    def live(self) -> Version | None:
        """The head of `main`, where a manifest of Retune's stands in it."""
        with self._errors():
            refs = self._refs()
            return self._version(refs.head, refs) if refs else None

    @patient
    def versions(self) -> list[Version]:
        """See `Registry`."""
        with self._errors():
            refs = self._refs()
            return self._versions(refs) if refs else []

    @patient
    def manifests(self) -> list[dict[str, Any]]:
        """See `Registry`; a commit that is none of Retune's has no manifest."""
        with self._errors():
            refs = self._refs()
            found = [self._manifest(sha) for sha in (refs.head, *refs.tags.values())] if refs else []
        return [manifest for manifest in found if manifest]

    def _versions(self, refs: _Refs) -> list[Version]:
        found = [self._version(sha, refs) for sha in refs.tags.values()]
        return [version for version in found if version]

    def _refs(self) -> _Refs | None:
        """None where there is no such repository."""
        from huggingface_hub import errors, get_token

        try:
            refs = self.api.list_repo_refs(self.repository)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            if not get_token():  # to strangers, what is private is not there
                raise
            return None
        head = next(branch.target_commit for branch in refs.branches if branch.name == "main")
        tags = {tag.name: tag.target_commit for tag in refs.tags if re.fullmatch(VERSION, tag.name)}
        return _Refs(head, dict(sorted(tags.items(), key=lambda tag: int(tag[0][1:]))))

    def _manifest(self, sha: str) -> dict[str, Any] | None:
        """Retune's manifest in a commit; fetched once."""
        from huggingface_hub import errors

        try:
            path = self.api.hf_hub_download(self.repository, MANIFEST, revision=sha, cache_dir=var() / "cache" / "hub")
            manifest = orjson.loads(Path(path).read_bytes())
        except (errors.RemoteEntryNotFoundError, orjson.JSONDecodeError):
            return None
        return manifest if isinstance(manifest, dict) and "content" in manifest else None

    def _version(self, sha: str, refs: _Refs) -> Version | None:
        """What a commit holds; its name is that of the tagged version with the same content."""
        manifest = self._manifest(sha)
        if manifest is None:
            return None
        content = manifest["content"]
        names = (
            name
            for name, target in reversed(refs.tags.items())
            if target == sha or (self._manifest(target) or {}).get("content") == content
        )
        place = f"{self.api.endpoint}/{self.repository}/tree/{sha}"
        return Version(next(names, sha[:8]), sha, place, content, manifest.get("run"))

    @patient
    def check(self) -> None:
        """See `Registry`."""
        from huggingface_hub import errors, get_token

        refused = no_permission(f"the repository {self.repository}", "registry", write=True)
        if not get_token():
            raise refused
        with self._errors(write=True):
            try:
                self.api.auth_check(self.repository, write=True)
            except errors.RepositoryNotFoundError:  # it will be created
                me = self.api.whoami()
                role = me.get("auth", {}).get("accessToken", {}).get("role")
                places = {me["name"], *(group["name"] for group in me.get("orgs", ()))}
                if role == "read" or self.repository.split("/")[0] not in places:
                    raise refused from None

    @patient
    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """See `Registry`. One commit, which names its parent, and a tag for it."""
        from huggingface_hub import CommitOperationAdd, get_token

        if not get_token():
            raise no_permission(f"the repository {self.repository}", "registry", write=True)
        manifest = orjson.loads((folder / MANIFEST).read_bytes())
        with self._errors(write=True):
            refs = self._refs()
            if refs is None:
                self.api.create_repo(self.repository, private=private, exist_ok=True)
                refs = self._existing()
            live, refs = self._tagged(refs)
            if live and live.content == manifest["content"]:
                return live
            compared = self._version(parent, refs) if parent else None
            _may_publish(manifest["content"], self._versions(refs), live, compared, self.repository)
            name = _next(list(refs.tags))
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            commit = self.api.create_commit(
                self.repository,
                [*(CommitOperationAdd(*file) for file in sorted(files.items())), *self._gone(refs.head, set(files))],
                commit_message=f"{name}: adapter published by Retune",
                parent_commit=refs.head,
            )
            self.api.create_tag(self.repository, tag=name, revision=commit.oid)
        place = f"{self.api.endpoint}/{self.repository}/tree/{commit.oid}"
        return Version(name, commit.oid, place, manifest["content"], manifest.get("run"))

    def _existing(self) -> _Refs:
        refs = self._refs()
        if refs is None:
            raise Missing(f"field 'registry': the repository {self.repository} is not on the Hub", "Create it")
        return refs

    def _tagged(self, refs: _Refs) -> tuple[Version | None, _Refs]:
        """What is live, with a tag for it where a try was killed before it set one."""
        live = self._version(refs.head, refs)
        if live is None or live.name in refs.tags:
            return live, refs
        name = _next(list(refs.tags))
        self.api.create_tag(self.repository, tag=name, revision=refs.head)
        return replace(live, name=name), _Refs(refs.head, {**refs.tags, name: refs.head})

    def _gone(self, head: str, files: set[str]) -> list[Any]:
        """What to delete: files of the version at the head that the next one does not have; a person's own stay."""
        from huggingface_hub import CommitOperationDelete

        described = set((self._manifest(head) or {}).get("files", ())) - files
        return [CommitOperationDelete(name, is_folder=False) for name in sorted(described & set(self._files(head)))]

    @patient
    def promote(self, revision: str, reason: str) -> Version:
        """See `Registry`. One commit on top of what is live, with that version's files; the reason is its message."""
        from huggingface_hub import CommitOperationCopy

        with self._errors(write=True):
            live, refs = self._tagged(self._existing())
            version = choose(self._versions(refs), revision, self.repository)
            if live and live.content == version.content:
                return live
            described = {*(self._manifest(version.revision) or {})["files"], CARD, MANIFEST}
            wanted, there = self._files(version.revision), self._files(refs.head)
            files = described & set(wanted)
            changed = sorted(name for name in files if there.get(name) != wanted[name])
            copies = [CommitOperationCopy(name, name, src_revision=version.revision) for name in changed]
            why = " ".join(reason.split())
            commit = self.api.create_commit(
                self.repository,
                [*copies, *self._gone(refs.head, files)],
                commit_message=f"{version.name} is live again: {why}"[:120],
                commit_description=f"Instead of {live.name if live else 'nothing'}. {reason}",
                parent_commit=refs.head,
            )
        place = f"{self.api.endpoint}/{self.repository}/tree/{commit.oid}"
        return replace(version, revision=commit.oid, place=place)

    @patient
    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """A snapshot of the version."""
        cache = into or var() / "cache" / "published" / revision
        with self._errors():
            return Path(self.api.snapshot_download(self.repository, revision=revision, cache_dir=cache))

    @patient
    def holds(self, revision: str) -> dict[str, str]:
        """See `Registry`."""
        with self._errors():
            return self._files(revision)

    def _files(self, revision: str) -> dict[str, str]:
        """Each file's sha256 where it is in large-file storage, else its git object id."""
        tree = self.api.list_repo_tree(self.repository, recursive=True, revision=revision)
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if hasattr(file, "blob_id")}
