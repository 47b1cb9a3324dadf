"""A registry on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from include.errors import NotFound
from include.paths import var
from include.registry.interface import CARD, Version, check_publishable, find_version, next_name, sort_names
from include.storage.files import MANIFEST
from include.storage.hub import hub_api, hub_errors, no_permission, retry_on_unreachable


@dataclass(frozen=True)
class _Refs:
    """The repository's branch `main` and its versions.

    Attributes:
        head: commit sha of `main`.
        tags: commit sha by version name, the oldest version first.
    """

    head: str
    tags: dict[str, str]


class HubRegistry:
    """A model repository on the Hugging Face Hub. Each version is a commit with a tag, and `main` is live.

    Each call reads the repository anew. If the Hub does not answer, the call is repeated after a pause; a commit whose
    answer was lost is then found as the head of `main`.
    """

    def __init__(self, repository: str):
        self.repository, self.api = repository, hub_api()

    def _errors(self, write: bool = False) -> Any:
        return hub_errors(f"the repository {self.repository}", "registry", write)

    @retry_on_unreachable
    def live(self) -> Version | None:
        """See `Registry`: the head of `main`, if it contains a manifest of Retune."""
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
        """See `Registry`. Commits of other programs have no manifest and are left out."""
        with self._errors():
            refs = self._refs()
            manifests = [self._manifest(sha) for sha in (refs.head, *refs.tags.values())] if refs else []
        return [manifest for manifest in manifests if manifest]

    def _versions(self, refs: _Refs) -> list[Version]:
        versions = [self._version(sha, refs) for sha in refs.tags.values()]
        return [version for version in versions if version]

    def _refs(self) -> _Refs | None:
        """Return the current refs, or None if there is no such repository."""
        from huggingface_hub import errors, get_token

        try:
            refs = self.api.list_repo_refs(self.repository)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            if not get_token():  # without a token a private repository looks as if it did not exist
                raise
            return None
        head = next(branch.target_commit for branch in refs.branches if branch.name == "main")
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        return _Refs(head, {name: tags[name] for name in sort_names(tags)})

    def _manifest(self, sha: str) -> dict[str, Any] | None:
        """Return the manifest of Retune in a commit, or None; each one is downloaded once."""
        from huggingface_hub import errors

        try:
            path = self.api.hf_hub_download(self.repository, MANIFEST, revision=sha, cache_dir=var() / "cache" / "hub")
            manifest = orjson.loads(Path(path).read_bytes())
        except (errors.RemoteEntryNotFoundError, orjson.JSONDecodeError):
            return None
        return manifest if isinstance(manifest, dict) and "content" in manifest else None

    def _version(self, sha: str, refs: _Refs) -> Version | None:
        """Return the version in a commit, or None. Its name is the tag of the version with the same content."""
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
            except errors.RepositoryNotFoundError:  # `publish` will create it
                account = self.api.whoami()
                role = account.get("auth", {}).get("accessToken", {}).get("role")
                namespaces = {account["name"], *(group["name"] for group in account.get("orgs", ()))}
                if role == "read" or self.repository.split("/")[0] not in namespaces:
                    raise refused from None

    @retry_on_unreachable
    def publish(self, folder: Path, parent: str | None, private: bool) -> Version:
        """See `Registry`. Makes one commit with a named parent commit, and a tag for it."""
        from huggingface_hub import CommitOperationAdd, get_token

        if not get_token():
            raise no_permission(f"the repository {self.repository}", "registry", write=True)
        manifest = orjson.loads((folder / MANIFEST).read_bytes())
        with self._errors(write=True):
            refs = self._refs()
            if refs is None:
                self.api.create_repo(self.repository, private=private, exist_ok=True)
                refs = self._require_refs()
            live, refs = self._ensure_tag(refs)
            if live and live.content == manifest["content"]:
                return live
            compared = self._version(parent, refs) if parent else None
            check_publishable(manifest["content"], self._versions(refs), live, compared, self.repository)
            name = next_name(list(refs.tags))
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            commit = self.api.create_commit(
                self.repository,
                [
                    *(CommitOperationAdd(*file) for file in sorted(files.items())),
                    *self._deletions(refs.head, set(files)),
                ],
                commit_message=f"{name}: adapter published by Retune",
                parent_commit=refs.head,
            )
            self.api.create_tag(self.repository, tag=name, revision=commit.oid)
        place = f"{self.api.endpoint}/{self.repository}/tree/{commit.oid}"
        return Version(name, commit.oid, place, manifest["content"], manifest.get("run"))

    def _require_refs(self) -> _Refs:
        refs = self._refs()
        if refs is None:
            raise NotFound(f"field 'registry': the repository {self.repository} is not on the Hub", "Create it")
        return refs

    def _ensure_tag(self, refs: _Refs) -> tuple[Version | None, _Refs]:
        """Return the live version, and the refs with a tag for it, which a try that was killed may not have set."""
        live = self._version(refs.head, refs)
        if live is None or live.name in refs.tags:
            return live, refs
        name = next_name(list(refs.tags))
        self.api.create_tag(self.repository, tag=name, revision=refs.head)
        return replace(live, name=name), _Refs(refs.head, {**refs.tags, name: refs.head})

    def _deletions(self, head: str, files: set[str]) -> list[Any]:
        """Return the deletions of files of the head's version that the next version does not have. Files that people
        added are kept."""
        from huggingface_hub import CommitOperationDelete

        described = set((self._manifest(head) or {}).get("files", ())) - files
        return [CommitOperationDelete(name, is_folder=False) for name in sorted(described & set(self._files(head)))]

    @retry_on_unreachable
    def promote(self, revision: str, reason: str) -> Version:
        """See `Registry`. Makes one commit on top of `main` with the files of that version and the reason."""
        from huggingface_hub import CommitOperationCopy

        with self._errors(write=True):
            live, refs = self._ensure_tag(self._require_refs())
            version = find_version(self._versions(refs), revision, self.repository)
            if live and live.content == version.content:
                return live
            described = {*(self._manifest(version.revision) or {})["files"], CARD, MANIFEST}
            wanted, current = self._files(version.revision), self._files(refs.head)
            files = described & set(wanted)
            changed = sorted(name for name in files if current.get(name) != wanted[name])
            copies = [CommitOperationCopy(name, name, src_revision=version.revision) for name in changed]
            one_line = " ".join(reason.split())
            commit = self.api.create_commit(
                self.repository,
                [*copies, *self._deletions(refs.head, files)],
                commit_message=f"{version.name} is live again: {one_line}"[:120],
                commit_description=f"Instead of {live.name if live else 'nothing'}. {reason}",
                parent_commit=refs.head,
            )
        place = f"{self.api.endpoint}/{self.repository}/tree/{commit.oid}"
        return replace(version, revision=commit.oid, place=place)

    @retry_on_unreachable
    def fetch(self, revision: str, into: Path | None = None) -> Path:
        """See `Registry`: a snapshot of the commit."""
        cache = into or var() / "cache" / "published" / revision
        with self._errors():
            return Path(self.api.snapshot_download(self.repository, revision=revision, cache_dir=cache))

    @retry_on_unreachable
    def file_digests(self, revision: str) -> dict[str, str]:
        """See `Registry`."""
        with self._errors():
            return self._files(revision)

    def _files(self, revision: str) -> dict[str, str]:
        """Return the sha256 of each file in large-file storage, and the git object id of the other files."""
        tree = self.api.list_repo_tree(self.repository, recursive=True, revision=revision)
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if hasattr(file, "blob_id")}
