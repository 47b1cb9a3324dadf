"""Registries: where published adapters live. One interface: a folder, an object store, the Hugging Face Hub.

A version is immutable and is known by the digest of its content; the same content twice is one version. Publishing
names what was live when the candidate was judged, so that two runs cannot silently overwrite each other. An older
version goes live again only when a person says so and why (`promote`).
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import orjson
from filelock import FileLock
from upath import UPath

from include.errors import BadRecipe, Missing, NoPermission, Overtaken, Refused
from include.hub import hub_api, hub_errors, no_permission, patient
from include.objects import SCHEMES, Claim, alone, at, download, entries, object_errors, read_all, sizes, tag, upload
from include.recipe import Recipe
from include.settings import registry_root, var
from include.store import MANIFEST, describe_files, fingerprint, now, remove, to_json

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
        """Make sure, as far as can be told without a trace, that this account may publish.

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
    """The registry at `file:///folder`, `s3://bucket/path` (or another object store's address) or `hf://owner/name`.

    Raises:
        BadRecipe: none of these.
    """
    scheme, _, place = uri.partition("://")
    if scheme == "hf" and re.fullmatch(r"[^/]+/[^/]+", place):
        return HubRegistry(place)
    if scheme == "file" and place.startswith("/"):
        return FolderRegistry(Path(place))
    if scheme in SCHEMES and re.fullmatch(r"[^/]+/.+", place):
        return ObjectRegistry(uri)
    raise BadRecipe(
        f"field 'registry': {uri} is neither file:///folder, {'://bucket/path, '.join(SCHEMES)}://bucket/path nor "
        "hf://owner/name",
        "Correct it in the recipe, or RETUNE_REGISTRY where the recipe names none",
    )


def registry_uri(recipe: Recipe) -> str:
    """Where the recipe's adapters are published: as it says, or in a folder under `RETUNE_REGISTRY`."""
    return recipe.registry or f"{registry_root()}/{recipe.name}"


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


