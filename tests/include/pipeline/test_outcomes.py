"""What became of a recipe on a revision, as the watch and the cron look at it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from include.errors import UpToDate
from include.pipeline.outcomes import completed_revisions, find_outcome, record_outcome
from include.pipeline.stage import pinned_recipe
from include.storage.artifacts import Store
from tasks.resolve import resolve


def test_values_that_were_typed_do_not_settle_a_revision_until_they_are_the_files_own(small_recipe: Callable) -> None:
    recipe, store = small_recipe(), Store()
    typed = pinned_recipe(store, resolve(recipe.stem, {"max_steps": 3}, "typed"))
    record_outcome(store, typed, "refused", run="typed", version=None, from_recipe_file=False)
    assert completed_revisions(store, "small", typed.dataset) == [], "the file's own values have not been tried on it"
    assert resolve(recipe.stem, {}, "from_recipe_file", force=False)["recipe"] == "small"

    small_recipe(max_steps=3)
    with pytest.raises(UpToDate, match="are those of the run typed, whose candidate was refused"):
        resolve(recipe.stem, {}, "again", force=False)
    assert [entry["revision"] for entry in completed_revisions(store, "small", typed.dataset)] == [
        typed.dataset_revision
    ]
    record_outcome(store, typed, "refused", run="typed again", version=None, from_recipe_file=False)
    assert find_outcome(store, typed)["from_recipe_file"], "what the file said once stays tried"


def test_alerts_and_times_are_no_news(small_recipe: Callable) -> None:
    recipe, store = small_recipe(), Store()
    pinned = pinned_recipe(store, resolve(recipe.stem, {}, "first"))
    record_outcome(store, pinned, "published", run="first", version="v1", from_recipe_file=True)
    small_recipe(alert_mail=["ann@example.com"], cron="@daily", keep_days=3)
    with pytest.raises(UpToDate, match="published as v1"):
        resolve(recipe.stem, {}, "second", force=False)
