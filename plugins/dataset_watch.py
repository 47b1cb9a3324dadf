"""The trigger that starts a run of a recipe for each new revision of its dataset. It runs in the triggerer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from include.data.sources import absolute_dataset, dataset_label, pin_dataset
from include.errors import RetuneError
from include.pipeline.outcomes import completed_revisions
from include.recipe import dataset_ref, find_recipe, load_recipe
from include.storage.artifacts import Store
from plugins.credentials import hub_account

EVENTS = "events"  # key in the asset's state: the revision of the last event, how many events it had, and when
MIN_PAUSE, MAX_PAUSE = 30.0, 86_400.0  # seconds between two events for one revision; Airflow starts runs with a delay
_environment_lock = threading.Lock()  # all triggers share the environment, which holds the Hub's account


class NewRevision(BaseEventTrigger):
    """Sends an event for the newest revision of the dataset until a run on it was published, refused or rejected.

    The trigger compares the newest revision with the outcomes in the store, so that it needs no memory of changes: it
    survives restarts and outages, and it repeats a revision whose run failed. It sends no event while a run of the
    recipe is queued or running. Pauses between events for one revision double, up to a day.

    Args:
        recipe: name of the recipe and of its DAG.
        every: seconds between two checks of the dataset.
    """

    def __init__(self, recipe: str, every: float):
        super().__init__()
        self.recipe, self.every = recipe, every

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the arguments from which Airflow creates the trigger again."""
        return "plugins.dataset_watch.NewRevision", {"recipe": self.recipe, "every": self.every}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Check the dataset forever; yield an event while its newest revision has no outcome. Errors are logged."""
        while True:
            try:
                if event := await asyncio.to_thread(self._check):
                    self.log.info("%s: new revision %s, was %s", self.recipe, event["new"], event["old"])
                    yield TriggerEvent(event)
            except RetuneError as error:
                self.log.warning("%s: the dataset could not be checked: %s", self.recipe, error)
            except Exception:  # an exception would end the trigger, and nobody would notice
                self.log.exception("%s: the dataset could not be checked", self.recipe)
            await asyncio.sleep(self.every)

    def _check(self) -> dict[str, Any] | None:
        """Return the event for the newest revision; None if no event is due."""
        with _environment_lock, hub_account():
            recipe = load_recipe(find_recipe(self.recipe))
            new = pin_dataset(dataset_ref(recipe))
        outcomes = completed_revisions(Store(), self.recipe, absolute_dataset(recipe.dataset))
        done = [entry["revision"] for entry in outcomes]
        if new in done or RuntimeTaskInstance.get_dr_count(self.recipe, states=["queued", "running"]):
            return None
        assert self.asset_state_store is not None
        last: Any = self.asset_state_store.get(EVENTS) or {}
        count = last["count"] if last.get("revision") == new else 0
        pause = max(MIN_PAUSE, min(self.every * 2 ** (count - 1), MAX_PAUSE))
        if count and time.time() < last["at"] + pause:
            return None
        self.asset_state_store.set(EVENTS, {"revision": new, "count": count + 1, "at": time.time()})
        return {"dataset": dataset_label(recipe.dataset), "old": done[-1] if done else None, "new": new}
