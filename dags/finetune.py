"""One DAG per recipe: from a ShareGPT dataset to a published adapter.

Everything that a stage does is in `tasks/`; this file is the picture of the pipeline and Airflow's part in it: queues,
the one-slot pool of the GPU, the trigger form.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, AssetWatcher, CronTriggerTimetable, Param, task, task_group
from airflow.sdk.exceptions import AirflowSkipException

from include.base_model import DEMO_BASE
from include.errors import RetuneError, UpToDate
from include.paths import recipe_files
from include.pipeline.sharding import Sharded, Step
from include.pipeline.stage import Stage
from include.recipe import TIMEOUT_HOURS, Recipe, form, load_recipe
from include.registry import registry_uri
from plugins import metrics
from plugins.alerts import SUMMARY, TASK_RETRIES, Alert, deadline
from plugins.approval import Approval
from plugins.credentials import hub_account
from plugins.dataset_watch import NewRevision
from plugins.links import NOTE
from plugins.retry_policy import RETRIES
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.pretrain import pretrain
from tasks.publish import publish
from tasks.report import note, report
from tasks.resolve import resolve
from tasks.smoke_test import smoke_test
from tasks.standardize import standardize
from tasks.sweep import candidates, choose
from tasks.template import template
from tasks.train import train
from tasks.validate import validate
from tasks.verify import verify

FORCE = Param(
    False, type="boolean", title="force",
    description_md="Run although recipe, data and base are those of a run that came to its end. Without it, such a run "
    "is skipped within seconds, also when the clock starts it.",
)  # fmt: skip
LABEL = "{{ task.op_args[0].candidate }}"  # what the UI shows of a sweep's candidate, in place of a number
SHARD = "{{ task.op_kwargs.shard.label }}"  # and of a shard
GPU = {"queue": "gpu", "pool": "gpu"}  # the pool has one slot: two trainings never share a device


def finetune(recipe: Recipe) -> DAG:
    """The DAG of one recipe."""
    with DAG(
        recipe.name,
        description=recipe.description,
        doc_md=_doc(recipe),
        params={"force": FORCE} | {name: Param(field["value"], section=field["section"], **field["schema"])
                                   for name, field in form(recipe).items()},
        schedule=when(recipe),
        deadline=deadline(recipe),
        catchup=False,
        max_active_runs=1,
        tags=["retune", recipe.base_model.rsplit("/", 1)[-1]],
        default_args=RETRIES,
    ) as dag:  # fmt: skip

        def on(stage: Stage, **where: Any) -> Callable[..., Any]:
            return as_task(stage, execution_timeout=hours(recipe, stage.name), **where)

        gpu = GPU | ({"map_index_template": LABEL} if recipe.sweep else {})

        def candidate(lineage: Any) -> Any:
            adapter = on(train, **gpu)(lineage)
            answers = on(smoke_test, **gpu)(adapter)
            return on(evaluate, **gpu)(answers)

        short = hours(recipe, "resolve")
        pinned = _resolve.override(execution_timeout=short)(recipe.name)
        raw = on(download)(pinned)
        good = on(validate)(raw)
        shared = in_shards if recipe.shard_rows else as_task
        messages = shared(standardize, execution_timeout=hours(recipe, "standardize"))(good)
        tokens = shared(template, execution_timeout=hours(recipe, "template"))(messages)
        if recipe.sweep:
            grid = _candidates.override(execution_timeout=short)(tokens)
            verdict = _choose.override(execution_timeout=short)(grid, task_group(candidate).expand(lineage=grid))
        else:
            verdict = candidate(tokens)
        approved = Approval(task_id="approve", lineage=verdict)
        version = on(publish)(approved.output)
        proof = on(verify)(version)
        if recipe.base_model == DEMO_BASE:
            pinned >> on(pretrain)(pinned) >> good  # the first that may look at the base: at its chat template
        # teardowns run after a failure, too, and neither hide it nor make one of the run
        proof >> _report(recipe.name).as_teardown() >> _alert(Alert.settings(recipe)).as_teardown()
    return dag


def when(recipe: Recipe) -> Any:
    """Cron, new revisions of the dataset, both, or only when a person says so."""
    # without a start date, and so, Airflow does not make up for a time that has passed when the DAG is switched on
    clock = recipe.cron and CronTriggerTimetable(recipe.cron, timezone=recipe.timezone, run_immediately=timedelta(0))
    if not recipe.watch:
        return clock
    watcher = AssetWatcher(name=f"{recipe.name}.watch", trigger=NewRevision(recipe.name, recipe.watch_every))
    dataset = Asset(f"{recipe.name}.dataset", watchers=[watcher])
    return AssetOrTimeSchedule(timetable=clock, assets=[dataset]) if clock else [dataset]


def hours(recipe: Recipe, stage: str) -> timedelta:
    """After how long a try of a stage is ended."""
    return timedelta(hours=(TIMEOUT_HOURS | recipe.timeout_hours)[stage])


def as_task(stage: Stage, **options: Any) -> Callable[..., Any]:
    """A stage as a task."""

    @task(task_id=stage.name, doc_md=stage.__doc__, **options)
    def run(lineage: Any):  # no return annotation: Airflow would push each key of the lineage as a value of its own
        with hub_account():
            lineage = stage(lineage)
        metrics.stage_done(stage.name, lineage)
        return lineage

    return run


def in_shards(stage: Sharded, **options: Any) -> Callable[..., Any]:
    """A stage as a group of tasks that all workers share: its steps, those for files mapped over shards."""
    # a plan without shards (all is there already) skips the mapped tasks, and not those after them
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

    def as_step(step: Step, **own: Any) -> Any:
        @task(task_id=step.name, doc_md=step.__doc__, **own)
        def run(lineage: Any, shard: Any = None) -> None:
            with hub_account():
                stage.do(lineage, step, shard)

        return run

    @task_group(group_id=stage.name, tooltip=f"{stage.name}, shared by all workers of the queue")
    def steps(lineage: Any) -> Any:
        last = shards = plan(lineage)
        for step in stage.steps[len(stage.ahead) :]:
            if step.mapped:
                done = as_step(step, map_index_template=SHARD, **options).partial(lineage=lineage).expand(shard=shards)
            else:
                done = as_step(step, **after)(lineage)
            last >> done
            last = done
        end = finish(lineage)
        last >> end
        return end

    return steps


@task(task_id="resolve", doc_md=resolve.__doc__)
def _resolve(name: str, params: Any = None, run_id: Any = None, triggering_asset_events: Any = None):
    values = dict(params)
    force = values.pop("force")
    events = [event for events in (triggering_asset_events or {}).values() for event in events]
    revision = max(events, key=lambda event: event.timestamp).extra["payload"]["new"] if events else None
    try:
        with hub_account():
            return resolve(name, values, run_id, revision=revision, force=force)
    except UpToDate as nothing:
        raise AirflowSkipException(str(nothing)) from None


@task(task_id="candidates", doc_md=candidates.__doc__)
def _candidates(lineage: Any):
    return candidates(lineage)


# a grid is enough: candidates that failed, even all of them, are the function's to tell of
@task(task_id="choose", doc_md=choose.__doc__, trigger_rule="all_done_min_one_success")
def _choose(grid: Any, lineages: Any):
    # Airflow hands over one XCom of a mapped task as it is, without a list, and none as None
    return choose(list(grid), [lineages] if isinstance(lineages, dict) else lineages or [])


@task(task_id="report", doc_md=report.__doc__, retries=1)
def _report(name: str, run_id: Any = None, ti: Any = None) -> str:
    summary = report(name, run_id)
    ti.xcom_push(key=NOTE, value=note(summary))
    ti.xcom_push(key=SUMMARY, value=summary)
    metrics.run_ended(summary)
    return summary["report"]


@task(task_id="alert", doc_md=Alert.__doc__, retries=TASK_RETRIES, execution_timeout=timedelta(minutes=15))
def _alert(settings: dict[str, Any], **context: Any) -> None:
    Alert(**settings).notify(context)


_APPROVAL = {
    "always": "a person must approve each candidate that the gate lets through",
    "on_regression": "a person must approve a candidate of which something is worse",
    "never": "none: the gate decides alone",
}


def _doc(recipe: Recipe) -> str:
    base = f"{4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else 16}-bit base"
    trained = f"r={recipe.r}, alpha={recipe.lora_alpha}, {len(recipe.target_modules)} projections, {base}"
    if recipe.full_finetuning:
        trained = "none: the whole model is trained"
    length = f"{recipe.max_steps} steps" if recipe.max_steps > 0 else f"{recipe.num_train_epochs:g} epochs"
    return f"""### {recipe.name}

