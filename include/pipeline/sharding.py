"""A stage whose work several machines can share, shard by shard, through the store.

Such a stage reads a folder of numbered files, `ROWS_PER_GROUP` rows each. Its work consists of steps. A step runs
either once, or once per shard, that is, for a range of files. On one machine, a step runs when the stage's function
asks for its result. If several machines share the stage, each step (and each shard of it) is an Airflow task. The
task moves its files directly to the stage's folder in the store; no reader opens the folder before it has a manifest.
Then the task writes a record of the step (bytes and sha256 of each file, small results) to `.parts/`. The last task
calls the stage's function, which reads the results of the steps, and writes the manifest.

A killed step runs again, a finished step does not, and two tries at the same time write the same bytes.
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
from include.pipeline.contracts import CONTRACTS
from include.pipeline.records import Lineage, Record, log, recorded
from include.pipeline.stage import C, Output, Result, Stage, StageContext, input_stages_of, output_of, pinned_recipe
from include.recipe import Recipe
from include.storage.artifacts import PARALLEL_FETCHES, Artifact, Store
from include.storage.files import (
    MANIFEST,
    atomic_write,
    describe_files,
    installed_packages,
    make_writable,
    now,
    remove,
    seal,
    to_json,
)
from include.storage.locations import is_local
from include.storage.object_store import upload

PARTS = ".parts"  # in a stage's folder: files that only its own steps read, and the steps' records; removed in the end
PLAN = f"{PARTS}/plan.json"
MAX_SHARDS = 1000  # Airflow maps a task over at most 1,024 (`[core] max_map_length`)

Shard = dict[str, Any]  # `first` and `end`: range of files; `label` for people; `of`: the stage's fingerprint


class Step:
    """A step of a stage.

    Args:
        work: `work(context, **inputs)`, which runs once, or `work(context, names, **inputs)`, which runs for files and
            returns a list with one value per file. Values are small and JSON. Files in `context.out` are part of the
            stage's output; files below `PARTS` are for later steps.
    """

    def __init__(self, work: Callable[..., Any]):
        self.work, self.name, self.__doc__ = work, work.__name__, work.__doc__
        self.mapped = "names" in inspect.signature(work).parameters
        input_stages_of(work)


@dataclass
class ShardedContext(StageContext):
    """What the steps of a stage work with.

    Attributes:
        inputs: the outputs that the stage reads, by stage.
        names: names of all files of the input.
        folder: the stage's folder in the store, where several machines share the work; None on one machine.
        cache: objects that one step builds and a later step of the same process uses.
    """

    inputs: dict[str, Output[Any]]
    names: list[str]
    folder: UPath | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    _results: dict[str, Any] = field(default_factory=dict)

    def result_of(self, step: Step) -> Any:
        """Return a step's value, or its list of one value per file. On one machine, run the step if it has not run.

        Raises:
            RetuneError: the record of a step that another machine should have run is missing.
        """
        if step.name not in self._results:
            if self.folder is None:
                found = step.work(self, *([self.names] if step.mapped else []), **self.inputs)
            else:
                results = [record["result"] for record in self.records(step)]
                found = [value for result in results for value in result] if step.mapped else results[0]
            self._results[step.name] = found
        return self._results[step.name]

    def files_of(self, step: Step, *names: str) -> Path:
        """Return the folder on this disk with the named files (or folders) that a step has written.

        Raises:
            RetuneError: see `result_of` and `Artifact.local`.
        """
        self.result_of(step)
        if self.folder is None:
            return self.out
        files = {name: file for record in self.records(step) for name, file in record["files"].items()}
        return Artifact(self.folder, {"files": files}).local(*names, into=self.download_folder)

    def fetch(self, output: Output[Any], *names: str) -> Path:
        """Return `output.local(*names)`. Where machines share the work, the copy is removed after the step."""
        return output.local(*names, into=self.download_folder)

    @property
    def download_folder(self) -> Path | None:
        """Return the folder for files that a shared step fetches; None on one machine, which has its cache."""
        return self.out.with_name(f"{self.out.name}.in") if self.folder is not None else None

    def records(self, step: Step) -> list[dict[str, Any]]:
        """Return the records of a shared step, in the order of its shards."""
        assert self.folder is not None
        folder, plan = self.folder, _read(self.folder, PLAN)
        shards = plan["shards"] if plan and step.mapped else [None]
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            found = list(pool.map(lambda shard: _read(folder, _record_path(step, shard)), shards))
        if plan is None or None in found:
            raise RetuneError(f"parts of the step {step.name} are not in {folder}", "Clear the stage's first task")
        return [record for record in found if record is not None]


class Sharded(Stage[C]):
    """A stage with steps. Calling it runs all steps in this process. On several machines, `plan`, `run_step` for each
    step and shard, and `finish` give the same result.

    Args:
        split_folder: the folder of the stage's first input whose files make the shards.
        steps: in order; `work` gets their results with `context.result_of`.
        work, version, options: see `Stage`.
    """

    def __init__(
        self,
        work: Callable[..., Result[C]],
        version: int,
        split_folder: str,
        steps: Iterable[Step],
        **options: Any,
    ):
        super().__init__(work, version, **options)
        self.split_folder, self.steps = split_folder, tuple(steps)

    @property
    def leading_steps(self) -> tuple[Step, ...]:
        """Return the steps that `plan` runs: those that run once and wait for no other step."""
        first_mapped = next(i for i, step in enumerate(self.steps) if step.mapped)
        return self.steps[:first_mapped]

    def run(self, context: StageContext, inputs: dict[str, Output[Any]]) -> str:
        """See `Stage.run`."""
        if not isinstance(context, ShardedContext):
            context = self._context(context.recipe, context.run_id, context.store, context.record, inputs)
        return super().run(context, inputs)

    def plan(self, lineage: Lineage) -> list[Shard]:
        """Write the plan and run the leading steps; return the shards, or [] if the stage's output exists already."""
        store = Store()
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage) as record:
            recipe = pinned_recipe(store, lineage)
            inputs = {name: output_of(store, lineage, name) for name in self.input_stages}
            context = self._context(self.view(recipe), lineage["run"], store, record, inputs)
            key = self.fingerprint(context, inputs)
            if store.find(recipe.name, self.name, key):
                return []
            context.folder = store.path(recipe.name, self.name, key)
            if store.is_local:
                make_writable(Path(context.folder.path))
            with suppress(FileNotFoundError):
                (context.folder / MANIFEST).unlink()  # the artifact is incomplete and is made again
            shards = _split(len(context.names), recipe.shard_rows, key)
            began = _read(context.folder, PLAN) or {"began_at": now("milliseconds")}
            with store.write_errors():
                atomic_write(context.folder / PLAN, to_json({**began, "shards": shards}))
            for step in self.leading_steps:
                self._run_step(context, step, None, key)
            record.progress(f"{len(shards):,} {'shards' if len(shards) > 1 else 'shard'} of rows")
        return shards

    def run_step(self, lineage: Lineage, step: Step, shard: Shard | None = None) -> None:
        """Run one step, for one shard if the step runs for files. A finished step is not run again.

        Raises:
            RetuneError: this machine computes another fingerprint than the machine that planned.
        """
        store = Store()
        part = shard["label"] if shard else step.name
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage, part) as record:
            recipe = pinned_recipe(store, lineage)
            inputs = {name: _output_unchecked(store, lineage, name) for name in self.input_stages}
            context = self._context(self.view(recipe), lineage["run"], store, record, inputs)
            key = self.fingerprint(context, inputs)
            if shard and shard["of"] != key:
                raise RetuneError(
                    f"this worker computes the fingerprint {key}, the worker that planned computed {shard['of']}",
                    "All workers need the same version of Retune, and the same file in decontaminate_against",
                )
            context.folder = store.path(recipe.name, self.name, key)
            if _read(context.folder, MANIFEST) is None:
                self._run_step(context, step, shard, key)

    def finish(self, lineage: Lineage) -> Lineage:
        """Combine the results of the steps, write the manifest, and remove the files that only steps have read."""
        store = Store()
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage) as record:
            recipe = pinned_recipe(store, lineage)
            inputs = {name: _output_unchecked(store, lineage, name) for name in self.input_stages}
            context = self._context(self.view(recipe), lineage["run"], store, record, inputs)
            key = self.fingerprint(context, inputs)
            context.folder = store.path(recipe.name, self.name, key)
            if plan := _read(context.folder, PLAN):
                record.add_seconds((datetime.now(UTC) - datetime.fromisoformat(plan["began_at"])).total_seconds())
            self.run(context, inputs)
            with store.write_errors():
                if store.is_local:
                    make_writable(Path(context.folder.path))
                remove(context.folder / PARTS)
                if store.is_local and (manifest := _read(context.folder, MANIFEST)):
                    seal(Path(context.folder.path), manifest["files"], manifest["made_at"])
        return {**lineage, self.name: key}

    def _context(
        self, recipe: Recipe, run: str, store: Store, record: Record, inputs: dict[str, Output[Any]]
    ) -> ShardedContext:
        below = f"{self.split_folder}/"
        files = inputs[self.input_stages[0]].manifest["files"]
        names = sorted(name.removeprefix(below) for name in files if name.startswith(below))
        return ShardedContext(recipe, run, store, Path(), record, inputs, names)

    def _run_step(self, context: ShardedContext, step: Step, shard: Shard | None, key: str) -> None:
        assert context.folder is not None
        path, folder = _record_path(step, shard), context.folder
        context.out = var() / "work" / context.recipe.name / self.name / f"{key}.{Path(path).stem}"
        context.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"{self.name}: {step.name}" + (f" of {shard['label']}" if shard else "")
        with FileLock(context.out.with_name(f".{context.out.name}.lock")):
            if (known := _read(folder, path)) and _is_complete(folder, known["files"]):
                log.info("%s was done already", title)
                return
            _remove_work(context)
            context.out.mkdir()
            names = [context.names[shard["first"] : shard["end"]]] if shard else []
            result = step.work(context, *names, **context.inputs)
            files = describe_files(context.out)
            if _read(folder, MANIFEST) is not None:  # another try has finished the stage, and its folder is read-only
                _remove_work(context)
                return
            with context.store.write_errors():
                _move_into_store(context.out, folder, files)
                atomic_write(folder / path, to_json({"files": files, "result": result}))
            _remove_work(context)
        log.info("%s done: %s files", title, f"{len(files):,}")

    def _commit(self, context: StageContext, key: str, **manifest: Any) -> Artifact:
        assert isinstance(context, ShardedContext)
        if context.folder is None:
            shutil.rmtree(context.out / PARTS, ignore_errors=True)
            return super()._commit(context, key, **manifest)
        if artifact := context.store.find(context.recipe.name, self.name, key):  # another try was faster
            _remove_work(context)
            return artifact
        own = describe_files(context.out)
        parts = {
            name: file
            for step in self.steps
            for record in context.records(step)
            for name, file in record["files"].items()
        }
        files = {name: file for name, file in (parts | own).items() if not name.startswith(f"{PARTS}/")}
        content = {
            "stage": self.name, "recipe": context.recipe.name, "fingerprint": key, "made_at": now(),
            **manifest, "packages": installed_packages(), "files": dict(sorted(files.items())),
        }  # fmt: skip
        with context.store.write_errors():
            _move_into_store(context.out, context.folder, own)
            atomic_write(context.folder / MANIFEST, to_json(content))
        _remove_work(context)
        return Artifact(context.folder, orjson.loads(to_json(content)))


