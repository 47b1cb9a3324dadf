"""A stage whose work several machines can share, shard by shard, through the store.

Such a stage reads a folder of numbered files, `ROWS_PER_GROUP` rows each. Its work consists of steps, of which some are
done once and some for files. On one machine a step is done where the work asks for it. Shared, each is a task of its
own, for each shard of files: what it makes goes straight to its place in the stage's folder of the store, where nobody
sees it before the manifest is there, and then a record of it (bytes and sha256 of each file, small results) goes below
`.parts/`. The last task runs the stage's work, which finds every step done, and writes the manifest.

So a step that is killed is done again, one that is done is not, and two tries at once write the same.
"""

from __future__ import annotations

import errno
import inspect
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock
from upath import UPath

from include.data.sources import ROWS_PER_GROUP
from include.errors import RetuneError
from include.paths import var
from include.pipeline.stage import (
    Lineage,
    Record,
    Result,
    Stage,
    StageContext,
    artifact_of,
    log,
    pinned_recipe,
    recorded,
)
from include.recipe import Recipe
from include.storage.artifacts import PARALLEL_FETCHES, Artifact, Store
from include.storage.files import MANIFEST, atomic_write, describe_files, installed_packages, now, remove, to_json
from include.storage.locations import is_local
from include.storage.object_store import upload

PARTS = ".parts"  # in a stage's folder: what only its own steps read, and their records; removed in the end
PLAN = f"{PARTS}/plan.json"
MOST_SHARDS = 1000  # Airflow maps a task over at most 1,024 (`[core] max_map_length`)

Shard = dict[str, Any]  # `first` and `end`: which files; `label` for people; `of`: the stage's fingerprint


class Step:
    """A step of a stage.

    Args:
        work: `work(context, **artifacts)`, done once, or `work(context, names, **artifacts)`, done for files and returning a
            list with a value for each. What they return are small JSON values; what they write into `context.out` is part
            of the stage's output, or below `PARTS` for later steps.
    """

    def __init__(self, work: Callable[..., Any]):
        self.work, self.name, self.__doc__ = work, work.__name__, work.__doc__
        self.mapped = "names" in inspect.signature(work).parameters


@dataclass
class ShardedContext(StageContext):
    """What a stage with steps works with.

    Attributes:
        inputs: the artifacts that the stage reads.
        names: of all files that it goes through.
        folder: the stage's in the store, where several machines share the work; None on one machine.
        kept: for what one step has built and a later one of the same process can use.
    """

    inputs: dict[str, Artifact]
    names: list[str]
    folder: UPath | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    _done: dict[str, Any] = field(default_factory=dict)

    def did(self, step: Step) -> Any:
        """What a step returned, or a list with what it returned for each file; on one machine it is done now.

        Raises:
            RetuneError: another machine should have done it, and its record is not there.
        """
        if step.name not in self._done:
            if self.folder is None:
                found = step.work(self, *([self.names] if step.mapped else []), **self.inputs)
            else:
                results = [record["result"] for record in self.records(step)]
                found = [value for result in results for value in result] if step.mapped else results[0]
            self._done[step.name] = found
        return self._done[step.name]

    def made(self, step: Step, *names: str) -> Path:
        """The folder on this disk with the named files (or folders) that a step has left.

        Raises:
            RetuneError: see `did` and `Artifact.local`.
        """
        self.did(step)
        if self.folder is None:
            return self.out
        files = {name: file for record in self.records(step) for name, file in record["files"].items()}
        return Artifact(self.folder, {"files": files}).local(*names, into=self.scratch)

    def fetched(self, artifact: Artifact, *names: str) -> Path:
        """`artifact.local(*names)`; where several share the work it is gone with the step: none has space for all."""
        return artifact.local(*names, into=self.scratch)

    @property
    def scratch(self) -> Path | None:
        """Where a shared step puts what it fetches; None on one machine, which has its cache."""
        return self.out.with_name(f"{self.out.name}.in") if self.folder is not None else None

    def records(self, step: Step) -> list[dict[str, Any]]:
        """What is known of a step that several machines have shared, in the order of its shards."""
        plan = _read(self._folder, PLAN)
        shards = plan["shards"] if plan and step.mapped else [None]
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            found = list(pool.map(lambda shard: _read(self._folder, _record(step, shard)), shards))
        if plan is None or None in found:
            raise RetuneError(
                f"parts of the step {step.name} are not in {self._folder}", "Clear the stage's first task"
            )
        return [record for record in found if record is not None]

    @property
    def _folder(self) -> UPath:
        assert self.folder is not None
        return self.folder


