"""The pipeline, declared once: its stages in order, with queue, timeout, and where they run.

The DAG of each recipe, the shell command, the report, the timeouts and the table in the documentation derive from
`PIPELINE`. To add a stage, write `tasks/<name>.py` with a function of that name, declare its output in
`include/pipeline/contracts.py`, and add a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from include.base_model import DEMO_BASES
from include.errors import BadRecipe, PermanentError
from include.pipeline.records import Lineage
from include.recipe import Recipe, find_recipe, load_recipe


@dataclass(frozen=True)
class PipelineStage:
    """One stage of the pipeline.

    Attributes:
        name: of the stage, of its task in Airflow, of its module and of the function in it.
        timeout_hours: default hours after which one try is ended; so long that only a hung try reaches it. None: no
            limit, since a person decides.
        summary: one line for the documentation.
        gpu: whether it runs on the queue `gpu` and in the pool `gpu`; otherwise on the queue `default`.
        per_candidate: whether it runs once for each candidate of a sweep.
        shardable: whether CPU workers can share its work (see `include.pipeline.sharding`).
        module: where the function is, if not in the module of the stage's name.
        applies: returns whether a recipe's pipeline has the stage.
    """

    name: str
    timeout_hours: float | None
    summary: str
    gpu: bool = False
    per_candidate: bool = False
    shardable: bool = False
    module: str = ""
    applies: Callable[[Recipe], bool] = lambda recipe: True

    def load(self) -> Any:
        """Return the `Stage`; for resolve, candidates, choose and approve, a plain function."""
        return getattr(importlib.import_module(f"tasks.{self.module or self.name}"), self.name)


def _has_sweep(recipe: Recipe) -> bool:
    return bool(recipe.sweep)


PIPELINE = (
    PipelineStage("resolve", 0.5, "checks the recipe and the values given for this run; pins data and base"),
    PipelineStage(
        "make_base", 2, "makes the base model of a demo; no other recipe has it",
        applies=lambda recipe: recipe.base_model in DEMO_BASES,
    ),
    PipelineStage("download", 6, "fetches the rows, untouched"),
    PipelineStage("validate", 6, "reads every row, repairs what needs no guess, checks it with Great Expectations"),
    PipelineStage(
        "standardize", 6, "compares rows: training or holdout by content, near-duplicates, benchmark prompts",
        shardable=True,
    ),
    PipelineStage("template", 6, "renders the chat template once, to token ids and loss masks", shardable=True),
    PipelineStage(
        "candidates", 0.5, "pins one recipe for each combination of a sweep", module="sweep", applies=_has_sweep
    ),
    PipelineStage(
        "train", 72, "trains the adapter in a process of its own, with checkpoints", gpu=True, per_candidate=True
    ),
    PipelineStage(
        "smoke_test", 2, "loads the saved adapter and checks its answers to the prompts", gpu=True, per_candidate=True
    ),
    PipelineStage(
        "evaluate", 6, "compares the holdout losses of base, candidate and live adapter; the gate's verdict", gpu=True,
        per_candidate=True,
    ),
    PipelineStage("choose", 0.5, "takes the best candidate of a sweep", module="sweep", applies=_has_sweep),
    PipelineStage("approve", None, "asks a person, if the recipe says so"),
    PipelineStage("publish", 6, "publishes one version to the registry, with model card and manifest"),
    PipelineStage("verify", 4, "fetches the published version and compares it with the tested adapter"),
)  # fmt: skip
STAGES = {stage.name: stage for stage in PIPELINE}
NAMES = tuple(STAGES)


def stages_of(recipe: Recipe) -> tuple[PipelineStage, ...]:
    """Return the stages of a recipe's pipeline, in order."""
    return tuple(stage for stage in PIPELINE if stage.applies(recipe))


def timeout_of(recipe: Recipe, stage: PipelineStage) -> timedelta | None:
    """Return the time after which one try of a stage is ended; None for a stage without a limit.

    Raises:
        BadRecipe: `timeout_hours` names a stage that does not exist, or has no limit.
    """
    limited = [one.name for one in PIPELINE if one.timeout_hours is not None]
    if unknown := set(recipe.timeout_hours) - set(limited):
        raise BadRecipe(
            f"{recipe.name}: field 'timeout_hours': there is no stage '{min(unknown)}' with a time limit",
            f"Use one of: {', '.join(limited)}",
        )
    hours = recipe.timeout_hours.get(stage.name, stage.timeout_hours)
    return None if hours is None else timedelta(hours=hours)


def longest_try(recipe: Recipe) -> timedelta:
    """Return the longest time that one try of any stage can take."""
    return max(limit for stage in PIPELINE if (limit := timeout_of(recipe, stage)))


def run_stages(recipe_name: str, values: dict[str, Any], run_id: str, until: str = NAMES[-1]) -> Lineage:
    """Run a recipe's stages one after another in this process, without Airflow; return the lineage.

    Args:
        recipe_name: name or path of the recipe.
        values: fields in place of the file's.
        until: the last stage to run.

    Raises:
        RetuneError: a stage failed.
    """
    names = NAMES[: NAMES.index(until) + 1]
    lineages = [STAGES["resolve"].load()(recipe_name, values, run_id, to_publish="publish" in names)]
    grid: list[Lineage] = []
    for stage in stages_of(load_recipe(find_recipe(recipe_name), values))[1:]:
        if stage.name not in names:
            break
        if stage.name == "candidates":
            lineages = grid = stage.load()(lineages[0])
        elif stage.name == "choose":
            lineages = [stage.load()(grid, lineages)]
        else:
            lineages = list(_after(stage.load(), lineages))
    return lineages[0] if lineages else STAGES["choose"].load()(grid, lineages)


def _after(stage: Callable[[Lineage], Lineage], lineages: list[Lineage]) -> Iterator[Lineage]:
    """Yield the lineages after a stage. A failed candidate of a sweep does not end the others."""
    for lineage in lineages:
        try:
            yield stage(lineage)
        except PermanentError:  # any other error ends the run; a new run continues from there
            if "candidate" not in lineage:
                raise
