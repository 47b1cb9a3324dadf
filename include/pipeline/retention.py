"""Retention: how long runs and artifacts are kept, and which ones are kept because they are published or in use.

An artifact expires `keep_days` (a field of the recipe) after its last use: when it was made, or when the newest run
that used it started the stage. These artifacts never expire:

- the inputs, direct or indirect, of the live version and of every published version,
- the artifacts of active runs, and their inputs. A run is active until it ends, or until none of its records has
  changed for the sum of `keep_days`, `approve_within_hours` and the longest timeout of a stage.

A run expires `keep_days` after its last record, unless it is active, published a version, or is the newest run. An
incomplete folder (a leftover of a killed task, or checkpoints of an unfinished training) expires `keep_days` after its
last change, if no run is active.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from upath import UPath

from include.errors import RetuneError
from include.pipeline.outcomes import FOLDER as OUTCOMES
from include.recipe import Recipe
from include.registry import merged_uri, open_registry, registry_uri
from include.storage.artifacts import RUNS, Store
from include.storage.cleanup import LONG_AGO, folder_size, last_modified
from include.storage.files import MANIFEST, OLD
from include.storage.object_store import list_dir, read_all


class PublishedUnknown(Exception):
    """It is not known which versions are published, so nothing may be removed."""


@dataclass(frozen=True)
class Expired:
    """A folder that may be removed.

    Attributes:
        kind: artifact, leftover or run.
        size: bytes.
    """

    folder: UPath
    kind: str
    size: int


@dataclass(frozen=True)
class Run:
    """A run as its records describe it.

    Attributes:
        last_change: the newest time in its records.
        used: the time of use of each artifact that it made or reused, by fingerprint.
        active: whether it may still continue: it has not ended and has changed lately.
    """

    folder: UPath
    last_change: datetime
    used: dict[str, datetime]
    active: bool


def oldest_kept(recipe: Recipe) -> datetime:
    """Return the time `keep_days` before now."""
    return datetime.now(UTC) - timedelta(days=recipe.keep_days)


def folders(parent: UPath) -> list[UPath]:
    """Return the sub-folders of a folder, sorted by name."""
    return [parent / name for name, is_folder in sorted(list_dir(parent).items()) if is_folder]


def read_runs(store: Store, recipe: Recipe, longest_try: timedelta) -> list[Run]:
    """Return the recipe's runs, the newest last.

    Args:
        longest_try: the longest time that one try of a stage of the recipe can take.
    """
    given_up = timedelta(days=recipe.keep_days, hours=recipe.approve_within_hours) + longest_try
    runs = []
    for folder in folders(store.path(recipe.name, RUNS)):
        records = store.read_records(recipe.name, folder.name)
        summary = records.pop("run", None)
        starts = [_parse_time(record["started_at"]) for record in records.values() if "started_at" in record]
        ended = _parse_time(summary.get("finished_at")) if summary else None
        last_change = max([*starts, *([ended] if ended else [])], default=None) or last_modified(folder)
        # tasks may have been cleared after the run ended; its end is recorded in whole seconds
        unfinished = ended is None or max(starts, default=ended) > ended + timedelta(seconds=1)
        used: dict[str, datetime] = {}
        for name, record in records.items():
            # the record of a sweep's candidate is called `train.<fingerprint of the candidate's pinned recipe>`
            for fingerprint in filter(None, (record.get("fingerprint"), name.partition(".")[2])):
                used[fingerprint] = max(_parse_time(record.get("started_at")), used.get(fingerprint, LONG_AGO))
        active = unfinished and last_change > datetime.now(UTC) - given_up
        runs.append(Run(folder, last_change, used, active))
    return sorted(runs, key=lambda run: run.last_change)


def _parse_time(text: Any) -> datetime:
    """Return a recorded time, or the current time if it cannot be read, so that nothing expires because of it."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return datetime.now(UTC)


