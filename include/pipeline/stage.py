"""The frame of every stage: inputs with types, fingerprint, reuse, commit."""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import orjson
from filelock import FileLock
from pydantic import ValidationError

from include.errors import RetuneError
from include.paths import var
from include.pipeline.contracts import CONTRACTS, Contract, ResolveOutput
from include.pipeline.records import Lineage, Record, log, recorded
from include.recipe import Recipe, validate_recipe
from include.recipe.view import RecipeView
from include.storage.artifacts import Artifact, Store
from include.storage.files import fingerprint

C = TypeVar("C", bound=Contract)


@dataclass(frozen=True)
class Result(Generic[C]):
    """The result of a stage's work.

    Args:
        summary: one line for people.
        metadata: the stage's contract.
        unchanged: the stage changed nothing, because the result existed already (for `publish`: it is live already).
    """

    summary: str
    metadata: C
    unchanged: bool = False


@dataclass(frozen=True)
class Output(Generic[C]):
    """The committed output of a stage: its artifact, and the metadata as the stage's contract."""

    artifact: Artifact
    contract: type[C]

    @cached_property
    def metadata(self) -> C:
        """Return the metadata.

        Raises:
            RetuneError: the stored metadata does not have the contract's fields.
        """
        try:
            return self.contract.model_validate(self.artifact.manifest.get("metadata", {}))
        except ValidationError as error:
            fields = ", ".join(sorted({".".join(map(str, e["loc"])) for e in error.errors()}))
            raise RetuneError(
                f"{self.folder} was made by another version of Retune: its metadata differs in {fields}",
                "Remove that folder and run again",
            ) from error

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the artifact's manifest."""
        return self.artifact.manifest

    @property
    def fingerprint(self) -> str:
        """Return the artifact's fingerprint."""
        return self.artifact.fingerprint

    @property
    def folder(self) -> Any:
        """Return the artifact's folder in the store."""
        return self.artifact.folder

    def local(self, *names: str, into: Path | None = None) -> Path:
        """Return the folder on this machine's disk with the named files in it; see `Artifact.local`."""
        return self.artifact.local(*names, into=into)

    def files(self, name: str) -> list[Path]:
        """Return the files of a folder that the manifest names, on this machine's disk; see `Artifact.files`."""
        return self.artifact.files(name)


@dataclass
class StageContext:
    """What a stage's function works with, besides its inputs.

    Attributes:
        recipe: the pinned recipe; only the fields that the stage declares can be read.
        run_id: name of the run.
        out: the work folder, on this machine's disk; its files become the artifact.
        record: the run's record of this stage.
    """

    recipe: Recipe
    run_id: str
    store: Store
    out: Path
    record: Record

    def progress(self, line: str) -> None:
        """Log a line and show it to whoever follows the run."""
        self.record.progress(line)


