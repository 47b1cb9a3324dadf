"""`retune stage`: the stages one after another in this process, without Airflow."""

from __future__ import annotations

from datetime import UTC, datetime

from include.errors import NotFound, RetuneError
from include.pipeline.records import log
from include.recipe import find_recipe, load_recipe, parse_overrides
from tasks.approve import refuse_if_approval_needed
from tasks.report import report
from tasks.stages import NAMES, run_stages, stages_of


def run_until(recipe: str, until: str, values: list[str]) -> bool:
    """Run a recipe's stages up to one of them, make the run's report, and return whether all stages succeeded.

    A stage that fails has logged why. A run that ends before the last stage logs where it stopped.

    Raises:
        NotFound: there is no such recipe or stage.
        BadRecipe: the recipe or a value is wrong.
    """
    if until not in NAMES:
        raise NotFound(f"there is no stage '{until}'", f"Choose one of: {', '.join(NAMES)}")
    overrides = parse_overrides(values)
    checked = load_recipe(find_recipe(recipe), overrides)
    if NAMES.index(until) >= NAMES.index("approve"):
        refuse_if_approval_needed(checked)
    last = [stage.name for stage in stages_of(checked) if NAMES.index(stage.name) <= NAMES.index(until)][-1]
    run_id = f"shell__{datetime.now(UTC).isoformat()}"
    try:
        run_stages(recipe, overrides, run_id, until)
    except RetuneError:
        return False
    finally:
        report(recipe, run_id, until=last)
    if last != NAMES[-1]:
        log.info("stopped after %s, as asked", last)
    return True
