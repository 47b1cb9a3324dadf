"""One DAG per recipe: from a ShareGPT dataset to a published adapter.

`tasks/stages.py` declares the stages, `tasks/` has their code. This file is the picture: in which order the stages run,
what a sweep adds, and the report and the alerts that follow a failure, too.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, AssetWatcher, CronTriggerTimetable, Param, task, task_group
from airflow.sdk.definitions.param import ParamsDict

from include.errors import RetuneError
from include.recipe import Recipe, form, load_all
from plugins.alerts import Alert, deadline
from plugins.dag_doc import dag_doc
from plugins.dataset_watch import NewRevision
from plugins.retry_policy import RETRIES
from plugins.stage_tasks import CANDIDATE_LABEL, alert_task, report_task, stage_task
from tasks.stages import PipelineStage, longest_try, stages_of

FORCE = Param(
    False, type="boolean", title="force",
    description_md="Run although a run with the same recipe, data and base was finished. Without it, such a run is "
    "skipped within seconds, also a scheduled one.",
)  # fmt: skip


def finetune(recipe: Recipe) -> DAG:
    """Return the DAG of one recipe."""
    with DAG(
        recipe.name,
        description=recipe.description,
        doc_md=dag_doc(recipe),
        schedule=schedule(recipe),
        deadline=deadline(recipe),
        catchup=False,
        max_active_runs=1,
        tags=["retune", recipe.base_model.rsplit("/", 1)[-1]],
        default_args=RETRIES,
    ) as dag:
        resolve, *stages = stages_of(recipe)
        lineage = stage_task(recipe, resolve)(recipe.name)
        if recipe.sweep:
            lineage, stages = sweep(recipe, lineage, stages)
        for stage in stages:
            lineage = stage_task(recipe, stage)(lineage)
        # teardowns also run after a failure. They do not hide it, and their own failure does not fail the run.
        lineage >> report_task(recipe.name).as_teardown() >> alert_task(Alert.settings(recipe)).as_teardown()
    # last: each task would get a copy of the form, and Airflow checks and stores every copy whenever it reads the DAG
    fields = {name: Param(field["value"], section=field["section"], **field["schema"])
              for name, field in form(recipe).items()}  # fmt: skip
    dag.params = ParamsDict({"force": FORCE} | fields)
    return dag


def sweep(recipe: Recipe, lineage: Any, stages: list[PipelineStage]) -> tuple[Any, list[PipelineStage]]:
    """Add the stages up to `choose`, the GPU stages once per candidate; return the lineage and the remaining stages."""
    names = [stage.name for stage in stages]
    first, last = names.index("candidates"), names.index("choose")
    for stage in stages[:first]:
        lineage = stage_task(recipe, stage)(lineage)
    grid = stage_task(recipe, stages[first])(lineage)

    def candidate(lineage: Any) -> Any:
        for stage in stages[first + 1 : last]:
            lineage = stage_task(recipe, stage, map_index_template=CANDIDATE_LABEL)(lineage)
        return lineage

    chosen = stage_task(recipe, stages[last])(grid, task_group(candidate).expand(lineage=grid))
    return chosen, stages[last + 1 :]


def schedule(recipe: Recipe) -> Any:
    """Return the recipe's cron timetable, the watch of its dataset, both, or None for a DAG that people trigger."""
    # without a start date, and so, Airflow does not make up for a time that has passed when the DAG is switched on
    clock = recipe.cron and CronTriggerTimetable(recipe.cron, timezone=recipe.timezone, run_immediately=timedelta(0))
    if not recipe.watch:
        return clock
    watcher = AssetWatcher(name=f"{recipe.name}.watch", trigger=NewRevision(recipe.name, recipe.watch_every))
    dataset = Asset(f"{recipe.name}.dataset", watchers=[watcher])
    return AssetOrTimeSchedule(timetable=clock, assets=[dataset]) if clock else [dataset]


def _dag(dag_id: str, recipe: Recipe | RetuneError) -> DAG:
    """Return the DAG of a recipe. A recipe with an error must not take the DAGs of the others with it."""
    try:
        if isinstance(recipe, RetuneError):
            raise recipe
        longest_try(recipe)  # names the stages of timeout_hours that do not exist
        return finetune(recipe)
    except RetuneError as error:
        return _broken(dag_id, error)


def _broken(dag_id: str, error: RetuneError) -> DAG:
    """Return a DAG that stands for an unreadable recipe and says why it cannot be read."""
    with DAG(dag_id, description=str(error), doc_md=f"**This recipe cannot be read.** {error}", tags=["broken"]) as dag:

        @task(task_id="resolve", retries=0)
        def fail() -> None:
            raise error

        fail()
    return dag


for _dag_id, _recipe in load_all().items():
    globals()[f"dag_{_dag_id}"] = _dag(_dag_id, _recipe)
