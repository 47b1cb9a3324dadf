"""What every stage does around its own work: fingerprint, reuse, manifest, and the record that people follow."""

from __future__ import annotations

import inspect
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from include.errors import RetuneError, TransientError, UpToDate
from include.paths import var
from include.recipe import Recipe
from include.storage.artifacts import STORE_SETTING, Artifact, Store
from include.storage.files import fingerprint, now
from include.storage.object_store import object_errors

log = logging.getLogger("airflow.task.retune")  # below Airflow's own task logger, so that the UI shows it

# recipe, run, and the fingerprint of each stage so far: all that goes from task to task; in a sweep, which candidate
Lineage = dict[str, str]


@dataclass
class Result:
    """What a stage has to say: one line for people, and facts (plain JSON values) for later stages."""

    summary: str
    metadata: dict[str, Any] = field(default_factory=dict)
    unchanged: bool = False  # the stage looked, and everything was as it should be already


@dataclass
class StageContext:
    """What a stage works with."""

    recipe: Recipe
    run_id: str
    store: Store
    out: Path
    record: Record

    def say(self, line: str) -> None:
        """One line to the task's log and to whoever follows the run."""
        self.record.say(line)


class Record:
    """The stage's document in the run's folder: state, line, seconds, error, and the candidate of a sweep.

    Args:
        quiet: only a failure is written down; for those of several tasks of a stage that neither begin nor end it.
    """

    def __init__(
        self, store: Store, recipe: str, run_id: str, stage: str, name: str, candidate: str | None, quiet: bool = False
    ):
        self._store, self._recipe, self._run_id, self._name, self._quiet = store, recipe, run_id, name, quiet
        self._began = time.monotonic()
        self.content: dict[str, Any] = {
            "stage": stage,
            "state": "running",
            "started_at": now("milliseconds"),
            "summary": "",
        }
        if candidate is not None:
            self.content["candidate"] = candidate
        self._write()

    def say(self, line: str) -> None:
        """A line while the work goes on. Hours of work do not end because a store did not take it."""
        log.info("%s", line)
        self.content["summary"] = line
        with suppress(TransientError):
            self._write()

    def add_seconds(self, seconds: float) -> None:
        """Count what the stage's earlier tasks took, too."""
        self._began -= seconds

    def close(self, state: str, **content: Any) -> None:
        """The last word."""
        self._quiet = self._quiet and state != "failed"
        self.content.update(state=state, seconds=round(time.monotonic() - self._began, 2), **content)
        self._write()

    def _write(self) -> None:
        if not self._quiet:
            self._store.write_record(self._recipe, self._run_id, self._name, self.content)


@contextmanager
def recorded(
    store: Store, recipe: str, run_id: str, stage: str, lineage: Lineage | None = None, part: str = ""
) -> Iterator[Record]:
    """Keeps the run's record of a stage, also of its failure, and logs the failure in one line.

    Args:
        lineage: needed for a sweep's candidates only, whose records have names of their own (see `record_name`).
        part: which part of the stage's work this is, where it is not all of it; then only a failure is recorded.
    """
    record, lineage = None, lineage or {}
    try:
        name = record_name(stage, lineage)
        record = Record(store, recipe, run_id, stage, name, lineage.get("candidate"), quiet=bool(part))
        with object_errors(f"the store {store.uri}", STORE_SETTING):
            yield record
    except UpToDate as error:
        if record:
            record.close("skipped", summary=error.what)
        log.info("%s", error)
        raise
    except BaseException as error:
        what, do = f"{type(error).__name__}: {error}", "See the log; this is a fault of Retune or of its surroundings"
        if isinstance(error, RetuneError):
            what, do = error.what, error.do
        elif isinstance(error, KeyboardInterrupt):
            what, do = f"{stage} was stopped", "Run again: finished stages are reused"
        what = f"{part}: {what}" if part else what
        if record:
            with suppress(RetuneError):  # where the store is what failed, the log below says so
                record.close("failed", summary=what, error={"kind": type(error).__name__, "what": what, "do": do})
        log.error("%s failed: %s. %s.", stage, what, do)
        raise


def record_name(stage: str, lineage: Lineage) -> str:
    """The stage's name; in a sweep with the candidate's pinned recipe, since candidates share the run's folder."""
    return f"{stage}.{lineage['resolve']}" if "candidate" in lineage else stage


