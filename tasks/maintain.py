"""maintain: removes what no run has used for longer than its recipe keeps it; never what is live, published or in use.

The store is one for all machines; each machine has a disk of its own, with unfinished work and caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout
from jinja2.filters import do_filesizeformat
from upath import UPath

from include.errors import RetuneError
from include.paths import recipe_files, var
from include.pipeline.outcomes import FOLDER as OUTCOMES
from include.pipeline.records import log
from include.recipe import Recipe, find_recipe, load_recipe
from include.registry import merged_uri, open_registry, registry_uri
from include.storage.artifacts import Store
from include.storage.files import MANIFEST, OLD, remove
from include.storage.object_store import list_dir, read_all
from tasks.stages import longest_try

RUNS = "runs"
HUB_CACHES = ("hub", "huggingface/hub")  # laid out by huggingface_hub; the latter is what `datasets` has fetched
CACHES = ("store", "published", "datasets")  # one folder for each artifact, version, revision
LONG_AGO = datetime.min.replace(tzinfo=UTC)
HEADLESS_LOGS = "*-????????-??????.log"


def maintain_store(recipe: str = "", dry_run: bool = False) -> list[str]:
    """Remove artifacts, checkpoints and runs from the store that their recipe keeps no longer (`keep_days`).

    An artifact was last used when it was made, or by the newest run that names it. What the registry's versions were
    made of stays, and so does what an unfinished run has made, unless the run is given up: silent for `keep_days`
    longer than its longest stage can take. Where a registry cannot be read, nothing of its recipe is removed.

    Args:
        recipe: its name; empty for all.
        dry_run: only say what would be removed.

    Returns:
        A line for each recipe.

    Raises:
        NotFound: there is no such recipe.
        NoPermission, TransientError: the store cannot be written, or does not answer.
    """
    store = Store()
    lines = []
    with store.writing():
        for kept in _recipes(store.root, recipe):
            try:
                lines.append(_Retention(store, kept, dry_run).apply())
            except _Unsure as why:
                lines.append(f"removed nothing of {kept.name}: {why}")
            log.info("%s", lines[-1])
    return lines


def maintain_disk(recipe: str = "", dry_run: bool = False) -> list[str]:
    """Remove from this machine's disk unfinished work that its recipe keeps no longer, and, for all recipes together,
    caches and logs that have not been used for the longest time that any recipe keeps.

    Work that a process has locked stays, and so does that of a recipe with an unfinished run.

    Args:
        recipe: its name; empty for all, and for caches and logs.
        dry_run: only say what would be removed.

    Returns:
        A line for each recipe, and one for caches and logs.

    Raises:
        NotFound: there is no such recipe.
    """
    store = Store()
    lines = []
    for kept in _recipes(UPath(var() / "work"), recipe):
        lines.append(_remove_work(store, kept, dry_run))
        log.info("%s", lines[-1])
    if not recipe:
        lines.append(_remove_caches(dry_run))
        log.info("%s", lines[-1])
    return lines


class _Unsure(Exception):
    """It cannot be told what is published."""


def _recipes(root: UPath, only: str) -> Iterator[Recipe]:
    """The recipes that have a folder below a root. One without a recipe that can be read is named and left alone."""
    if only:
        find_recipe(only)
    files = {file.stem: file for file in recipe_files()}
    for folder in _folders(root):
        if only and folder.name != only:
            continue
        if folder.name not in files:
            log.warning("left alone: %s, there is no recipe of that name", folder)
            continue
        try:
            yield load_recipe(files[folder.name])
        except RetuneError as error:
            log.warning("left alone: %s, its recipe cannot be read: %s", folder, error)


def _folders(place: UPath) -> list[UPath]:
    return [place / name for name, is_folder in sorted(list_dir(place).items()) if is_folder]


def _time(text: Any) -> datetime:
    """A time that was written down; now where it cannot be read, so that nothing is removed for it."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return datetime.now(UTC)


@dataclass
class _Removal:
    """Removes, or only says what it would remove, and counts."""

    of: str
    dry_run: bool
    counts: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    def take(self, folder: UPath | Path, kind: str, size: int) -> None:
        log.info("%s %s, %s", "would remove" if self.dry_run else "removing", folder, do_filesizeformat(size))
        self.counts[kind] += 1
        self.bytes += size
        if not self.dry_run:
            remove(folder)

    def line(self, *always: str) -> str:
        kinds = dict.fromkeys([*always, *self.counts])
        parts = [f"{self.counts[kind]} {kind}{'' if self.counts[kind] == 1 else 's'}" for kind in kinds]
        what = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
        verb = "would remove" if self.dry_run else "removed"
        return f"{verb} {what} of {self.of}, {do_filesizeformat(self.bytes)}"


@dataclass
class _Run:
    """A run as its records tell it.

    Attributes:
        last: the newest time that stands in them.
        marks: fingerprints of the artifacts that it made or reused, and when.
        alive: it has not come to its end, and may still.
    """

    folder: UPath
    last: datetime
    marks: dict[str, datetime]
    alive: bool


