"""What became of a recipe on a revision, as the watch and the cron look at it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from include.errors import NothingNew
from include.outcomes import outcome, settle, settled
from include.stage import frozen_recipe
from include.store import Store
from tasks.resolve import resolve


def test_values_that_were_typed_do_not_settle_a_revision_until_they_are_the_files_own(small_recipe: Callable) -> None:
    recipe, store = small_recipe(), Store()
    typed = frozen_recipe(store, resolve(recipe.stem, {"max_steps": 3}, "typed"))
    settle(store, typed, "refused", run="typed", version=None, own=False)
    assert settled(store, "small", typed.dataset) == [], "the file's own values have not been tried on it"
    assert resolve(recipe.stem, {}, "own", force=False)["recipe"] == "small"

    small_recipe(max_steps=3)
    with pytest.raises(NothingNew, match="are those of the run typed, whose candidate was refused"):
        resolve(recipe.stem, {}, "again", force=False)
    assert [entry["revision"] for entry in settled(store, "small", typed.dataset)] == [typed.dataset_revision]
    settle(store, typed, "refused", run="typed again", version=None, own=False)
    assert outcome(store, typed)["own"], "what the file said once stays tried"


def test_alerts_and_times_are_no_news(small_recipe: Callable) -> None:
    recipe, store = small_recipe(), Store()
    frozen = frozen_recipe(store, resolve(recipe.stem, {}, "first"))
    settle(store, frozen, "published", run="first", version="v1", own=True)
    small_recipe(alert_mail=["ann@example.com"], cron="@daily", keep_days=3)
    with pytest.raises(NothingNew, match="published as v1"):
        resolve(recipe.stem, {}, "second", force=False)
