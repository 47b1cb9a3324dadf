"""The DAG `maintenance`: what no recipe keeps any longer is removed, in the store and on the machines' disks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, CronTriggerTimetable, Param, task

from include.paths import recipe_files
from plugins.credentials import hub_account
from plugins.retry_policy import RETRIES
from tasks.maintenance import maintain_disk, maintain_store

DOC = """### Maintenance

Every night it removes what no run of a recipe has used for `keep_days` (a field of the recipe, by default 30):
artifacts, checkpoints, runs with their reports, unfinished work, caches and logs of headless runs. To see what that
would be, press **Trigger** and switch on `dry_run`: the logs of the tasks list it.

It never removes what is live, what any published version was made of, what a run that has not ended has made, or work
that a process has locked. Where a registry cannot be read, nothing of its recipe is removed, and the log says so.
Folders of recipes that are no more are named in the log and skipped. What was removed is made again when a run needs
it.
"""

_recipes = [file.stem for file in recipe_files()]

with DAG(
    "maintenance",
    description="remove what no recipe keeps any longer; never what is live, published or in use",
    doc_md=DOC,
    params={
        "recipe": Param(
            "", type="string", enum=["", *_recipes], values_display={"": "all"}, title="recipe",
            description_md="Whose artifacts to look at. Caches and logs belong to all of them.",
        ),
        "dry_run": Param(
            False, type="boolean", title="dry_run", description_md="Only say what would be removed, in the logs."
        ),
    },
    # without a start date, and so, it does not run when it is switched on
    schedule=CronTriggerTimetable("30 3 * * *", timezone="UTC", run_immediately=timedelta(0)),
    catchup=False,
    max_active_runs=1,
    tags=["retune"],
    default_args=RETRIES | {"execution_timeout": timedelta(hours=6)},
):  # fmt: skip

    @task(task_id="store", doc_md=maintain_store.__doc__)
    def _store(params: Any = None) -> list[str]:
        with hub_account():
            return maintain_store(**params)

    @task(doc_md=maintain_disk.__doc__)
    def _disk(params: Any = None) -> list[str]:
        return maintain_disk(**params)

    _store()
    _disk.override(task_id="disk")()
    _disk.override(task_id="gpu_disk", queue="gpu")()  # not in the pool: the device is not used
