"""A person's approval and the report page, in a real Airflow."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from include.registry import FolderRegistry
from tests.conftest import last_run, reuse_training
from tests.services.airflow import Airflow, SharedAirflow, eventually


def start(airflow: Airflow, **values: Any) -> str:
    """The path of a new run in the API."""
    return f"/api/v2/dags/asked/dagRuns/{airflow.trigger('asked', **values)}"


def states(airflow: Airflow, path: str) -> dict[str, str]:
    tasks = airflow.call("GET", f"{path}/taskInstances")["task_instances"]
    return {"run": airflow.call("GET", path)["state"]} | {task["task_id"]: task["state"] for task in tasks}


def wait(airflow: Airflow, path: str, what: str, *wanted: str) -> dict[str, str]:
    """Wait until the run, or a task of it, is in one of these states."""

    def look() -> Any:
        now = states(airflow, path)
        assert what == "run" or now["run"] in ("queued", "running"), now
        return now[what] in wanted and now

    return eventually(look)


def answer(airflow: Airflow, path: str, option: str) -> None:
    airflow.wait_for_scheduler()  # no person answers within a second
    airflow.call(
        "PATCH", f"{path}/taskInstances/approve/-1/hitlDetails", {"chosen_options": [option], "params_input": {}}
    )


def get(url: str, **headers: str) -> tuple[int, str, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=300) as got:
            return got.status, got.read().decode(), got.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


@pytest.mark.xdist_group("up")
def test_a_person_decides_what_is_published(
    shared: SharedAirflow, small_recipe: Callable, small_run: Path, trained: Path
) -> None:
    reuse_training(small_run, shared.var, "asked")
    shared.add(small_recipe("asked", dataset=str(trained)))
    airflow, var = shared.api, shared.var
    registry = FolderRegistry(var / "registry" / "asked")
    asked = start(airflow, approve="always")
    wait(airflow, asked, "approve", "awaiting_input")
    for pool in airflow.call("GET", "/api/v2/pools")["pools"]:
        assert pool["occupied_slots"] == 0, "a task that waits for a person holds no worker"
    question = airflow.call("GET", f"{asked}/taskInstances/approve/-1/hitlDetails")
    assert question["subject"].startswith("May this candidate of asked go live? loss ")
    assert "| **candidate** | **" in question["body"] and "| base model | " in question["body"]
    assert "| What is 2 plus 3? | " in question["body"]

    # the report, for those who may see the run, and nothing else
    run_id = asked.rsplit("/", 1)[-1]
    assert not (var / "last_run.json").exists() or last_run(var)["run"] != run_id
    page = airflow.url + question["body"].split("[Open the report](")[1].split(")")[0]
    assert page == f"{airflow.url}/retune/report/asked/{quote(run_id)}"
    assert [get(page)[0], get(page, Authorization="Bearer no")[0]] == [401, 403]
    token = {"Authorization": f"Bearer {airflow.token}"}
    for login in (token, {"Cookie": f"_token={airflow.token}"}):
        status, text, headers = get(page, **login)
        assert status == 200 and 'class="verdict waiting"' in text
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
    (var / "store" / "report.html").write_text("outside")
    (var / "store" / "asked" / "report.html").write_text("outside")
    for other in ("asked/none", "asked/..", "asked/%2E%2E", "%2E%2E/%2E%2E", "asked/..%2F..", "rollback/x", "asked"):
        status, text, _ = get(f"{airflow.url}/retune/report/{other}", **token)
        assert status == 404 and "outside" not in text
    assert "This run has no report." in get(f"{airflow.url}/retune/report/asked/none", **token)[1]
    assert get(f"{airflow.url}/retune/report/asked/none")[0] == 401
    (plugin,) = [p for p in airflow.call("GET", "/api/v2/plugins")["plugins"] if p["name"] == "retune_report_page"]
    assert plugin["external_views"][0]["href"] == "/retune/report/{DAG_ID}/{RUN_ID}"

    answer(airflow, asked, "Reject")
    ended = wait(airflow, asked, "run", "success", "failed")
    assert {name: ended[name] for name in ("run", "approve", "publish", "report")} == {
        "run": "failed", "approve": "failed", "publish": "upstream_failed", "report": "success",
    }  # fmt: skip
    summary = last_run(var)
    assert (summary["verdict"], summary["error"]["kind"], summary["run"]) == ("rejected", "Rejected", run_id)
    assert summary["error"]["what"].startswith("rejected by admin at ")
    assert airflow.call("GET", f"{asked}/taskInstances/approve")["try_number"] == 1, "and is not asked again"
    assert "rejected by admin" in airflow.call("GET", asked)["note"]

    unanswered = start(airflow, approve="always", approve_within_hours=1e-4)
    assert wait(airflow, unanswered, "run", "success", "failed")["approve"] == "failed"
    summary = last_run(var)
    assert (summary["verdict"], summary["error"]["what"]) == ("failed", "nobody answered within 0.0001 h")
    assert registry.live() is None

    clear = {"dag_run_id": run_id, "task_ids": ["approve"], "include_downstream": True, "dry_run": False,
             "only_failed": False}  # fmt: skip
    airflow.call("POST", "/api/v2/dags/asked/clearTaskInstances", clear)
    wait(airflow, asked, "approve", "awaiting_input")
    answer(airflow, asked, "Approve")
    assert wait(airflow, asked, "run", "success", "failed")["run"] == "success"
    assert (last_run(var)["verdict"], last_run(var)["version"]) == ("published", "v1")
    manifest = json.loads((registry.fetch("v1") / "manifest.json").read_text())
    assert (manifest["approval"]["asked"], manifest["approval"]["by"]) == (True, "admin")
    assert "approved by admin at " in get(page, **token)[1]


@pytest.mark.parametrize("arguments", [["run", "small"], ["run", "small", "--set", "approve=on_regression"]])
def test_a_headless_run_that_would_wait_for_ever_says_so_at_once(
    arguments: list[str], var: Path, small_recipe: Any, retune: Any
) -> None:
    small_recipe(approve="always")
    done = retune(*arguments)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 1)
    assert "Run it in Airflow's UI (make up), or here without approval: --set approve=never" in done.stdout
    assert not var.exists()