{recipe.description}

| | |
|---|---|
| data | `{recipe.dataset}`, {recipe.holdout_share:.0%} held out, at most {recipe.max_refused_share:.0%} refused |
| base | `{recipe.base_model}`, template {recipe.chat_template}, at most {recipe.max_seq_length:,} tokens |
| adapter | {trained} |
| training | {recipe.method}, {length} of {recipe.per_device_train_batch_size} x {recipe.gradient_accumulation_steps}, \
lr {recipe.learning_rate:g} |{_sweep(recipe)}
| gate | better than the base and than what is live; {len(recipe.prompts)} smoke-test prompts |
| approval | {_APPROVAL[recipe.approve]} |
| runs | {_times(recipe)} |
| registry | `{registry_uri(recipe.name, recipe.registry)}` |

Press **Trigger** to run it, with other values if you like. A value given there holds for that run only.
"""


def _sweep(recipe: Recipe) -> str:
    grid = " x ".join(f"{name} {values}" for name, values in recipe.sweep.items())
    return f"\n| sweep | {grid}: the best of {len(recipe.candidates())} goes on |" if grid else ""


def _times(recipe: Recipe) -> str:
    times = [f"at `{recipe.cron}` ({recipe.timezone}), skipped when nothing is new"] if recipe.cron else []
    times += [f"on each new revision of the dataset, looked for every {recipe.watch_every:g} s"] if recipe.watch else []
    return "; ".join([*times, "when somebody presses **Trigger**"])


def _broken(file: Path, error: RetuneError) -> DAG:
    """Stands where the DAG of an unreadable recipe would stand, and says why; the other recipes go on."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in file.stem)
    with DAG(name, description=str(error), doc_md=f"**This recipe cannot be read.** {error}", tags=["broken"]) as dag:

        @task(task_id="resolve", retries=0)
        def fail() -> None:
            load_recipe(file)

        fail()
    return dag


for _file in recipe_files():
    try:
        _dag = finetune(load_recipe(_file))
    except RetuneError as _error:
        _dag = _broken(_file, _error)
    globals()[f"dag_{_dag.dag_id}"] = _dag