def sharded(
    version: int, split_folder: str, steps: Iterable[Step], **options: Any
) -> Callable[[Callable[..., Result[C]]], Sharded[C]]:
    """Return a decorator that turns a function into a `Sharded` stage, which documents the arguments."""
    return lambda work: Sharded(work, version, split_folder, steps, **options)


def _split(files: int, shard_rows: int | None, key: str) -> list[Shard]:
    """Return shards of whole files, all of the same size except the last one."""
    size = max((shard_rows or files * ROWS_PER_GROUP) // ROWS_PER_GROUP, -(-files // MAX_SHARDS), 1)
    shards = []
    for first in range(0, files, size):
        end = min(first + size, files)
        upto = "the end" if end == files else f"{end * ROWS_PER_GROUP:,}"
        shards.append({"first": first, "end": end, "label": f"rows {first * ROWS_PER_GROUP:,} to {upto}", "of": key})
    return shards


def _record_path(step: Step, shard: Shard | None) -> str:
    """Return the path of a step's record in the stage's folder."""
    return f"{PARTS}/{step.name}{'' if shard is None else '-{first}-{end}'.format(**shard)}.json"


def _output_unchecked(store: Store, lineage: Lineage, stage: str) -> Output[Any]:
    """Return a stage's output without checking each file; a fetched file is compared with its digest anyway."""
    folder = store.path(lineage["recipe"], stage, lineage[stage])
    manifest = _read(folder, MANIFEST)
    return Output(Artifact(folder, manifest), CONTRACTS[stage]) if manifest else output_of(store, lineage, stage)


def _read(folder: UPath, name: str) -> dict[str, Any] | None:
    """Return a JSON document of the store, read without any cached listing; None if it does not exist."""
    try:
        return orjson.loads(folder.fs.cat_file((folder / name).path))
    except FileNotFoundError:
        return None


def _is_complete(folder: UPath, files: dict[str, Any]) -> bool:
    def size(name: str) -> int:
        try:
            return folder.fs.size((folder / name).path)
        except FileNotFoundError:
            return -1

    with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
        return list(pool.map(size, files)) == [file["bytes"] for file in files.values()]


def _move_into_store(source: Path, folder: UPath, files: Iterable[str]) -> None:
    """Move files into a folder of the store so that a reader sees each of them whole or not at all."""
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
            tmp_path = Path(folder.path) / PARTS / uuid.uuid4().hex
            tmp_path.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, tmp_path)
            os.replace(tmp_path, target)


def _remove_work(context: ShardedContext) -> None:
    for folder in filter(None, (context.out, context.download_folder)):
        shutil.rmtree(folder, ignore_errors=True)
