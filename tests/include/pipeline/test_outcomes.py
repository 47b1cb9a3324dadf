"""Outcomes: which runs are final, and when a revision counts as completed for the dataset watch and for cron."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from include.errors import GateRefused, Rejected, Unreachable, UpToDate
from include.pipeline.outcomes import FOLDER, completed_revisions, find_outcome, record_outcome
from include.pipeline.records import recorded
from include.pipeline.stage import pinned_recipe
from include.storage.artifacts import Store
from include.storage.files import atomic_write, to_json
from tasks.report import report
from tasks.resolve import resolve


def test_a_run_with_overrides_completes_a_revision_once_the_file_has_those_values(
    small_recipe: Callable,
) -> None:
    recipe, store = small_recipe(), Store()
    typed = pinned_recipe(store, resolve(recipe.stem, {"max_steps": 3}, "typed"))
    record_outcome(store, typed, "refused", run="typed", version=None, from_recipe_file=False)
    assert completed_revisions(store, "small", typed.dataset) == [], "no run had the values of the recipe file"
    assert resolve(recipe.stem, {}, "from_recipe_file", force=False)["recipe"] == "small"

    small_recipe(max_steps=3)
    with pytest.raises(UpToDate, match="are those of the run typed, whose candidate was refused"):
        resolve(recipe.stem, {}, "again", force=False)
    assert [entry["revision"] for entry in completed_revisions(store, "small", typed.dataset)] == [
        typed.dataset_revision
    ]
    record_outcome(store, typed, "refused", run="typed again", version=None, from_recipe_file=False)
    assert find_outcome(store, typed)["from_recipe_file"], "it stays True"


def test_an_outcome_of_an_older_version_completes_no_revision_and_stops_no_watch() -> None:
    store = Store()
    older = {"dataset": "rows", "revision": "1", "verdict": "published", "at": "2026-01-01T00:00:00", "own": True}
    atomic_write(store.path("small", FOLDER, "older.json"), to_json(older))
    assert completed_revisions(store, "small", "rows") == []


def test_fields_that_do_not_decide_the_model_make_no_new_run(small_recipe: Callable) -> None:
    recipe, store = small_recipe(), Store()
    pinned = pinned_recipe(store, resolve(recipe.stem, {}, "first"))
    record_outcome(store, pinned, "published", run="first", version="v1", from_recipe_file=True)
    small_recipe(alert_mail=["ann@example.com"], cron="@daily", keep_days=3)
    with pytest.raises(UpToDate, match="published as v1"):
        resolve(recipe.stem, {}, "second", force=False)


@pytest.mark.parametrize(
    ("stage", "error", "verdict"),
    [("evaluate", GateRefused("it is worse"), "refused"), ("approve", Rejected("ann said no"), "rejected")],
)
def test_a_refused_or_rejected_candidate_is_a_final_outcome_and_a_failed_run_is_none(
    stage: str, error: Exception, verdict: str, small_recipe: Callable
) -> None:
    recipe, store = small_recipe(), Store()
    for run, raised in (("failed", Unreachable("the Hub does not answer")), ("ended", error)):
        pinned = pinned_recipe(store, resolve(recipe.stem, {}, run, force=False))
        assert find_outcome(store, pinned) is None
        with pytest.raises(type(raised)), recorded(store, "small", run, stage):
            raise raised
        summary = report(recipe.stem, run)
    assert summary["verdict"] == verdict
    assert find_outcome(store, pinned)["verdict"] == verdict
    assert [entry["run"] for entry in completed_revisions(store, "small", pinned.dataset)] == ["ended"]
    with pytest.raises(UpToDate, match=f"those of the run ended, whose candidate was {verdict}"):
        resolve(recipe.stem, {}, "again", force=False)
