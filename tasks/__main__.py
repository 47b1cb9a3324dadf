"""`python -m tasks RECIPE [--until STAGE] [--set FIELD=VALUE]`: run the stages one after another, without Airflow.

For a look at one stage, a debugger, a test. Finished stages are reused, as always.
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import UTC, datetime

from include.errors import RetuneError
from include.recipe import find_recipe, load_recipe, parse_overrides
from tasks.approve import refuse_if_approval_needed
from tasks.report import report
from tasks.stages import NAMES, run_stages


def main() -> int:
    """Parse the command line; an error is one line, which the stage has logged, and status 1."""
    parser = argparse.ArgumentParser(prog="tasks", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="name of a recipe")
    parser.add_argument("--until", choices=NAMES, default=NAMES[-1], help="the last stage to run")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="in place of the file's")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("airflow.task.retune").setLevel(logging.INFO)
    try:
        values = parse_overrides(arguments.set)
        if NAMES.index(arguments.until) >= NAMES.index("approve"):
            refuse_if_approval_needed(load_recipe(find_recipe(arguments.recipe), values))
    except RetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run_id = f"shell__{datetime.now(UTC).isoformat()}"
    try:
        run_stages(arguments.recipe, values, run_id, arguments.until)
    except RetuneError:
        return 1
    finally:
        report(arguments.recipe, run_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
