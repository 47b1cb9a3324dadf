"""The shell commands behind `make`: run a recipe headless, start Airflow with its UI, take a version back.

The first two start Airflow as a process of its own with one set of settings; this file does not import it. The last
needs no Airflow.
"""

from __future__ import annotations

import argparse
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
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from include.errors import NoPermission, RetuneError
from include.paths import HEADLESS, PROJECT, recipe_files, var
from include.recipe import find_recipe, load_recipe, parse_overrides
from include.storage.artifacts import Store
from include.storage.object_store import list_dir
from tasks.approve import refuse_if_approval_needed
from tasks.rollback import rollback

START_SECONDS = 180.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

console = Console(highlight=False)


def airflow_environment(home: Path, port: int = 8080) -> dict[str, str]:
    """The settings of an Airflow on this machine: SQLite, LocalExecutor, everything on loopback and under `var/`."""
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


def run(recipe_name: str, values: list[str]) -> int:
    """Run a recipe's DAG to its end without UI, showing each stage as it goes; 0 when it was published and verified."""
    file, overrides = find_recipe(recipe_name), parse_overrides(values)
    # a typing error is told now, not after Airflow has started
    refuse_if_approval_needed(load_recipe(file, overrides))
    environment = airflow_environment(var() / "airflow" / "headless") | {HEADLESS: "1"}
    if file not in recipe_files():
        environment["RETUNE_RECIPES"] = ":".join(filter(None, [os.environ.get("RETUNE_RECIPES"), str(file)]))
    try:
        var().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoPermission(f"{var()} cannot be made ({error.strerror})", "Set RETUNE_VAR to another folder") from error
    try:
        with FileLock(var() / "headless.lock", timeout=0):
            return _run(file.stem, overrides, environment)
    except Timeout:
        raise RetuneError("another headless run is going on in this checkout", "Wait for it, or stop it") from None


def _run(recipe: str, overrides: dict[str, Any], environment: dict[str, str]) -> int:
    began, store = time.monotonic(), Store()
    store.check_writable()
    log = var() / "logs" / f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{recipe}[/] through Airflow, log in {log}")
    _migrate(environment, log)
    before = _runs(store, recipe)
    with log.open("ab") as output:
        airflow = _start(
            ["dags", "test", recipe, "--conf", json.dumps({"force": True, **overrides})], environment, output
        )
    with _stopped_with_us(airflow):
        _follow(airflow, store, recipe, before)
    runs = _runs(store, recipe) - before
    summary = store.read_records(recipe, runs.pop()).get("run") if runs else None
    if summary is None:
        raise RetuneError(f"Airflow ended (status {airflow.returncode}) before the run began", f"See {log}")
    seconds = time.monotonic() - began
    if summary["verdict"] in ("published", "unchanged"):
        word = "Published" if summary["verdict"] == "published" else "Unchanged, live is"
        console.print(f"\n[bold green]{word}[/] {summary['version']} in {seconds:.0f} s")
        console.print(f"  adapter   {summary['place']}", soft_wrap=True)
        console.print(f"  report    {summary['report'].removeprefix('file://')}", soft_wrap=True)
        console.print("  next      make up      (Airflow's UI: trigger it from a form, watch, compare)")
        return 0
    error = summary["error"] or {"what": "the run was stopped", "do": "Run again: finished stages are reused"}
    console.print(f"\n[bold red]{summary['verdict'].capitalize()}[/] after {seconds:.0f} s: {escape(error['what'])}.")
    console.print(f"  what to do   {escape(error['do'])}", soft_wrap=True)
    console.print(f"  report       {summary['report'].removeprefix('file://')}", soft_wrap=True)
    console.print(f"  log          {log}", soft_wrap=True)
    return 1


def _runs(store: Store, recipe: str) -> set[str]:
    with store.read_errors():
        return set(list_dir(store.path(recipe, "runs")))


def _follow(airflow: subprocess.Popen[bytes], store: Store, recipe: str, before: set[str]) -> None:
    """Print a line for each stage that ends, and on a terminal the current line of the one at work."""
    told: set[tuple[str, ...]] = set()
    status = console.status("Airflow is starting") if console.is_terminal else nullcontext()
    with status as spinner:
        running = True
        while running:
            running = airflow.poll() is None
            for run_id in _runs(store, recipe) - before:
                records = [record for name, record in store.read_records(recipe, run_id).items() if name != "run"]
                for record in sorted(records, key=lambda record: record["started_at"]):
                    stage, state = record["stage"], record["state"]
                    key = (stage, record["started_at"], record.get("candidate", ""))  # the chosen one's is there twice
                    candidate = f"{record['candidate']}: " if "candidate" in record else ""
                    if state != "running" and key not in told:
                        told.add(key)
                        reused = "reused, " if record.get("reused") else ""
                        mark = "[green]✓[/]" if state == "done" else "[red]✗[/]"
                        line = escape(candidate + reused + record["summary"])
                        console.print(f"{mark} {stage:<12}{record['seconds']:>7.1f} s  {line}", soft_wrap=True)
                    elif spinner and state == "running":
                        spinner.update(f"{stage:<12} {escape(candidate + record['line'])}")
            time.sleep(0.3)


