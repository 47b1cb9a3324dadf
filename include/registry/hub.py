"""A registry on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from include.errors import NotFound
from include.paths import var
from include.registry.interface import CARD, VERSION, Version, check_publishable, find_version, next_name
from include.storage.files import MANIFEST
from include.storage.hub import hub_api, hub_errors, no_permission, retry_on_unreachable


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

    @retry_on_unreachable
    def live(self) -> Version | None:
        """The head of `main`, where a manifest of Retune's stands in it."""
        with self._errors():
            refs = self._refs()
            return self._version(refs.head, refs) if refs else None

    @retry_on_unreachable
    def versions(self) -> list[Version]:
        """See `Registry`."""
        with self._errors():
            refs = self._refs()
            return self._versions(refs) if refs else []

    @retry_on_unreachable
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
        tags = {etag.name: etag.target_commit for etag in refs.tags if re.fullmatch(VERSION, etag.name)}
        return _Refs(head, dict(sorted(tags.items(), key=lambda etag: int(etag[0][1:]))))

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

    @retry_on_unreachable
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

    @retry_on_unreachable
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
            check_publishable(manifest["content"], self._versions(refs), live, compared, self.repository)
            name = next_name(list(refs.tags))
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
            raise NotFound(f"field 'registry': the repository {self.repository} is not on the Hub", "Create it")
        return refs

    def _tagged(self, refs: _Refs) -> tuple[Version | None, _Refs]:
        """What is live, with a tag for it where a try was killed before it set one."""
        live = self._version(refs.head, refs)
        if live is None or live.name in refs.tags:
            return live, refs
        name = next_name(list(refs.tags))
        self.api.create_tag(self.repository, tag=name, revision=refs.head)
        return replace(live, name=name), _Refs(refs.head, {**refs.tags, name: refs.head})

    def _gone(self, head: str, files: set[str]) -> list[Any]:
        """What to delete: files of the version at the head that the next one does not have; a person's own stay."""
        from huggingface_hub import CommitOperationDelete

        described = set((self._manifest(head) or {}).get("files", ())) - files
        return [CommitOperationDelete(name, is_folder=False) for name in sorted(described & set(self._files(head)))]

    @retry_on_unreachable
    def promote(self, revision: str, reason: str) -> Version:
        """See `Registry`. One commit on top of what is live, with that version's files; the reason is its message."""
        from huggingface_hub import CommitOperationCopy

        with self._errors(write=True):
            live, refs = self._tagged(self._existing())
            version = find_version(self._versions(refs), revision, self.repository)
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

    @retry_on_unreachable
    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """A snapshot of the version."""
        cache = into or var() / "cache" / "published" / revision
        with self._errors():
            return Path(self.api.snapshot_download(self.repository, revision=revision, cache_dir=cache))

    @retry_on_unreachable
    def file_digests(self, revision: str) -> dict[str, str]:
        """See `Registry`."""
        with self._errors():
            return self._files(revision)

    def _files(self, revision: str) -> dict[str, str]:
        """Each file's sha256 where it is in large-file storage, else its git object id."""
        tree = self.api.list_repo_tree(self.repository, recursive=True, revision=revision)
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if hasattr(file, "blob_id")}