class Sharded(Stage):
    """A stage with steps. Called, it does them all here; `plan`, `do` for each step and shard, and `finish` are the
    same for several machines, with the same result.

    Args:
        splits: the folder of the stage's input whose files make the shards.
        steps: in order; the work asks for them by `context.did`.
        work, version, recipe_fields, options: see `Stage`.
    """

    def __init__(
        self, work: Callable[..., Result], version: int, recipe_fields: Iterable[str], splits: str, steps: Iterable[Step],
        **options: Any,
    ):  # fmt: skip
        super().__init__(work, version, recipe_fields, **options)
        self.splits, self.steps = splits, tuple(steps)

    @property
    def ahead(self) -> tuple[Step, ...]:
        """The steps that `plan` does: those that are done once and wait for no other."""
        first_mapped = next(i for i, step in enumerate(self.steps) if step.mapped)
        return self.steps[:first_mapped]

    def run(self, context: StageContext, inputs: dict[str, Artifact]) -> str:
        """See `Stage.run`."""
        if not isinstance(context, ShardedContext):
            context = self._job(context.recipe, context.run_id, context.store, context.record, inputs)
        return super().run(context, inputs)

    def plan(self, lineage: Lineage) -> list[Shard]:
        """The shards of what there is to do; none where the stage's output is there already."""
        store = Store()
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage) as record:
            recipe, inputs = (
                pinned_recipe(store, lineage),
                {name: artifact_of(store, lineage, name) for name in self.input_stages},
            )
            context = self._job(recipe, lineage["run"], store, record, inputs)
            mark = self.fingerprint(context, inputs)
            if store.find(recipe.name, self.name, mark):
                return []
            context.folder = store.path(recipe.name, self.name, mark)
            with suppress(FileNotFoundError):
                (context.folder / MANIFEST).unlink()  # a file of it is missing
            shards = _split(len(context.names), recipe.shard_rows, mark)
            began = _read(context.folder, PLAN) or {"began_at": now("milliseconds")}
            with store.write_errors():
                atomic_write(context.folder / PLAN, to_json({**began, "shards": shards}))
            for step in self.ahead:
                self._do(context, step, None, mark)
            record.say(f"{len(shards):,} {'shards' if len(shards) > 1 else 'shard'} of rows")
        return shards

    def do(self, lineage: Lineage, step: Step, shard: Shard | None = None) -> None:
        """One step, for one shard if it is one for files. What is done already is not done again.

        Raises:
            RetuneError: this machine comes to another fingerprint than the one that planned.
        """
        store = Store()
        part = shard["label"] if shard else step.name
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage, part) as record:
            recipe = pinned_recipe(store, lineage)
            inputs = {name: _unlooked(store, lineage, name) for name in self.input_stages}
            context = self._job(recipe, lineage["run"], store, record, inputs)
            mark = self.fingerprint(context, inputs)
            if shard and shard["of"] != mark:
                raise RetuneError(
                    f"this worker makes {mark} of what another one has planned as {shard['of']}",
                    "All workers need the same version of Retune, and the same file in decontaminate_against",
                )
            context.folder = store.path(recipe.name, self.name, mark)
            if _read(context.folder, MANIFEST) is None:
                self._do(context, step, shard, mark)

    def finish(self, lineage: Lineage) -> Lineage:
        """Sum up what the steps have done, write the manifest, and remove what only the steps have read."""
        store = Store()
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage) as record:
            recipe, inputs = pinned_recipe(store, lineage), {n: _unlooked(store, lineage, n) for n in self.input_stages}
            context = self._job(recipe, lineage["run"], store, record, inputs)
            mark = self.fingerprint(context, inputs)
            context.folder = store.path(recipe.name, self.name, mark)
            if plan := _read(context.folder, PLAN):
                record.add_seconds((datetime.now(UTC) - datetime.fromisoformat(plan["began_at"])).total_seconds())
            self.run(context, inputs)
            with store.write_errors():
                remove(context.folder / PARTS)
        return {**lineage, self.name: mark}

    def _job(
        self, recipe: Recipe, run: str, store: Store, record: Record, inputs: dict[str, Artifact]
    ) -> ShardedContext:
        below = f"{self.splits}/"
        files = inputs[self.input_stages[0]].manifest["files"]
        names = sorted(name.removeprefix(below) for name in files if name.startswith(below))
        return ShardedContext(recipe, run, store, Path(), record, inputs, names)

    def _do(self, context: ShardedContext, step: Step, shard: Shard | None, mark: str) -> None:
        assert context.folder is not None
        name, folder = _record(step, shard), context.folder
        context.out = var() / "work" / context.recipe.name / self.name / f"{mark}.{Path(name).stem}"
        context.out.parent.mkdir(parents=True, exist_ok=True)
        what = f"{self.name}: {step.name}" + (f" of {shard['label']}" if shard else "")
        with FileLock(context.out.with_name(f".{context.out.name}.lock")):
            if (known := _read(folder, name)) and _whole(folder, known["files"]):
                log.info("%s was done", what)
                return
            _empty(context)
            context.out.mkdir()
            names = [context.names[shard["first"] : shard["end"]]] if shard else []
            result = step.work(context, *names, **context.inputs)
            files = describe_files(context.out)
            with context.store.write_errors():
                _put(context.out, folder, files)
                atomic_write(folder / name, to_json({"files": files, "result": result}))
            _empty(context)
        log.info("%s done: %s files", what, f"{len(files):,}")

    def _commit(self, context: StageContext, mark: str, **facts: Any) -> Artifact:
        assert isinstance(context, ShardedContext)
        if context.folder is None:
            shutil.rmtree(context.out / PARTS, ignore_errors=True)
            return super()._commit(context, mark, **facts)
        if artifact := context.store.find(context.recipe.name, self.name, mark):  # another try was faster
            _empty(context)
            return artifact
        own = describe_files(context.out)
        parts = {
            n: file for step in self.steps for record in context.records(step) for n, file in record["files"].items()
        }
        files = {name: file for name, file in (parts | own).items() if not name.startswith(f"{PARTS}/")}
        manifest = {
            "stage": self.name, "recipe": context.recipe.name, "fingerprint": mark, "made_at": now(),
            **facts, "packages": installed_packages(), "files": dict(sorted(files.items())),
        }  # fmt: skip
        with context.store.write_errors():
            _put(context.out, context.folder, own)
            atomic_write(context.folder / MANIFEST, to_json(manifest))
        _empty(context)
        return Artifact(context.folder, orjson.loads(to_json(manifest)))