def _migrate(environment: dict[str, str], log: Path) -> None:
    """Make Airflow's database, once for each version of Airflow."""
    home = Path(environment["AIRFLOW_HOME"])
    done = home / f".migrated-{package_version('apache-airflow')}"
    if done.exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    for command in (["db", "migrate"], ["pools", "set", "gpu", "1", "one training at a time"]):
        with log.open("ab") as output:
            if _start(command, environment, output).wait() != 0:
                raise RetuneError(f"airflow {' '.join(command)} failed", f"See {log}")
    done.touch()


def _start(arguments: list[str], environment: dict[str, str], output: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "airflow", *arguments],
        env=environment, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=_interruptible,
    )  # fmt: skip


def _interruptible() -> None:
    """In the child: SIGINT works although a shell's background job ignores it, and comes when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


@contextmanager
def _stopped_with_us(airflow: subprocess.Popen[bytes], grace: float = 150.0) -> Iterator[None]:
    """SIGINT and SIGTERM stop Airflow as Ctrl-C would, and wait until it has saved what it must."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # one is enough; a second must not cut the stopping short
        if airflow.poll() is None:
            console.print("stopping ...")
            airflow.send_signal(signal.SIGINT)
            try:
                airflow.wait(grace)
            except subprocess.TimeoutExpired:
                os.killpg(airflow.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def up(port: int) -> int:
    """Start Airflow with its UI on the loopback address, print the address and the login, and wait for Ctrl-C."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise RetuneError(f"port {port} on 127.0.0.1 is taken", f"Stop what uses it, or: make up PORT={port + 1}")
    home, log = var() / "airflow" / "ui", var() / "logs" / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = airflow_environment(home, port)
    _migrate(environment, log)
    with log.open("ab") as output:
        airflow = _start(["standalone"], environment, output)
    with _stopped_with_us(airflow):
        with console.status("Airflow is starting"):
            _wait_for(f"http://127.0.0.1:{port}/api/v2/monitor/health", airflow, log)
        (user, password), *_ = json.loads((home / "passwords.json").read_text()).items()
        console.print(f"[bold green]Airflow is up[/]   http://127.0.0.1:{port}   user {user}   password {password}")
        console.print(f"Trigger a DAG there; logs are in {log} and {home / 'logs'}. Ctrl-C stops it.")
        try:
            airflow.wait()
        except KeyboardInterrupt:
            return 0
    raise RetuneError(f"Airflow ended by itself (status {airflow.returncode})", f"See {log}")


def _wait_for(address: str, airflow: subprocess.Popen[bytes], log: Path) -> None:
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


def back(recipe: str, version: str, reason: str) -> int:
    """Make a published version live again; the Hub's token is HF_TOKEN."""
    console.print(escape(rollback(recipe, version, reason)), soft_wrap=True)
    return 0


def main() -> int:
    """Parse the command line; errors are one line and status 1."""
    parser = argparse.ArgumentParser(prog="retune", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run a recipe to its end, without UI")
    run_parser.add_argument("recipe", help="name of a recipe in include/recipes, or path of a recipe file")
    run_parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="in place of the file's")
    up_parser = commands.add_parser("up", help="start Airflow with its UI on the loopback address")
    up_parser.add_argument("--port", type=int, default=8080)
    back_parser = commands.add_parser("rollback", help="make a version that was published before live again")
    back_parser.add_argument("recipe", help="name of a recipe in include/recipes, or path of a recipe file")
    back_parser.add_argument("version", help="v1, v2 ...; one that is not there lists those that are")
    back_parser.add_argument("--reason", required=True, help="why; it stays in the registry's history")
    arguments = parser.parse_args()
    try:
        if arguments.command == "up":
            return up(arguments.port)
        if arguments.command == "rollback":
            return back(arguments.recipe, arguments.version, arguments.reason)
        return run(arguments.recipe, arguments.set)
    except RetuneError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; run again to go on: finished stages are reused")
        return 130


if __name__ == "__main__":
    sys.exit(main())
