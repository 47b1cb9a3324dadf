"""`retune run`: a recipe's DAG through Airflow to its end, without UI, with one line printed per stage."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from include.errors import NoPermission, RetuneError
from include.paths import HEADLESS, recipe_files, var
from include.recipe import find_recipe, load_recipe, parse_overrides
from include.storage.artifacts import Store
from include.storage.object_store import list_dir
from retune.airflow_process import airflow_environment, migrate, start, stopped_at_exit
from tasks.approve import refuse_if_approval_needed
from tasks.stages import longest_try

POLL_SECONDS = 0.3  # between two looks at the records of the run

console = Console(highlight=False)


def run(recipe_name: str, values: list[str]) -> bool:
    """Run a recipe's DAG to its end and print each stage; return True when a version was published and verified.

    Args:
        recipe_name: name of a recipe, or path of a recipe file.
        values: `field=value` texts that replace values of the file for this run.

    Raises:
        RetuneError: the recipe or a value is wrong, the state folder cannot be written, another headless run is going
            on, or Airflow ended before the run began.
        KeyboardInterrupt: the run was stopped by SIGINT or SIGTERM.
    """
    file, overrides = find_recipe(recipe_name), parse_overrides(values)
    # report a wrong value at once, not after Airflow has started
    recipe = load_recipe(file, overrides)
    longest_try(recipe)  # names the stages of timeout_hours that do not exist
    refuse_if_approval_needed(recipe)
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


def _run(recipe: str, overrides: dict[str, Any], environment: dict[str, str]) -> bool:
    began, store = time.monotonic(), Store()
    store.check_writable()
    log = var() / "logs" / f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{recipe}[/] through Airflow, log in {log}")
    migrate(environment, log)
    before = _runs(store, recipe)
    with log.open("ab") as output:
        airflow = start(
            ["dags", "test", recipe, "--conf", json.dumps({"force": True, **overrides})], environment, output
        )
    with stopped_at_exit(airflow):
        _follow(airflow, store, recipe, before)
    runs = _runs(store, recipe) - before
    summary = store.read_records(recipe, runs.pop()).get("run") if runs else None
    if summary is None:
        raise RetuneError(f"Airflow ended (status {airflow.returncode}) before the run began", f"See {log}")
    _print_summary(summary, time.monotonic() - began, log)
    return summary["verdict"] in ("published", "unchanged")


def _print_summary(summary: dict[str, Any], seconds: float, log: Path) -> None:
    """Print the run's verdict, and its places or what to do next."""
    report = summary["report"].removeprefix("file://")
    if summary["verdict"] in ("published", "unchanged"):
        verdict = "Published" if summary["verdict"] == "published" else "Unchanged, live is"
        console.print(f"\n[bold green]{verdict}[/] {summary['version']} in {seconds:.0f} s")
        console.print(f"  adapter   {summary['place']}", soft_wrap=True)
        console.print(f"  report    {report}", soft_wrap=True)
        console.print("  next      make up      (Airflow's UI: trigger it from a form, watch, compare)")
        return
    error = summary["error"] or {"what": "the run was stopped", "do": "Run again: finished stages are reused"}
    console.print(f"\n[bold red]{summary['verdict'].capitalize()}[/] after {seconds:.0f} s: {escape(error['what'])}.")
    console.print(f"  what to do   {escape(error['do'])}", soft_wrap=True)
    console.print(f"  report       {report}", soft_wrap=True)
    console.print(f"  log          {log}", soft_wrap=True)


def _runs(store: Store, recipe: str) -> set[str]:
    with store.read_errors():
        return set(list_dir(store.path(recipe, "runs")))


def _follow(airflow: subprocess.Popen[bytes], store: Store, recipe: str, before: set[str]) -> None:
    """Print a line for each stage that ends, and on a terminal the current line of the stage at work."""
    printed: set[tuple[str, ...]] = set()
    status = console.status("Airflow is starting") if console.is_terminal else nullcontext()
    with status as spinner:
        running = True
        while running:
            running = airflow.poll() is None
            for run_id in _runs(store, recipe) - before:
                records = [record for name, record in store.read_records(recipe, run_id).items() if name != "run"]
                for record in sorted(records, key=lambda record: record["started_at"]):
                    if record["state"] == "running":
                        if spinner:
                            spinner.update(escape(f"{record['stage']:<12} {_text(record)}"))
                        continue
                    # a sweep keeps two records of the chosen candidate's stages
                    key = (record["stage"], record["started_at"], record.get("candidate", ""))
                    if key not in printed:
                        printed.add(key)
                        console.print(stage_line(record), soft_wrap=True)
            time.sleep(POLL_SECONDS)


def stage_line(record: dict[str, Any]) -> str:
    """Return the line about a stage that has ended: tick, name, seconds, summary; in rich's markup."""
    tick = "[green]✓[/]" if record["state"] == "done" else "[red]✗[/]"
    return f"{tick} {record['stage']:<12}{record['seconds']:>7.1f} s  {escape(_text(record))}"


def _text(record: dict[str, Any]) -> str:
    candidate = f"{record['candidate']}: " if "candidate" in record else ""
    reused = "reused, " if record.get("reused") else ""
    return candidate + reused + record["summary"]