def sharded(
    version: int, recipe_fields: Iterable[str], splits: str, steps: Iterable[Step], **options: Any
) -> Callable[..., Any]:
    """Makes a `Sharded` of a function; see there for the arguments."""
    return lambda work: Sharded(work, version, recipe_fields, splits, steps, **options)


def _split(files: int, shard_rows: int | None, mark: str) -> list[Shard]:
    """Shards of whole files, all as large as may be but the last."""
    size = max((shard_rows or files * ROWS_PER_GROUP) // ROWS_PER_GROUP, -(-files // MOST_SHARDS), 1)
    shards = []
    for first in range(0, files, size):
        end = min(first + size, files)
        upto = "the end" if end == files else f"{end * ROWS_PER_GROUP:,}"
        shards.append({"first": first, "end": end, "label": f"rows {first * ROWS_PER_GROUP:,} to {upto}", "of": mark})
    return shards


def _record(step: Step, shard: Shard | None) -> str:
    """Where the record of a step is in the stage's folder."""
    return f"{PARTS}/{step.name}{'' if shard is None else '-{first}-{end}'.format(**shard)}.json"


def _unlooked(store: Store, lineage: Lineage, name: str) -> Artifact:
    """What a stage left behind, without a look at each of its files: those that are fetched are compared anyway."""
    folder = store.path(lineage["recipe"], name, lineage[name])
    manifest = _read(folder, MANIFEST)
    return Artifact(folder, manifest) if manifest else artifact_of(store, lineage, name)


def _read(folder: UPath, name: str) -> dict[str, Any] | None:
    """A JSON document of the store as it is now, whatever a listing of earlier says."""
    try:
        return orjson.loads(folder.fs.cat_file((folder / name).path))
    except FileNotFoundError:
        return None


def _whole(folder: UPath, files: dict[str, Any]) -> bool:
    def size(name: str) -> int:
        try:
            return folder.fs.size((folder / name).path)
        except FileNotFoundError:
            return -1

    with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
        return list(pool.map(size, files)) == [file["bytes"] for file in files.values()]


def _put(source: Path, folder: UPath, files: Iterable[str]) -> None:
    """Move files into a folder of the store, each so that a reader sees all of it or none."""
    if not is_local(folder):
        upload(source, files, folder)
        return

    for name in files:
        target = Path(folder.path) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(source / name, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            aside = Path(folder.path) / PARTS / uuid.uuid4().hex
            aside.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, aside)
            os.replace(aside, target)


def _empty(context: ShardedContext) -> None:
    for folder in filter(None, (context.out, context.scratch)):
        shutil.rmtree(folder, ignore_errors=True)
