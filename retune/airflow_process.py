"""Airflow as a process of this machine: its settings, its database, starting it and stopping it cleanly."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as package_version
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from include.errors import RetuneError
from include.paths import PROJECT, var

START_SECONDS = 180.0  # from starting Airflow to a healthy API server
STOP_SECONDS = 150.0  # from asking Airflow to stop to killing it; a training saves a checkpoint in this time
PR_SET_PDEATHSIG = 1  # linux/prctl.h

console = Console(highlight=False)


def airflow_environment(home: Path, port: int = 8080) -> dict[str, str]:
    """Return the environment of an Airflow on this machine: SQLite, LocalExecutor, loopback addresses only.

    Args:
        home: folder of Airflow's database and logs, below `var/`.
        port: port of the UI and of the API that tasks talk to.
    """
    address = f"http://127.0.0.1:{port}"
    return {
        **os.environ,
        "AIRFLOW_HOME": str(home),
        "PYTHONPATH": str(PROJECT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(PROJECT / "plugins"),
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def migrate(environment: dict[str, str], log: Path) -> None:
    """Create Airflow's database and the pool `gpu`, once for each version of Airflow.

    Raises:
        RetuneError: a command of Airflow failed; the log has its output.
    """
    home = Path(environment["AIRFLOW_HOME"])
    done = home / f".migrated-{package_version('apache-airflow')}"
    if done.exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    for command in (["db", "migrate"], ["pools", "set", "gpu", "1", "one training at a time"]):
        with log.open("ab") as output:
            if start(command, environment, output).wait() != 0:
                raise RetuneError(f"airflow {' '.join(command)} failed", f"See {log}")
    done.touch()


def start(arguments: list[str], environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `airflow ARGUMENTS` in a session of its own; return the process."""
    return subprocess.Popen(
        [sys.executable, "-m", "airflow", *arguments],
        env=environment, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=_in_child,
    )  # fmt: skip


def _in_child() -> None:
    """Let SIGINT stop the child, and send it SIGINT when its parent dies.

    The shell of a background job ignores SIGINT, and a child process would inherit that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


@contextmanager
def stopped_at_exit(airflow: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop Airflow when the block ends, also when SIGINT or SIGTERM ends it, and wait until Airflow has stopped.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second signal must not cut the stopping short
        if airflow.poll() is None:
            console.print("stopping ...")
            airflow.send_signal(signal.SIGINT)  # SIGTERM would leave Airflow's children behind
            try:
                airflow.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(airflow.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(port: int) -> None:
    """Start Airflow with its UI on the loopback address, print the address and the login, and wait for Ctrl-C.

    Raises:
        RetuneError: the port is taken, or Airflow ended by itself.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise RetuneError(f"port {port} on 127.0.0.1 is taken", f"Stop what uses it, or: make up PORT={port + 1}")
    home, log = var() / "airflow" / "ui", var() / "logs" / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = airflow_environment(home, port)
    migrate(environment, log)
    with log.open("ab") as output:
        airflow = start(["standalone"], environment, output)
    with stopped_at_exit(airflow):
        with console.status("Airflow is starting"):
            _wait_for(f"http://127.0.0.1:{port}/api/v2/monitor/health", airflow, log)
        (user, password), *_ = json.loads((home / "passwords.json").read_text()).items()
        console.print(f"[bold green]Airflow is up[/]   http://127.0.0.1:{port}   user {user}   password {password}")
        console.print(f"Trigger a DAG there; logs are in {log} and {home / 'logs'}. Ctrl-C stops it.")
        try:
            airflow.wait()
        except KeyboardInterrupt:
            return
    raise RetuneError(f"Airflow ended by itself (status {airflow.returncode})", f"See {log}")


def _wait_for(address: str, airflow: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the API server says that database, scheduler and DAG processor are healthy."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if airflow.poll() is not None:
            raise RetuneError(f"Airflow ended while starting (status {airflow.returncode})", f"See {log}")
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                health = json.load(answer)
            if all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor")):
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RetuneError(f"Airflow did not answer within {START_SECONDS:.0f} s", f"See {log}")