def _runs(store: Store, recipe: Recipe) -> list[_Run]:
    """The recipe's runs, the newest last."""
    given_up = timedelta(days=recipe.keep_days, hours=recipe.approve_within_hours) + longest_try(recipe)
    found = []
    for folder in _folders(store.path(recipe.name, RUNS)):
        records = store.records(recipe.name, folder.name)
        summary = records.pop("run", None)
        starts = [_time(record["started_at"]) for record in records.values() if "started_at" in record]
        ended = _time(summary.get("finished_at")) if summary else None
        last = max([*starts, *([ended] if ended else [])], default=None) or _changed(folder)
        # tasks may have been cleared after the end; it is written down in whole seconds
        unfinished = ended is None or max(starts, default=ended) > ended + timedelta(seconds=1)
        marks: dict[str, datetime] = {}
        for name, record in records.items():
            # the records of a sweep's candidates are called `train.<fingerprint of its pinned recipe>`
            for mark in (record.get("fingerprint"), name.partition(".")[2]):
                if mark:
                    marks[mark] = max(_time(record.get("started_at")), marks.get(mark, LONG_AGO))
        found.append(_Run(folder, last, marks, unfinished and last > datetime.now(UTC) - given_up))
    return sorted(found, key=lambda run: run.last)


def _changed(folder: UPath) -> datetime:
    """When a file in a folder of the store was last written; long ago where there is none, now where it is not told."""
    newest = LONG_AGO
    try:
        for name, info in folder.fs.find(folder.path, detail=True).items():
            newest = max(newest, info.get("LastModified") or folder.fs.modified(name))  # S3 tells it with the listing
        if folder.name.startswith(".") and newest > LONG_AGO:
            newest = max(newest, folder.fs.modified(folder.path))  # a copy under way keeps the times of its files
    except (FileNotFoundError, NotImplementedError):
        return datetime.now(UTC)
    return newest


class _Retention:
    """What of a recipe's part of the store stays, and what goes."""

    def __init__(self, store: Store, recipe: Recipe, dry_run: bool):
        self.store, self.recipe = store, recipe
        self.removal = _Removal(recipe.name, dry_run)
        self.oldest = datetime.now(UTC) - timedelta(days=recipe.keep_days)
        self.artifacts: dict[UPath, dict[str, Any]] = {}
        self.leftovers: list[UPath] = []  # halves, and checkpoints of unfinished trainings
        for stage in _folders(store.path(recipe.name)):
            if stage.name not in (RUNS, OUTCOMES):
                folders = _folders(stage)
                contents = read_all(folder / MANIFEST for folder in folders)
                for folder in folders:
                    manifest = _manifest(folder, contents.get(folder / MANIFEST))
                    if manifest:
                        self.artifacts[folder] = manifest
                    else:
                        self.leftovers.append(folder)
        self.runs = _runs(store, recipe)  # after the artifacts: a run that has begun to use one meanwhile is seen

    def apply(self) -> str:
        """Remove what goes; returns a line about it.

        Raises:
            _Unsure: see there.
        """
        manifests = self._certificates()
        published = self._with_inputs(
            mark
            for manifest in manifests
            # the demo's base is an artifact, too
            for mark in (*manifest.get("fingerprints", {}).values(), manifest.get("base", {}).get("revision"))
        )
        in_use = self._with_inputs(mark for run in self.runs if run.alive for mark in run.marks)
        kept: Counter[str] = Counter()
        for folder, manifest in self.artifacts.items():
            mark = manifest["fingerprint"]
            if mark in published:
                kept["published"] += 1
            elif mark in in_use or self._last_use(manifest) > self.oldest:
                kept["in use"] += 1
            else:
                self.removal.take(folder, "artifact", sum(file["bytes"] for file in manifest["files"].values()))
        self._remove_leftovers()
        self._remove_runs({self.store.run_folder(self.recipe.name, str(made.get("run"))).name for made in manifests})
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(kept.items(), reverse=True))
        return f"{self.removal.line('artifact')}; kept {kept.total()}" + (f" ({reasons})" if reasons else "")

    def _certificates(self) -> list[dict[str, Any]]:
        """The manifests of what is live and of all versions."""
        uri = registry_uri(self.recipe)
        found = []
        try:
            for place in (uri, merged_uri(uri)) if self.recipe.merged_16bit else (uri,):
                found += open_registry(place).manifests()
        except RetuneError as error:
            raise _Unsure(f"the registry cannot be read, so it is not known what is published: {error}") from error
        if not found and self._has_published():
            raise _Unsure(f"runs have published, and there is no version in {uri}; is it where it was?")
        return found

    def _has_published(self) -> bool:
        outcomes = self.store.documents(self.store.path(self.recipe.name, OUTCOMES)).values()
        return any(outcome["verdict"] == "published" for outcome in outcomes)

    def _with_inputs(self, marks: Iterator[str]) -> set[str]:
        """Fingerprints, and those of all that their artifacts were made of."""
        inputs = {manifest["fingerprint"]: manifest["inputs"].values() for manifest in self.artifacts.values()}
        found: set[str] = set()
        todo = list(marks)
        while todo:
            mark = todo.pop()
            if mark not in found:
                found.add(mark)
                todo += inputs.get(mark, ())
        return found

    def _last_use(self, manifest: dict[str, Any]) -> datetime:
        mark = manifest["fingerprint"]
        return max([_time(manifest["made_at"]), *(run.marks[mark] for run in self.runs if mark in run.marks)])

    def _remove_leftovers(self) -> None:
        busy = any(run.alive for run in self.runs)
        for folder in self.leftovers:
            if OLD in folder.name or (not busy and _changed(folder) < self.oldest):
                size = sum(info["size"] for info in folder.fs.find(folder.path, detail=True).values())
                self.removal.take(folder, "leftover", size)

    def _remove_runs(self, published: set[str]) -> None:
        for run in self.runs[:-1]:  # people look at the newest one, however old
            if not run.alive and run.last < self.oldest and run.folder.name not in published:
                size = sum(info["size"] for info in run.folder.fs.find(run.folder.path, detail=True).values())
                self.removal.take(run.folder, "run", size)