class Retention:
    """Decides which folders in a recipe's part of the store have expired.

    Args:
        longest_try: see `read_runs`.

    Attributes:
        kept: number of artifacts that are kept, by reason (published, in use); filled by `expired`.
    """

    def __init__(self, store: Store, recipe: Recipe, longest_try: timedelta):
        self.kept: Counter[str] = Counter()
        self._store, self._recipe, self._oldest = store, recipe, oldest_kept(recipe)
        self._artifacts: dict[UPath, dict[str, Any]] = {}
        self._incomplete: list[UPath] = []
        for stage in folders(store.path(recipe.name)):
            if stage.name not in (RUNS, OUTCOMES):
                found = folders(stage)
                contents = read_all(folder / MANIFEST for folder in found)
                for folder in found:
                    if manifest := _parse_manifest(folder, contents.get(folder / MANIFEST)):
                        self._artifacts[folder] = manifest
                    else:
                        self._incomplete.append(folder)
        # read after the artifacts, so that a run that has just begun to use one of them is seen
        self._runs = read_runs(store, recipe, longest_try)

    def expired(self) -> Iterator[Expired]:
        """Yield each expired folder: artifacts, then incomplete folders, then runs.

        Raises:
            PublishedUnknown: the registry cannot be read, or is empty although runs have published.
        """
        published = self._published_manifests()
        yield from self._expired_artifacts(published)
        yield from self._expired_incomplete()
        yield from self._expired_runs(published)

    def _expired_artifacts(self, published: list[dict[str, Any]]) -> Iterator[Expired]:
        published_inputs = self._with_inputs(
            fingerprint
            for manifest in published
            # the demo's base model is an artifact, too
            for fingerprint in (*manifest.get("fingerprints", {}).values(), manifest.get("base", {}).get("revision"))
        )
        in_use = self._with_inputs(fingerprint for run in self._runs if run.active for fingerprint in run.used)
        for folder, manifest in self._artifacts.items():
            fingerprint = manifest["fingerprint"]
            if fingerprint in published_inputs:
                self.kept["published"] += 1
            elif fingerprint in in_use or self._last_use(manifest) > self._oldest:
                self.kept["in use"] += 1
            else:
                yield Expired(folder, "artifact", sum(file["bytes"] for file in manifest["files"].values()))

    def _expired_incomplete(self) -> Iterator[Expired]:
        any_active = any(run.active for run in self._runs)
        for folder in self._incomplete:
            if OLD in folder.name or (not any_active and last_modified(folder) < self._oldest):
                yield Expired(folder, "leftover", folder_size(folder))

    def _expired_runs(self, published: list[dict[str, Any]]) -> Iterator[Expired]:
        publishing = {self._store.run_folder(self._recipe.name, str(made.get("run"))).name for made in published}
        for run in self._runs[:-1]:
            if not run.active and run.last_change < self._oldest and run.folder.name not in publishing:
                yield Expired(run.folder, "run", folder_size(run.folder))

    def _published_manifests(self) -> list[dict[str, Any]]:
        uri = registry_uri(self._recipe.name, self._recipe.registry)
        manifests = []
        try:
            for each in (uri, merged_uri(uri)) if self._recipe.merged_16bit else (uri,):
                manifests += open_registry(each).manifests()
        except RetuneError as error:
            raise PublishedUnknown(
                f"the registry cannot be read, so it is not known what is published: {error}"
            ) from error
        if not manifests and self._has_published():
            raise PublishedUnknown(f"runs have published, but there is no version in {uri}; was the registry moved?")
        return manifests

    def _has_published(self) -> bool:
        outcomes = self._store.read_documents(self._store.path(self._recipe.name, OUTCOMES)).values()
        return any(outcome["verdict"] == "published" for outcome in outcomes)

    def _with_inputs(self, fingerprints: Iterable[str]) -> set[str]:
        """Return fingerprints together with those of all direct and indirect inputs of their artifacts."""
        inputs = {manifest["fingerprint"]: manifest["inputs"].values() for manifest in self._artifacts.values()}
        result: set[str] = set()
        todo = list(fingerprints)
        while todo:
            fingerprint = todo.pop()
            if fingerprint not in result:
                result.add(fingerprint)
                todo += inputs.get(fingerprint, ())
        return result

    def _last_use(self, manifest: dict[str, Any]) -> datetime:
        fingerprint = manifest["fingerprint"]
        uses = [run.used[fingerprint] for run in self._runs if fingerprint in run.used]
        return max([_parse_time(manifest["made_at"]), *uses])


def _parse_manifest(folder: UPath, content: bytes | None) -> dict[str, Any] | None:
    """Return the manifest of an artifact, or None if the folder is not an artifact."""
    if folder.name.startswith("."):
        return None
    try:
        manifest = orjson.loads(content or b"")
        return manifest if manifest["fingerprint"] == folder.name else None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
