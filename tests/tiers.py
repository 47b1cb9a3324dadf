"""The tiers of the tests: which test starts the training engine, Airflow, or the cluster, as its own code shows.

`make test-fast` runs the tests that start none of them. A test whose helpers hide the start carries the marker itself.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

from tasks.stages import PIPELINE

ON_CPU = PIPELINE[: [stage.gpu for stage in PIPELINE].index(True)]  # these stages start no process of the engine
DATA_STAGES = {stage.name for stage in ON_CPU}
FIXTURES = {"airflow": {"airflow"}, "airflow_home": {"airflow"}, "running": {"cluster"}, "train_job": {"engine"}}
TIERS = ("engine", "airflow", "cluster")


def tiers_of(item: pytest.Function) -> set[str]:
    """Return the markers that a test's fixtures and calls ask for."""
    found = {tier for name in item.fixturenames for tier in FIXTURES.get(name, ())}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(item.function)))):
        if isinstance(node, ast.Call):
            words = [word.value for word in ast.walk(node) if isinstance(word, ast.Constant)]
            name = ast.unparse(node.func)
            if (name == "pipeline" and not DATA_STAGES & set(words)) or name == "supervise.run":
                found.add("engine")
            elif name == "up" or (name == "subprocess.run" and "airflow" in words):
                found.add("airflow")
            elif name in ("retune", "subprocess.Popen", "subprocess.run") and "run" in words:
                found |= {"engine", "airflow"}
    return found


def missing_marker(item: pytest.Item, state: Path) -> str | None:
    """Return the marker that a test of the fast tier lacks, by the traces of what it has started.

    Args:
        state: the folder with all state of the test.
    """
    if any(item.get_closest_marker(tier) for tier in TIERS):
        return None
    if next(state.rglob("airflow.db"), None):
        return "airflow"
    return "engine" if next(state.rglob("engine.log"), None) else None
