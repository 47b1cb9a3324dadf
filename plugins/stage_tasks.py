"""The stages of `tasks/stages.py` as Airflow tasks: queue, pool, timeout, the Hub's account, metrics."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from airflow.sdk import task, task_group
from airflow.sdk.exceptions import AirflowSkipException

from include.errors import UpToDate
from include.pipeline.sharding import Sharded, Step
from include.pipeline.stage import Stage
from include.recipe import Recipe
from plugins import metrics
from plugins.alerts import SUMMARY, TASK_RETRIES, Alert
from plugins.approval import Approval
from plugins.credentials import hub_account
from plugins.links import NOTE
from tasks.report import note, report
from tasks.stages import PipelineStage, timeout_of

CANDIDATE_LABEL = "{{ task.op_args[0].candidate }}"  # shown in the UI instead of the map index
SHARD_LABEL = "{{ task.op_kwargs.shard.label }}"
GPU = {"queue": "gpu", "pool": "gpu"}  # the pool has one slot: two trainings never share a device


def stage_task(recipe: Recipe, stage: PipelineStage, **options: Any) -> Callable[..., Any]:
    """Return a function that adds the task of a stage to the current DAG; it takes and returns the lineage.

    `resolve` takes the recipe's name. `choose` takes the grid of candidates and their lineages.
    """
    options = {"execution_timeout": timeout_of(recipe, stage), **(GPU if stage.gpu else {}), **options}
    if stage.name == "approve":
        return lambda lineage: Approval(task_id=stage.name, lineage=lineage).output
    if stage.name in FUNCTION_TASKS:
        return FUNCTION_TASKS[stage.name](stage.load(), task_id=stage.name, doc_md=stage.load().__doc__, **options)
    if stage.shardable and recipe.shard_rows:
        return _sharded(stage.load(), **options)
    return _single(stage.load(), **options)


def _single(stage: Stage[Any], **options: Any) -> Callable[..., Any]:
    @task(task_id=stage.name, doc_md=stage.__doc__, **options)
    def run(lineage: Any):  # no return annotation: Airflow would push each key of the lineage as a value of its own
        with hub_account():
            lineage = stage(lineage)
        metrics.stage_done(stage.name, lineage)
        return lineage

    return run


def _sharded(stage: Sharded[Any], **options: Any) -> Callable[..., Any]:
    """Return a task group that all workers share: one task per step, mapped over shards if the step runs for files."""
    # without shards (the output exists), Airflow skips the mapped tasks; with this rule, the later tasks still run
    after = {"trigger_rule": "none_failed_min_one_success", **options}

    @task(task_id="plan", doc_md=stage.plan.__doc__, **options)
    def plan(lineage: Any):
        with hub_account():
            return stage.plan(lineage)

    @task(task_id="finish", doc_md=stage.finish.__doc__, **after)
    def finish(lineage: Any):
        with hub_account():
            lineage = stage.finish(lineage)
        metrics.stage_done(stage.name, lineage)
        return lineage

    def step_task(step: Step, **own: Any) -> Any:
        @task(task_id=step.name, doc_md=step.__doc__, **own)
        def run(lineage: Any, shard: Any = None) -> None:
            with hub_account():
                stage.run_step(lineage, step, shard)

        return run

    @task_group(group_id=stage.name, tooltip=f"{stage.name}, shared by all workers of the queue")
    def steps(lineage: Any) -> Any:
        last = shards = plan(lineage)
        for step in stage.steps[len(stage.leading_steps) :]:
            if step.mapped:
                mapped = step_task(step, map_index_template=SHARD_LABEL, **options)
                done = mapped.partial(lineage=lineage).expand(shard=shards)
            else:
                done = step_task(step, **after)(lineage)
            last >> done
            last = done
        end = finish(lineage)
        last >> end
        return end

    return steps


def _resolve(resolve: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    @task(**options)
    def run(name: str, params: Any = None, run_id: Any = None, triggering_asset_events: Any = None):
        values = dict(params)
        force = values.pop("force")
        events = [event for events in (triggering_asset_events or {}).values() for event in events]
        revision = max(events, key=lambda event: event.timestamp).extra["payload"]["new"] if events else None
        try:
            with hub_account():
                return resolve(name, values, run_id, revision=revision, force=force)
        except UpToDate as up_to_date:
            raise AirflowSkipException(str(up_to_date)) from None

    return run


def _candidates(candidates: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    @task(**options)
    def run(lineage: Any):
        return candidates(lineage)

    return run


def _choose(choose: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # runs if only `candidates` succeeded: `choose` reports failed candidates, even if all of them failed
    @task(trigger_rule="all_done_min_one_success", **options)
    def run(grid: Any, lineages: Any):
        # if a mapped task has a single XCom, Airflow passes it without a list; if it has none, None
        return choose(list(grid), [lineages] if isinstance(lineages, dict) else lineages or [])

    return run


# stages that are plain functions, not a `Stage`
FUNCTION_TASKS: dict[str, Callable[..., Any]] = {"resolve": _resolve, "candidates": _candidates, "choose": _choose}


@task(task_id="report", doc_md=report.__doc__, retries=1)
def report_task(name: str, run_id: Any = None, ti: Any = None) -> str:
    """Make the report of the run, its note and its metrics."""
    summary = report(name, run_id)
    ti.xcom_push(key=NOTE, value=note(summary))
    ti.xcom_push(key=SUMMARY, value=summary)
    metrics.run_ended(summary)
    return summary["report"]


@task(task_id="alert", doc_md=Alert.__doc__, retries=TASK_RETRIES, execution_timeout=timedelta(minutes=15))
def alert_task(settings: dict[str, Any], **context: Any) -> None:
    """Notify the recipients in the recipe."""
    Alert(**settings).notify(context)
