"""`retune report`: a run's summary, found by the recipe and the run's id."""

from __future__ import annotations

from typing import Any

from include.errors import NotFound
from include.recipe import find_recipe
from include.storage.artifacts import Store
from include.storage.object_store import list_dir


def find_run(recipe: str, run_id: str | None = None) -> dict[str, Any]:
    """Return the summary of a run that has ended: `run`, `verdict`, `version`, `report` and more.

    Args:
        recipe: name of a recipe, or path of a recipe file.
        run_id: the run's id; None for the run that ended last.

    Raises:
        NotFound: there is no such recipe or run, or it has not ended.
        NoPermission, Unreachable: the store cannot be read, or does not answer.
    """
    store, name = Store(), find_recipe(recipe).stem
    if run_id is not None:
        records = store.read_records(name, run_id)
        if "run" in records:
            return records["run"]
        if records:
            raise NotFound(f"the run {run_id} of {name} has no report yet", "Wait until it ends")
    with store.read_errors():
        folders = list(list_dir(store.path(name, "runs")))
    summaries = [records["run"] for folder in folders if "run" in (records := store.read_records(name, folder))]
    if run_id is not None:
        known = ", ".join(sorted(summary["run"] for summary in summaries)) or "none"
        raise NotFound(f"{name} has no run {run_id}", f"Runs that have ended: {known}")
    if not summaries:
        raise NotFound(f"no run of {name} has ended in {store.uri}", f"Start one: make run RECIPE={name}")
    return max(summaries, key=lambda summary: summary["finished_at"])
