"""`python -m tasks RECIPE [--until STAGE] [--set FIELD=VALUE]`: the stages one after another, here, without Airflow.

For a look at one stage, a debugger, a test. Finished stages are reused, as always.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from include.base_model import DEMO_BASE
from include.errors import PermanentError, RetuneError
from include.pipeline.stage import Lineage, Stage
from include.recipe import find_recipe, load_recipe, parse_overrides
from tasks.approve import refuse_where_nobody_asks
from tasks.report import STAGES, report
from tasks.resolve import resolve
from tasks.sweep import candidates, choose


def run(recipe: str, values: dict[str, Any], run_id: str, until: str = STAGES[-1]) -> Lineage:
    """The lineage of a recipe's stages up to one of them; errors are those of the stages."""
    lineages = [resolve(recipe, values, run_id, to_publish=STAGES.index(until) >= STAGES.index("publish"))]
    asked, grid = load_recipe(find_recipe(recipe), values), []
    left_out = {"pretrain": asked.base_model != DEMO_BASE, "candidates": not asked.sweep, "choose": not asked.sweep}
    for name in STAGES[1 : STAGES.index(until) + 1]:
        if left_out.get(name):
            continue
        if name == "candidates":
            lineages = grid = candidates(lineages[0])
        elif name == "choose":
            lineages = [choose(grid, lineages)]
        else:
            stage = getattr(importlib.import_module(f"tasks.{name}"), name)
            lineages = list(_through(stage, lineages))
    return lineages[0] if lineages else choose(grid, lineages)


def _through(stage: Stage, lineages: list[Lineage]) -> Iterator[Lineage]:
    """The lineages after a stage; a candidate of a sweep that fails does not end the others."""
    for lineage in lineages:
        try:
            yield stage(lineage)
        except PermanentError:  # after any other, a new run goes on from there
            if "candidate" not in lineage:
                raise


def main() -> int:
    """Parse the command line; an error is one line, which the stage has logged, and status 1."""
    parser = argparse.ArgumentParser(prog="tasks", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="name of a recipe")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="in place of the file's")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("airflow.task.retune").setLevel(logging.INFO)
    try:
        values = parse_overrides(arguments.set)
        if STAGES.index(arguments.until) >= STAGES.index("approve"):
            refuse_where_nobody_asks(load_recipe(find_recipe(arguments.recipe), values))
    except RetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run_id = f"shell__{datetime.now(UTC).isoformat()}"
    try:
        run(arguments.recipe, values, run_id, arguments.until)
    except RetuneError:
        return 1
    finally:
        report(arguments.recipe, run_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