class Stage(Generic[C]):
    """A stage of the pipeline. Called with the lineage so far, it returns the lineage with its own fingerprint.

    `work` is the function that does the stage's work. Its name is the stage's name; `include.pipeline.contracts`
    declares the output under that name. Each parameter after the first has the name of a stage whose output the
    function reads, and is annotated with that stage's contract: `download: Output[DownloadOutput]`.

    Args:
        work: `work(context, **inputs) -> Result`.
        version: increase it when a change of the code changes the output for the same input.
        recipe_fields: fields of the recipe that decide the output; part of the fingerprint.
        other_fields: more fields that the stage may read. They are not part of the fingerprint, because they do not
            change the output (timeouts) or because `external_inputs` covers them.
        external_inputs: `external_inputs(context, **inputs)`, returns JSON values that decide the output and come from
            neither the recipe nor an artifact, for example the live version.
        resumable: keep the work folder of an earlier try, from which the stage can go on.
        reuse: False for a stage that must run each time.
        fingerprint_fn: `fingerprint_fn(context)`, computes the fingerprint directly, for callers that need it before
            the stage runs.

    Raises:
        TypeError: a parameter is not annotated with the output of the stage that it names.
    """

    def __init__(
        self,
        work: Callable[..., Result[C]],
        version: int,
        recipe_fields: Iterable[str] = (),
        other_fields: Iterable[str] = (),
        external_inputs: Callable[..., Any] | None = None,
        resumable: bool = False,
        reuse: bool = True,
        fingerprint_fn: Callable[[StageContext], str] | None = None,
    ):
        self.work, self.version = work, version
        self.recipe_fields, self.other_fields = tuple(recipe_fields), tuple(other_fields)
        self.external_inputs, self.resumable, self.reuse = external_inputs, resumable, reuse
        self.fingerprint_fn = fingerprint_fn
        self.name = work.__name__
        self.__name__, self.__doc__ = work.__name__, work.__doc__
        self.input_stages = input_stages_of(work)

    def __call__(self, lineage: Lineage) -> Lineage:
        """Make the output, or reuse an existing one.

        Args:
            lineage: the lineage up to the stage before this one; `resolve` starts it.
        """
        store = Store()
        with recorded(store, lineage["recipe"], lineage["run"], self.name, lineage) as record:
            inputs = {name: output_of(store, lineage, name) for name in self.input_stages}
            context = StageContext(self.view(pinned_recipe(store, lineage)), lineage["run"], store, Path(), record)
            made = self.run(context, inputs)
        return {**lineage, self.name: made}

    def view(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the declared fields only; reading another one raises `UndeclaredField`."""
        return RecipeView.of(recipe, ("name", *self.recipe_fields, *self.other_fields), f"the stage {self.name}")

    def fingerprint(self, context: StageContext, inputs: dict[str, Output[Any]]) -> str:
        """Return the digest of everything that decides the output; it names the artifact's folder."""
        if self.fingerprint_fn:
            return self.fingerprint_fn(context)
        return fingerprint(
            {
                "stage": self.name,
                "version": self.version,
                "inputs": {name: output.fingerprint for name, output in inputs.items()},
                "recipe": self._settings(context),
                "external": self.external_inputs(context, **inputs) if self.external_inputs else None,
            }
        )

    def _settings(self, context: StageContext) -> dict[str, Any]:
        return context.recipe.subset(self.recipe_fields)

    def run(self, context: StageContext, inputs: dict[str, Output[Any]]) -> str:
        """Reuse or make the output; return its fingerprint. One process of a machine at a time works on one."""
        recipe, key = context.recipe.name, self.fingerprint(context, inputs)
        context.out = var() / "work" / recipe / self.name / key
        context.out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(context.out.with_name(f".{key}.lock")):
            artifact = context.store.find(recipe, self.name, key) if self.reuse else None
            reused = artifact is not None
            if artifact is None:
                artifact, reused = self._make(context, inputs, key)
        summary = artifact.manifest["summary"]
        context.record.close("done", reused=reused, summary=summary, fingerprint=key, folder=str(artifact.folder))
        log.info("%s %s: %s (%s)", self.name, "reused" if reused else "done", summary, artifact.folder)
        return key

    def _make(self, context: StageContext, inputs: dict[str, Output[Any]], key: str) -> tuple[Artifact, bool]:
        if not self.resumable and context.out.exists():
            shutil.rmtree(context.out)
        context.out.mkdir(exist_ok=True)
        began = time.monotonic()
        result = self.work(context, **inputs)
        artifact = self._commit(
            context,
            key,
            version=self.version,
            inputs={name: output.fingerprint for name, output in inputs.items()},
            settings=self._settings(context),
            seconds=round(time.monotonic() - began, 2),
            summary=result.summary,
            metadata=result.metadata.to_json(),
        )
        return artifact, result.unchanged

    def _commit(self, context: StageContext, key: str, **manifest: Any) -> Artifact:
        return context.store.commit(context.out, context.recipe.name, self.name, key, **manifest)


def stage(version: int, **options: Any) -> Callable[[Callable[..., Result[C]]], Stage[C]]:
    """Return a decorator that turns a function into a `Stage`, which documents the arguments."""
    return lambda work: Stage(work, version, **options)


def input_stages_of(work: Callable[..., Any]) -> tuple[str, ...]:
    """Return the stages that a function reads: the names of its parameters after the first."""
    names = tuple(inspect.signature(work).parameters)[1:]
    hints = get_type_hints(work)
    for name in names:
        if name != "names" and get_args(hints.get(name)) != (CONTRACTS.get(name),):
            raise TypeError(f"{work.__qualname__}: annotate {name} as Output[<the contract of the stage {name}>]")
    return names


def find_output(store: Store, recipe: str, stage: str, fingerprint: str) -> Output[Any] | None:
    """Return the committed output of a stage; None where there is none, or it is damaged."""
    artifact = store.find(recipe, stage, fingerprint)
    return Output(artifact, CONTRACTS[stage]) if artifact else None


def output_of(store: Store, lineage: Lineage, stage: str) -> Output[Any]:
    """Return the output of a stage of the lineage.

    Raises:
        RetuneError: it is no longer in the store.
        Damaged: one of its files has changed.
    """
    artifact = store.open(lineage["recipe"], stage, lineage[stage])
    if artifact is None:
        raise RetuneError(
            f"the output of {stage} ({lineage[stage]}) is incomplete in {store.uri}",
            f"Clear the task {stage} to make it again",
        )
    return Output(artifact, CONTRACTS[stage])


def pinned_recipe(store: Store, lineage: Lineage) -> Recipe:
    """Return the full recipe of a run as `resolve` left it, with its revisions pinned.

    Raises:
        RetuneError: its output has been removed from the store since.
        BadRecipe: another version of Retune pinned the recipe, and this one does not have the same fields.
    """
    path = output_of(store, lineage, "resolve").folder / ResolveOutput.RECIPE
    with store.read_errors():
        return validate_recipe(orjson.loads(path.fs.cat_file(path.path)), f"the pinned recipe {path}")