class Stage:
    """A stage of the pipeline: called with the lineage of the stages before it, it returns the lineage with its own step.

    Args:
        work: `work(context, **artifacts) -> Result`; the names of its parameters are the stages that it reads.
        version: raised by hand when the code gives another output for the same input.
        recipe_fields: the fields of the recipe that decide the output.
        external_inputs: `external_inputs(context, **artifacts)`, what else decides the output (say, what is live now), as JSON values.
        resumable: keep the unfinished work folder of an earlier try, since the stage can go on from it.
        reuse: False for a stage that must look at the world each time.
        fingerprint_fn: `fingerprint_fn(context)`, the fingerprint itself, where others must know it without asking the stage.
    """

    def __init__(
        self,
        work: Callable[..., Result],
        version: int,
        recipe_fields: Iterable[str],
        external_inputs: Callable[..., Any] | None = None,
        resumable: bool = False,
        reuse: bool = True,
        fingerprint_fn: Callable[[StageContext], str] | None = None,
    ):
        self.work, self.version, self.recipe_fields = work, version, tuple(recipe_fields)
        self.external_inputs, self.resumable, self.reuse, self.fingerprint_fn = (
            external_inputs,
            resumable,
            reuse,
            fingerprint_fn,
        )
        self.name = work.__name__
        self.__name__, self.__doc__ = work.__name__, work.__doc__
        self.input_stages = tuple(inspect.signature(work).parameters)[1:]

    def __call__(self, lineage: Lineage) -> Lineage:
        """Make the artifact, or find it made.

        Args:
            lineage: what the stages before this one returned; `resolve` begins it.
        """
        store = Store()
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage) as record:
            recipe = pinned_recipe(store, lineage)
            inputs = {name: artifact_of(store, lineage, name) for name in self.input_stages}
            mark = self.run(StageContext(recipe, lineage["run"], store, Path(), record), inputs)
        return {**lineage, self.name: mark}

    def fingerprint(self, context: StageContext, inputs: dict[str, Artifact]) -> str:
        """What decides the output, as the name of its folder."""
        if self.fingerprint_fn:
            return self.fingerprint_fn(context)
        return fingerprint(
            {
                "stage": self.name,
                "version": self.version,
                "inputs": {name: artifact.fingerprint for name, artifact in inputs.items()},
                "recipe": context.recipe.subset(self.recipe_fields),
                "metadata": self.external_inputs(context, **inputs) if self.external_inputs else None,
            }
        )

    def run(self, context: StageContext, inputs: dict[str, Artifact]) -> str:
        """Reuse or make the artifact; returns its fingerprint. One process of a machine at a time works on one."""
        recipe, mark = context.recipe.name, self.fingerprint(context, inputs)
        context.out = var() / "work" / recipe / self.name / mark
        context.out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(context.out.with_name(f".{mark}.lock")):
            artifact = context.store.find(recipe, self.name, mark) if self.reuse else None
            reused = artifact is not None
            if artifact is None:
                artifact, reused = self._make(context, inputs, mark)
        line = artifact.manifest["summary"]
        context.record.close("done", reused=reused, summary=line, fingerprint=mark, folder=str(artifact.folder))
        log.info("%s %s: %s (%s)", self.name, "reused" if reused else "done", line, artifact.folder)
        return mark

    def _make(self, context: StageContext, inputs: dict[str, Artifact], mark: str) -> tuple[Artifact, bool]:
        if not self.resumable and context.out.exists():
            shutil.rmtree(context.out)
        context.out.mkdir(exist_ok=True)
        began = time.monotonic()
        result = self.work(context, **inputs)
        artifact = self._commit(
            context,
            mark,
            version=self.version,
            inputs={name: artifact.fingerprint for name, artifact in inputs.items()},
            settings=context.recipe.subset(self.recipe_fields),
            seconds=round(time.monotonic() - began, 2),
            summary=result.summary,
            metadata=result.metadata,
        )
        return artifact, result.unchanged

    def _commit(self, context: StageContext, mark: str, **facts: Any) -> Artifact:
        return context.store.commit(context.out, context.recipe.name, self.name, mark, **facts)


def stage(version: int, recipe_fields: Iterable[str] = (), **options: Any) -> Callable[[Callable[..., Result]], Stage]:
    """Makes a `Stage` of a function; see there for the arguments."""
    return lambda work: Stage(work, version, recipe_fields, **options)


def artifact_of(store: Store, lineage: Lineage, name: str) -> Artifact:
    """What a stage on the lineage left behind.

    Raises:
        RetuneError: it has been removed from the store since.
    """
    artifact = store.find(lineage["recipe"], name, lineage[name])
    if artifact is None:
        raise RetuneError(
            f"the output of {name} ({lineage[name]}) is no longer whole in {store.uri}",
            f"Clear the task {name} to make it again",
        )
    return artifact


def pinned_recipe(store: Store, lineage: Lineage) -> Recipe:
    """The full recipe of a run, with its revisions pinned, as `resolve` left it."""
    path = artifact_of(store, lineage, "resolve").folder / "recipe.json"
    with store.read_errors():
        return Recipe.model_validate(orjson.loads(path.fs.cat_file(path.path)))