class _Numbered(ABC):
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
            with suppress(Missing):
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
            raise Missing(
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
            _may_publish(content, [v for v in versions if v.name in once], live, compared, self.where)
            # one that is there and was never live is what a try left that was killed before it switched
            left = [version.name for version in versions if version.content == content]
            name = left[-1] if left else self._add(held, folder)
            self._switch(held, name, live.name if live else None)
        return self._version(name)

    def promote(self, revision: str, reason: str) -> Version:
        """See `Registry`. The reason stands in the history."""
        with self._alone() as held:
            version, live = choose(self.versions(), revision, self.where), None
            with suppress(Missing):  # what says so may be damaged: all the more reason
                live = self._live_name()
            if version.name != live:
                self._switch(held, version.name, live, reason=reason)
        return version


class FolderRegistry(_Numbered):
    """A folder with `versions/v1`, `versions/v2` ... and `live`, a link to one of them; `history.jsonl` tells when."""

    def __init__(self, root: Path):
        self.root, self.where = root, str(root)

    def _place(self, name: str) -> str:
        return str(self.root / "versions" / name)

    def _names(self) -> list[str]:
        try:
            there = os.listdir(self.root / "versions")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise NoPermission(
                f"field 'registry': {self.root} cannot be read ({error.strerror})", "Correct its permissions"
            ) from error
        return _sorted(there)

    def _read(self, names: list[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with suppress(OSError):
                found[name] = (self.root / "versions" / name / MANIFEST).read_bytes()
        return found

    def _live_name(self) -> str | None:
        try:
            return Path(os.readlink(self.root / "live")).name
        except FileNotFoundError:
            return None

    def check(self) -> None:
        """See `Registry`."""
        nearest = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise self._not_writable("a file is in the way" if nearest.is_file() else "Permission denied")

    def _not_writable(self, why: str | None) -> NoPermission:
        return NoPermission(f"field 'registry': {self.root} cannot be written ({why})", "Name a folder that can be")

    def _once_live(self) -> set[str]:
        history = self.root / "history.jsonl"
        entries = [orjson.loads(line) for line in history.read_bytes().splitlines()] if history.exists() else []
        return {str(entry.get(key)) for entry in entries for key in ("live", "instead_of")}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            (self.root / "versions").mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock"):
                yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise self._not_writable(error.strerror) from error

    def _add(self, held: None, folder: Path) -> str:
        name = _next(self._names())
        aside = self.root / "versions" / f".{name}.{uuid.uuid4().hex}"
        shutil.copytree(folder, aside)
        for path in aside.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        os.rename(aside, self.root / "versions" / name)
        return name

    def _switch(self, held: None, name: str, instead_of: str | None, **facts: Any) -> None:
        aside = self.root / f".live.{uuid.uuid4().hex}"
        os.symlink(f"versions/{name}", aside)
        os.replace(aside, self.root / "live")
        with (self.root / "history.jsonl").open("ab") as history:
            history.write(orjson.dumps({"at": now(), "live": name, "instead_of": instead_of, **facts}) + b"\n")

    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """The version's own folder: nothing stands between it and its reader."""
        return Path(self._version(revision).place)

    def holds(self, revision: str) -> dict[str, str]:
        """See `Registry`."""
        return {name: file["sha256"] for name, file in describe_files(self.fetch(revision)).items()}


class ObjectRegistry(_Numbered):
    """A place on an object store: `versions/v1/` ..., each with `manifest.json` written last; `live.json`, which says
    what is live; and `history/`, an object for each time that it changed. Who changes it has a claim in `claims/`.

    `live.json` is what counts. It holds its own entry of the history, so that a try that was killed after it was
    written has lost nothing: who comes next writes the entry.

    Args:
        lapse: seconds after which a claim that is not renewed has lost its owner.
    """

    def __init__(self, uri: str, lapse: float = 60.0):
        self.where, self.root, self._lapse = uri, at(uri), lapse
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
            files = [name.split("/") for name in sizes(self.root / "versions")]
        whole = {parts[0] for parts in files if parts[1:] == [MANIFEST]}
        return {name: name in whole for name in _sorted(parts[0] for parts in files)}

    def _names(self) -> list[str]:
        return _sorted([*(name for name, whole in self._there().items() if whole), *self._once_live()])

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
            raise Missing(f"{path} is damaged", "Make a version live with the DAG rollback") from None

    def _live_name(self) -> str | None:
        entry = self._live()
        return entry["live"] if entry else None

    def _entries(self) -> dict[str, str]:
        """The history's objects, whose names tell what was live: the number and the version."""
        with self._errors():
            return dict(name.removesuffix(".json").split("-") for name in entries(self._history) if "-" in name)

    def _once_live(self) -> set[str]:
        found = set(self._entries().values())
        with suppress(Missing):
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
    def _alone(self) -> Iterator[Claim]:
        with self._errors(), alone(self.root / "claims", self._lapse) as claim:
            with suppress(Missing):  # damaged: what to do is said to whoever wants to know what is live
                if entry := self._live():
                    self._note(claim, entry)
            yield claim

    def _note(self, claim: Claim, entry: dict[str, Any]) -> None:
        """Write an entry of the history, unless it is there."""
        number = f"{entry['entry']:06}"
        if number not in self._entries():
            claim.write(self._history / f"{number}-{entry['live']}.json", to_json(entry))

    def _add(self, held: Claim, folder: Path) -> str:
        there = self._there()
        # the number of a half is not taken again: an owner of it that is not dead but late may go on writing there
        name = _next([*there, *self._once_live()])
        for half in (name for name, whole in there.items() if not whole):
            remove(self._folder(half))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        upload(folder, (file for file in files if file != MANIFEST), self._folder(name))
        held.write(self._folder(name) / MANIFEST, (folder / MANIFEST).read_bytes())
        return name

    def _switch(self, held: Claim, name: str, instead_of: str | None, **facts: Any) -> None:
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
                download(self._folder(version.name), sizes(self._folder(version.name)), aside)
            try:
                os.rename(aside, target)
            except OSError:  # another task of this machine was faster
                shutil.rmtree(aside)
        os.utime(target / MANIFEST)  # its last use, for `tasks.maintain`
        return target

    def holds(self, revision: str) -> dict[str, str]:
        """See `Registry`; the digests are the store's own."""
        with self._errors():
            return {name: tag(info) or str(info) for name, info in sizes(self._folder(revision)).items()}


def _sorted(names: Iterable[str]) -> list[str]:
    """Names of versions by their number; other names are left out."""
    return sorted({name for name in names if re.fullmatch(VERSION, name)}, key=lambda name: int(name[1:]))


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
