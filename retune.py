"""The shell commands behind `make`: run a recipe headless, start Airflow with its UI.

Both start Airflow as a process of its own with one set of settings; this file does not import it.
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
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from include.errors import BadRecipe, RetuneError
from include.recipe import Recipe, check, find, load
from include.settings import PROJECT, var
from include.store import Store

HEADLESS_STATES = {"running": "[yellow]…[/]", "done": "[green]✓[/]", "failed": "[red]✗[/]"}
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


def run(recipe_name: str, values: dict[str, str]) -> int:
    """Run a recipe's DAG to its end without UI, showing each stage as it goes; 0 when it was published and verified."""
    file = find(recipe_name)
    overrides = _typed(values)
    recipe = load(file, overrides)
    environment = airflow_environment(var() / "airflow" / "headless")
    if file not in [path.resolve() for path in (PROJECT / "include" / "recipes").glob("*.yaml")]:
        environment["RETUNE_RECIPES"] = ":".join(filter(None, [os.environ.get("RETUNE_RECIPES"), str(file)]))
    lock = FileLock(var() / "headless.lock")
    lock.lock_file and Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RetuneError("another headless run is going on in this checkout", "Wait for it, or stop it") from None
    try:
        return _run(recipe, overrides, environment)
    finally:
        lock.release()