def _manifest(folder: UPath, content: bytes | None) -> dict[str, Any] | None:
    """The manifest of an artifact; None for what is none."""
    if folder.name.startswith("."):
        return None
    try:
        manifest = orjson.loads(content or b"")
        return manifest if manifest["fingerprint"] == folder.name else None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _remove_work(store: Store, recipe: Recipe, dry_run: bool) -> str:
    """Unfinished work on this machine. A process that works on it holds its lock."""
    removal, kept = _Removal(f"{recipe.name} on this machine", dry_run), 0
    oldest = datetime.now(UTC) - timedelta(days=recipe.keep_days)
    busy = any(run.alive for run in _runs(store, recipe))
    work = var() / "work" / recipe.name
    names = {(path.parent, _work_name(path.name)) for path in work.glob("*/*")}
    for stage, name in sorted(names):
        folder, lock = stage / name, stage / f".{name}.lock"
        if busy or max(_touched(folder), _touched(lock)) > oldest:
            kept += folder.exists()
            continue
        was_there = lock.exists()
        try:
            with FileLock(lock, timeout=0):
                if folder.exists():
                    removal.take(folder, "work folder", _size(folder))
                if not (dry_run and was_there):
                    lock.unlink(missing_ok=True)  # whoever waits for it sees that it is gone, and makes it anew
        except Timeout:
            kept += 1
    return f"{removal.line('work folder')}; kept {kept}"


def _work_name(name: str) -> str:
    return name[1:].removesuffix(".lock") if name.startswith(".") and name.endswith(".lock") else name


def _remove_caches(dry_run: bool) -> str:
    """What this machine has fetched or said, and has not looked at for longer than any recipe keeps and any try takes.

    It can all be fetched again.
    """
    removal = _Removal("this machine", dry_run)
    recipes = []
    for file in recipe_files():
        with suppress(RetuneError):
            recipes.append(load_recipe(file))
    longest = max((timedelta(days=recipe.keep_days) + longest_try(recipe) for recipe in recipes), default=None)
    if longest is None:
        return "removed no caches of this machine: there is no recipe that can be read"
    oldest = datetime.now(UTC) - longest
    cache = var() / "cache"
    for folder in (path for name in CACHES for path in cache.glob(f"{name}/*")):
        if folder.is_dir() and _touched(folder) < oldest:
            removal.take(folder, "cache", _size(folder))
    for name in HUB_CACHES:
        if (cache / name).is_dir():
            _remove_revisions(cache / name, oldest, removal)
    for path in var().glob(f"logs/{HEADLESS_LOGS}"):
        if _touched(path) < oldest:
            removal.counts["log"] += 1
            removal.bytes += path.stat().st_size
            if not dry_run:
                path.unlink(missing_ok=True)
    return removal.line("cache", "log")


def _remove_revisions(cache: Path, oldest: datetime, removal: _Removal) -> None:
    """Revisions of models and datasets of the Hub in a cache of huggingface_hub; files of others' stay."""
    from huggingface_hub import scan_cache_dir

    found = scan_cache_dir(cache)
    old = [
        revision
        for repository in found.repos
        for revision in repository.revisions
        if max((file.blob_last_accessed for file in revision.files), default=0) < oldest.timestamp()
        and revision.last_modified < oldest.timestamp()
    ]
    if old:
        strategy = found.delete_revisions(*(revision.commit_hash for revision in old))
        for revision in old:
            log.info("%s %s", "would remove" if removal.dry_run else "removing", revision.snapshot_path)
        removal.counts["revision"] += len(old)
        removal.bytes += strategy.expected_freed_size
        if not removal.dry_run:
            strategy.execute()


def _touched(place: Path) -> datetime:
    """When a file, or any in a folder, was last written or read; long ago where there is none."""
    newest = 0.0
    for path in (place, *place.rglob("*")):
        with suppress(FileNotFoundError):
            if not path.is_dir():
                state = path.lstat()
                newest = max(newest, state.st_mtime, state.st_atime)
    return datetime.fromtimestamp(newest, UTC)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
