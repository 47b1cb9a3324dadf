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

from include.errors import NothingNew, RetuneError, TransientError
from include.objects import object_errors
from include.recipe import Recipe
from include.settings import var
from include.store import SETTING, Artifact, Store, fingerprint, now

log = logging.getLogger("airflow.task.retune")  # below Airflow's own task logger, so that the UI shows it

# recipe, run, and the fingerprint of each stage so far: all that goes from task to task; in a sweep, which candidate
Trail = dict[str, str]


@dataclass
class Result:
    """What a stage has to say: one line for people, and facts (plain JSON values) for later stages."""

    line: str
    facts: dict[str, Any] = field(default_factory=dict)
    unchanged: bool = False  # the stage looked, and everything was as it should be already


@dataclass
class Job:
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
            "line": "",
        }
        if candidate is not None:
            self.content["candidate"] = candidate
        self._write()

    def say(self, line: str) -> None:
        """A line while the work goes on. Hours of work do not end because a store did not take it."""
        log.info("%s", line)
        self.content["line"] = line
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
            self._store.record(self._recipe, self._run_id, self._name, self.content)


@contextmanager
def recorded(
    store: Store, recipe: str, run_id: str, stage: str, trail: Trail | None = None, part: str = ""
) -> Iterator[Record]:
    """Keeps the run's record of a stage, also of its failure, and logs the failure in one line.

    Args:
        trail: needed for a sweep's candidates only, whose records have names of their own (see `record_name`).
        part: which part of the stage's work this is, where it is not all of it; then only a failure is recorded.
    """
    record, trail = None, trail or {}
    try:
        name = record_name(stage, trail)
        record = Record(store, recipe, run_id, stage, name, trail.get("candidate"), quiet=bool(part))
        with object_errors(f"the store {store.uri}", SETTING):
            yield record
    except NothingNew as error:
        if record:
            record.close("skipped", line=error.what)
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
                record.close("failed", line=what, error={"kind": type(error).__name__, "what": what, "do": do})
        log.error("%s failed: %s. %s.", stage, what, do)
        raise


def record_name(stage: str, trail: Trail) -> str:
    """The stage's name; in a sweep with the candidate's frozen recipe, since candidates share the run's folder."""
    return f"{stage}.{trail['resolve']}" if "candidate" in trail else stage


class Stage:
    """A stage of the pipeline: called with the trail of the stages before it, it returns the trail with its own step.

    Args:
        work: `work(job, **artifacts) -> Result`; the names of its parameters are the stages that it reads.
        version: raised by hand when the code gives another output for the same input.
        uses: the fields of the recipe that decide the output.
        facts: `facts(job, **artifacts)`, what else decides the output (say, what is live now), as JSON values.
        resumable: keep the unfinished work folder of an earlier try, since the stage can go on from it.
        reuse: False for a stage that must look at the world each time.
        named_by: `named_by(job)`, the fingerprint itself, where others must know it without asking the stage.
    """

    def __init__(
        self,
        work: Callable[..., Result],
        version: int,
        uses: Iterable[str],
        facts: Callable[..., Any] | None = None,
        resumable: bool = False,
        reuse: bool = True,
        named_by: Callable[[Job], str] | None = None,
    ):
        self.work, self.version, self.uses = work, version, tuple(uses)
        self.facts, self.resumable, self.reuse, self.named_by = facts, resumable, reuse, named_by
        self.name = work.__name__
        self.__name__, self.__doc__ = work.__name__, work.__doc__
        self.reads = tuple(inspect.signature(work).parameters)[1:]

    def __call__(self, trail: Trail) -> Trail:
        """Make the artifact, or find it made.

        Args:
            trail: what the stages before this one returned; `resolve` begins it.
        """
        store = Store()
        with recorded(store, trail["recipe"], trail["run"], self.name, trail) as record:
            recipe = frozen_recipe(store, trail)
            inputs = {name: artifact_of(store, trail, name) for name in self.reads}
            mark = self.run(Job(recipe, trail["run"], store, Path(), record), inputs)
        return {**trail, self.name: mark}

    def fingerprint(self, job: Job, inputs: dict[str, Artifact]) -> str:
        """What decides the output, as the name of its folder."""
        if self.named_by:
            return self.named_by(job)
        return fingerprint(
            {
                "stage": self.name,
                "version": self.version,
                "inputs": {name: artifact.fingerprint for name, artifact in inputs.items()},
                "recipe": job.recipe.part(self.uses),
                "facts": self.facts(job, **inputs) if self.facts else None,
            }
        )

    def run(self, job: Job, inputs: dict[str, Artifact]) -> str:
        """Reuse or make the artifact; returns its fingerprint. One process of a machine at a time works on one."""
        recipe, mark = job.recipe.name, self.fingerprint(job, inputs)
        job.out = var() / "work" / recipe / self.name / mark
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(job.out.with_name(f".{mark}.lock")):
            artifact = job.store.find(recipe, self.name, mark) if self.reuse else None
            reused = artifact is not None
            if artifact is None:
                artifact, reused = self._make(job, inputs, mark)
        line = artifact.manifest["line"]
        job.record.close("done", reused=reused, line=line, fingerprint=mark, folder=str(artifact.folder))
        log.info("%s %s: %s (%s)", self.name, "reused" if reused else "done", line, artifact.folder)
        return mark

    def _make(self, job: Job, inputs: dict[str, Artifact], mark: str) -> tuple[Artifact, bool]:
        if not self.resumable and job.out.exists():
            shutil.rmtree(job.out)
        job.out.mkdir(exist_ok=True)
        began = time.monotonic()
        result = self.work(job, **inputs)
        artifact = self._commit(
            job,
            mark,
            version=self.version,
            inputs={name: artifact.fingerprint for name, artifact in inputs.items()},
            settings=job.recipe.part(self.uses),
            seconds=round(time.monotonic() - began, 2),
            line=result.line,
            facts=result.facts,
        )
        return artifact, result.unchanged

    def _commit(self, job: Job, mark: str, **facts: Any) -> Artifact:
        return job.store.commit(job.out, job.recipe.name, self.name, mark, **facts)


def stage(version: int, uses: Iterable[str] = (), **options: Any) -> Callable[[Callable[..., Result]], Stage]:
    """Makes a `Stage` of a function; see there for the arguments."""
    return lambda work: Stage(work, version, uses, **options)


def artifact_of(store: Store, trail: Trail, name: str) -> Artifact:
    """What a stage on the trail left behind.

    Raises:
        RetuneError: it has been removed from the store since.
    """
    artifact = store.find(trail["recipe"], name, trail[name])
    if artifact is None:
        raise RetuneError(
            f"the output of {name} ({trail[name]}) is no longer whole in {store.uri}",
            f"Clear the task {name} to make it again",
        )
    return artifact


def frozen_recipe(store: Store, trail: Trail) -> Recipe:
    """The full recipe of a run, with its revisions pinned, as `resolve` left it."""
    path = artifact_of(store, trail, "resolve").folder / "recipe.json"
    with store.reading():
        return Recipe.model_validate(orjson.loads(path.fs.cat_file(path.path)))
