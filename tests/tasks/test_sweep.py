"""A sweep: a candidate for each combination of the grid, of which the best goes on; with and without Airflow."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from include.errors import BadRecipe, PermanentError
from include.recipe import find_recipe, form, load_recipe
from tasks.report import report
from tests.conftest import last_run

GRID = {"max_steps": [2, 8], "target_modules": ["minimal", ["no_proj"]]}  # of the second, every training fails
GOOD = [f"max_steps={steps} target_modules=minimal" for steps in GRID["max_steps"]]


def test_the_best_of_a_grid_is_published_and_the_rest_is_told(
    var: Path, small_recipe: Callable, pipeline: Callable
) -> None:
    recipe = small_recipe(sweep=GRID)
    pipeline(recipe, run_id="first")
    summary = report("small", "first")
    assert (summary["verdict"], summary["version"]) == ("published", "v1")
    rows = {row["candidate"]: row for row in summary["sweep"]}
    assert [*rows] == [GOOD[0], "max_steps=2 target_modules=no_proj", GOOD[1], "max_steps=8 target_modules=no_proj"]
    assert [row["candidate"] for row in rows.values() if row["chosen"]] == [GOOD[1]]
    assert rows[GOOD[1]]["loss"] < rows[GOOD[0]]["loss"] < rows[GOOD[0]]["base"]
    failed = rows["max_steps=2 target_modules=no_proj"]
    assert failed["loss"] is None
    assert "field 'target_modules'" in failed["summary"]
    assert summary["stages"]["train"]["summary"].startswith("8 steps")
    assert summary["stages"]["choose"]["summary"].startswith(f"{GOOD[1]}, the best of 4: loss ")

    data = [var / "store" / "small" / stage for stage in ("download", "validate", "standardize", "template")]
    assert [len(list(stage.iterdir())) for stage in data] == [1, 1, 1, 1], "the data is made once, for all"
    page = Path(summary["report"].removeprefix("file://")).read_text()
    assert all(label in page for label in rows)
    assert page.count('class="chosen"') == 1
    version = Path(summary["place"])
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["sweep"]["grid"] == GRID
    assert [row["chosen"] for row in manifest["sweep"]["candidates"]] == [False, False, True, False]
    assert (manifest["recipe"]["max_steps"], manifest["recipe"]["sweep"]) == (8, {})
    assert manifest["evaluation"]["confidence"] == pytest.approx(1 - 0.05 / 4), "four tries at being lucky"
    assert "the best of 4 candidates (max_steps: 2, 8 x target_modules: minimal" in (version / "README.md").read_text()

    pipeline(recipe, run_id="again")
    again = report("small", "again")
    assert again["verdict"] == "unchanged"
    assert all(stage["reused"] for name, stage in again["stages"].items() if name not in ("candidates", "choose"))
    assert [row["candidate"] for row in again["sweep"] if row["chosen"]] == [GOOD[1]], "the other is now held to it"


def test_a_grid_of_which_none_comes_through_says_what_became_of_it(small_recipe: Callable, pipeline: Callable) -> None:
    with pytest.raises(PermanentError, match="all 2 candidates failed; the first one: r=4: field 'report_to'"):
        pipeline(small_recipe(sweep={"r": [4, 8]}, report_to=["tensorboard"]))
    summary = report("small", "test")
    assert (summary["verdict"], summary["error"]["kind"]) == ("failed", "PermanentError")
    assert len(summary["sweep"]) == 2


def test_the_form_offers_a_sweep_where_the_file_has_one(small_recipe: Callable) -> None:
    plain = small_recipe("plain")
    assert "sweep" not in form(load_recipe(plain))
    with pytest.raises(BadRecipe, match="field 'sweep': the file has none, so its DAG trains one candidate"):
        load_recipe(plain, {"sweep": {"r": [4, 8]}})
    swept = load_recipe(
        small_recipe("swept", sweep={"r": [4, 8]}), {"sweep": {"learning_rate": ["1e-4", 0.01, 0.0001]}}
    )
    assert find_recipe("swept")
    assert [*swept.candidates()] == ["learning_rate=0.0001", "learning_rate=0.01"], "the same only once"
    with pytest.raises(BadRecipe, match=r"sweep: field 'r': input should be greater than or equal to 1, got 0"):
        load_recipe(find_recipe("swept"), {"sweep": {"r": [8, 0]}})
    assert [*load_recipe(find_recipe("swept"), {"sweep": {}}).candidates()] == ["as written"]


def test_airflow_maps_the_grid_and_a_failed_candidate_does_not_fail_the_run(
    var: Path, airflow_home: Path, small_recipe: Callable, retune: Callable
) -> None:
    recipe = small_recipe(sweep={"learning_rate": [0.01]})
    typed = 'sweep={"target_modules": [["no_proj"], "minimal"]}'
    done = retune("run", "small", "--set", typed, RETUNE_RECIPES=str(recipe))
    assert done.returncode == 0, done.stdout
    assert "✗ train" in done.stdout
    assert "target_modules=no_proj: field 'target_modules'" in done.stdout
    assert done.stdout.count("target_modules=minimal: 8 steps") == 1, "once, although it is the run's now, too"
    summary = last_run(var)
    assert (summary["verdict"], [row["chosen"] for row in summary["sweep"]]) == ("published", [False, True])
    with sqlite3.connect(var / "airflow" / "headless" / "airflow.db") as database:
        assert database.execute("SELECT state FROM dag_run").fetchall() == [("success",)]
        found = database.execute("SELECT task_id, map_index, state, rendered_map_index FROM task_instance").fetchall()
    tasks = {(name, index): (state, label) for name, index, state, label in found}
    assert tasks["candidate.train", 0] == ("failed", "target_modules=no_proj")
    assert tasks["candidate.evaluate", 0][0] == "upstream_failed"
    assert [tasks[f"candidate.{name}", 1] for name in ("train", "smoke_test", "evaluate")] == [
        ("success", "target_modules=minimal")
    ] * 3
    assert {name: tasks[name, -1][0] for name in ("candidates", "choose", "publish", "verify")} == dict.fromkeys(
        ("candidates", "choose", "publish", "verify"), "success"
    )
