"""The trigger that starts a recipe's run when its dataset has a new revision. It lives in the triggerer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from include.data.sources import absolute_source, pin_dataset
from include.errors import RetuneError
from include.pipeline.outcomes import completed_revisions
from include.recipe import dataset_ref, find_recipe, load_recipe
from include.storage.artifacts import Store
from plugins.credentials import hub_account

FIRED = "fired"  # key in the asset's state: the revision that was last fired for, how often, and when
SHORTEST_PAUSE, LONGEST_PAUSE = 30.0, 86_400.0  # seconds between two runs for a revision; an event is no run at once
_one_look_at_a_time = threading.Lock()  # the Hub's account stands in the environment, which all triggers share


class NewRevision(BaseEventTrigger):
    """Fires for a revision of the dataset until a run of it has been published or refused.

    It looks at what is so, and does not count on having seen it change: a revision without an outcome in the store is
    fired for, unless a run of the recipe is waiting or going on. So it stays true to its word over restarts, over a
    time in which nobody looked, and after a run that failed; one that keeps failing is tried again after pauses that
    double, up to a day.

    Args:
        recipe: its name, which is the DAG's, too.
        every: seconds between two looks.
    """

    def __init__(self, recipe: str, every: float):
        super().__init__()
        self.recipe, self.every = recipe, every

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See `BaseTrigger`."""
        return "plugins.dataset_watch.NewRevision", {"recipe": self.recipe, "every": self.every}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, fire, wait, for ever; what goes wrong is logged, and the next look may go well."""
        while True:
            try:
                if event := await asyncio.to_thread(self._look):
                    self.log.info("%s: new revision %s, was %s", self.recipe, event["new"], event["old"])
                    yield TriggerEvent(event)
            except RetuneError as error:
                self.log.warning("%s: the dataset was not seen: %s", self.recipe, error)
            except Exception:  # a watch that ended would not be missed until somebody wonders
                self.log.exception("%s: the dataset was not seen", self.recipe)
            await asyncio.sleep(self.every)

    def _look(self) -> dict[str, Any] | None:
        with _one_look_at_a_time, hub_account():
            recipe = load_recipe(find_recipe(self.recipe))
            new = pin_dataset(dataset_ref(recipe))
        outcomes = completed_revisions(Store(), self.recipe, absolute_source(recipe.dataset))
        done = [entry["revision"] for entry in outcomes]
        if new in done or RuntimeTaskInstance.get_dr_count(self.recipe, states=["queued", "running"]):
            return None
        assert self.asset_state_store is not None
        fired: Any = self.asset_state_store.get(FIRED) or {}
        times = fired["times"] if fired.get("revision") == new else 0
        pause = max(SHORTEST_PAUSE, min(self.every * 2 ** (times - 1), LONGEST_PAUSE))
        if times and time.time() < fired["at"] + pause:
            return None
        self.asset_state_store.set(FIRED, {"revision": new, "times": times + 1, "at": time.time()})
        return {"dataset": recipe.dataset, "old": done[-1] if done else None, "new": new}
