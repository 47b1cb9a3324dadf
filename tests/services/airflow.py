"""Airflow with its UI, scheduler and triggerer, started as a user starts it, and its REST API."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from include.storage.files import atomic_write
from tests.conftest import PROJECT
from tests.test_demo import processes

ENDED = ("success", "failed")
WAIT = 900.0  # seconds until a wait is given up: no measure of speed, only the end of a test that hangs


class Airflow:
    """The REST API of a `retune up`."""

    def __init__(self, port: int, password: str):
        self.url = f"http://127.0.0.1:{port}"
        self.token = ""
        self.token = self.call("POST", "/auth/token", {"username": "admin", "password": password})["access_token"]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}, method=method,
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def trigger(self, dag: str, **conf: Any) -> str:
        """Start a run as the form does; return its id."""
        return self.call("POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]

    def runs(self, dag: str) -> list[dict[str, Any]]:
        """Return a DAG's runs, oldest first; an empty list if Airflow has not read the DAG yet."""
        found = self.call("GET", "/api/v2/dags/~/dagRuns?order_by=id&limit=100")["dag_runs"]
        return [run for run in found if run["dag_id"] == dag]

    def tasks(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """Return the tasks of a run by name."""
        found = self.call("GET", f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}

    def log(self, dag: str, run: str, task: str, attempt: int = 1) -> list[str]:
        """Return the lines of a try's log, as the UI shows them."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{attempt}"
        return [entry["event"] for entry in self.call("GET", path)["content"]]

    def wait_for_scheduler(self) -> None:
        """Wait for two loops of the scheduler, so that it knows that the process of the asking task has ended.

        An answer before that, within a second of the question, makes the scheduler take the task's process for lost.
        """

        def beat() -> str:
            return self.call("GET", "/api/v2/monitor/health")["scheduler"]["latest_scheduler_heartbeat"]

        for _ in range(2):  # the first may be of a loop that had begun before
            last = beat()
            eventually(lambda last=last: beat() != last)

    def ended(self, dag: str, run: str, seconds: float = WAIT, pause: float = 1.0) -> str:
        """Wait until a run has ended; return its state."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run}"
        return eventually(lambda: (state := self.call("GET", path)["state"]) in ENDED and state, seconds, pause)


@dataclass(frozen=True)
class SharedAirflow:
    """A `retune up` that several tests use, one after another.

    Attributes:
        var: its state folder.
        recipes: the folder of its recipes.
    """

    api: Airflow
    var: Path
    recipes: Path

    def add(self, *recipes: Path) -> None:
        """Add recipes, and wait until their DAGs are there."""
        for recipe in recipes:
            atomic_write(self.recipes / recipe.name, recipe.read_bytes())
        names = {recipe.stem for recipe in recipes}
        eventually(lambda: names <= {dag["dag_id"] for dag in self.api.call("GET", "/api/v2/dags")["dags"]})


def eventually(look: Callable[[], Any], seconds: float = WAIT, pause: float = 1.0) -> Any:
    """Return what `look` returns as soon as it is true; called again after pauses of so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        time.sleep(pause)
    return found


@contextmanager
def up(var: Path) -> Iterator[Airflow]:
    """Start `retune up` in a process of its own; stop it as Ctrl-C does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (var.parent / "up.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "retune", "up", "--port", str(port)], cwd=PROJECT, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + WAIT
            while "Airflow is up" not in (said := (var.parent / "up.log").read_text()):
                assert process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.2)
            assert f"http://127.0.0.1:{port}" in said
            yield Airflow(port, said.split("password")[1].split()[0])
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT) == 0
            assert not processes(var), "Ctrl-C leaves no process behind"
