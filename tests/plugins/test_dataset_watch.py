"""Runs that start by themselves: on a new revision of the dataset, or by cron. Real scheduler and triggerer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from include.data.sources import pin_dataset
from include.errors import Conflict
from include.recipe import dataset_ref, load_recipe
from include.registry import FolderRegistry
from include.storage.artifacts import Store
from tasks.download import download
from tasks.report import report
from tasks.resolve import resolve
from tests.conftest import conversation, reuse_training
from tests.services.airflow import ENDED, Airflow, SharedAirflow, eventually, up
from tests.services.hub import Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def rows(first: int) -> bytes:
    made = [conversation(f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}.") for i in range(first, first + 60)]
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def test_each_new_revision_is_trained_once_over_restarts_and_again_after_a_failure(
    var: Path, airflow_home: Path, small_recipe: Callable, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{next(iter(hub.tokens.values()))[0]}/rows"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    small_recipe(dataset=name, watch=True, watch_every=5, gate_margin=20)  # each candidate is published

    def put(first: int) -> str:
        return hub.put(name, {"data/train.jsonl": rows(first)}, kind="dataset")

    def run(airflow: Airflow, number: int) -> str:
        found = eventually(lambda: len(airflow.runs("small")) >= number and airflow.runs("small"))
        assert found[number - 1]["run_type"] == "asset_triggered"
        return found[number - 1]["dag_run_id"]

    def records(run_id: str) -> dict[str, Any]:
        return Store().read_records("small", run_id)

    def manifest(version: str) -> dict[str, Any]:
        return json.loads((FolderRegistry(var / "registry" / "small").fetch(version) / "manifest.json").read_text())

    def wait_for_checks(times: int) -> None:
        before = len(hub.requests)
        eventually(lambda: len([r for r in hub.requests[before:] if r[1].startswith("/api/datasets/")]) >= times)

    hub.fail("GET|HEAD", "/datasets/.*/resolve/", status=403, times=1000)
    first = put(0)
    with up(var) as airflow:
        one = run(airflow, 1)
        assert airflow.ended("small", one) == "failed"
        assert airflow.tasks("small", one)["download"]["try_number"] == 1, "no retry is burnt on a lasting cause"
        last_words = [line for line in airflow.log("small", one, "download") if not line.startswith("::")][-1]
        assert last_words.startswith("download failed: field 'dataset': the Hub does not let Retune read the dataset")
        assert "Put a token that may read it into the password" in last_words
        assert last_words.endswith("It will not be tried again: a retry would fail in the same way.")
        hub.faults.clear()

        two = run(airflow, 2)
        eventually(lambda: records(two).get("resolve", {}).get("state") == "done")
        second = put(1)
        assert airflow.ended("small", two) == "success"
        assert records(two)["run"]["verdict"] == "published"
        assert manifest("v1")["dataset"]["revision"] == first, "not the newer one"
        note = eventually(lambda: airflow.runs("small")[1]["note"])
        assert f"**published** v1; dataset {name}@{first[:8]}, base tiny_base" in note

        three = run(airflow, 3)
        eventually(lambda: "download" in records(three))
    with up(var) as airflow:
        airflow.ended("small", three)
        assert records(three)["run"]["verdict"] == "published"
        assert manifest("v2")["dataset"]["revision"] == second
        wait_for_checks(3)
        assert [r["dag_run_id"] for r in airflow.runs("small")] == [one, two, three], "what was published is done"
        events = airflow.call("GET", "/api/v2/assets/events?order_by=timestamp")["asset_events"]
        changes = [(event["extra"]["payload"]["old"], event["extra"]["payload"]["new"]) for event in events]
        assert changes == [(None, first), (None, first), (first, second)]


@pytest.mark.xdist_group("up")
def test_a_cron_day_without_anything_new_is_skipped_and_force_runs_it(
    shared: SharedAirflow, small_recipe: Callable, small_run: Path, trained: Path, pipeline: Callable
) -> None:
    reuse_training(small_run, shared.var, "nightly")
    recipe = small_recipe("nightly", dataset=str(trained), cron="* * * * *")
    pipeline(recipe, run_id="earlier")
    report("nightly", "earlier")
    shared.add(recipe)
    airflow = shared.api
    run = eventually(lambda: airflow.runs("nightly"))[0]
    assert run["run_type"] == "scheduled"
    assert airflow.ended("nightly", run["dag_run_id"]) == "success"
    tasks = airflow.tasks("nightly", run["dag_run_id"])
    assert {task["state"] for name, task in tasks.items() if name not in ("report", "alert")} == {"skipped"}
    said = " ".join(airflow.log("nightly", run["dag_run_id"], "resolve"))
    assert "nothing is new: rows.jsonl@" in said
    assert "are those of the run earlier, whose candidate was published as v1. Switch on force" in said
    forced = airflow.trigger("nightly", force=True)
    assert airflow.ended("nightly", forced) == "success"
    assert Store().read_records("nightly", forced)["run"]["verdict"] == "unchanged"
    airflow.call(
        "PATCH", "/api/v2/dags/nightly", {"is_paused": True}
    )  # the tests that follow have Airflow to themselves
    for run in airflow.runs("nightly"):
        if run["state"] not in ENDED:
            airflow.call("PATCH", f"/api/v2/dags/nightly/dagRuns/{run['dag_run_id']}", {"state": "failed"})


def test_a_file_that_changes_after_it_was_pinned_is_not_trained_on(
    small_recipe: Callable, pipeline: Callable, dataset: Path
) -> None:
    recipe = small_recipe()
    before = pin_dataset(dataset_ref(load_recipe(recipe)))
    lineage = pipeline(recipe, "resolve")
    dataset.write_bytes(rows(5))
    with pytest.raises(Conflict, match="has changed: its revision was"):
        download(lineage)
    with pytest.raises(Conflict, match="has changed: its revision was"):  # a run that was started for the older one
        resolve(recipe.stem, {}, "late", revision=before)
