"""The tiers of the tests: which test starts the training engine, Airflow, or the cluster, as its own code shows.

`make test-fast` runs the tests that start none of them. A test whose helpers hide the start carries the marker itself.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tasks.stages import PIPELINE

ON_CPU = PIPELINE[: [stage.gpu for stage in PIPELINE].index(True)]  # these stages start no process of the engine
DATA_STAGES = {stage.name for stage in ON_CPU}
FIXTURES = {
    "shared": ("airflow", "airflow"), "airflow_home": ("airflow",), "running": ("cluster",), "train_job": ("engine",),
    "trained": ("engine",),
}  # fmt: skip
TIERS = {"engine": 1, "airflow": 3, "cluster": 100}  # how long a start takes, roughly, compared with the engine's
HIDDEN = 3  # starts that a marker in a test's file stands for, roughly


def starts(item: pytest.Function) -> Counter[str]:
    """Return how often a test's fixtures and calls ask for each tier, as far as its own code shows."""
    return _calls(item.function) + Counter(tier for name in item.fixturenames for tier in FIXTURES.get(name, ()))


@cache  # a function may be hundreds of tests
def _calls(function: Callable[..., object]) -> Counter[str]:
    """Return how often the calls in a function ask for each tier.

    Airflow with its UI counts as two: it has four processes of its own, and one for each task.
    """
    found = Counter[str]()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Call):
            words = [word.value for word in ast.walk(node) if isinstance(word, ast.Constant)]
            name = ast.unparse(node.func)
            if (name == "pipeline" and not DATA_STAGES & set(words)) or name == "supervise.run":
                found["engine"] += 1
            elif name == "up" or (name == "subprocess.run" and "airflow" in words):
                found["airflow"] += 2
            elif name in ("retune", "subprocess.Popen", "subprocess.run") and "run" in words:
                found.update(("engine", "airflow"))
    return found


def cost(item: pytest.Item) -> int:
    """Return roughly how long a test takes, compared with the others, by what it starts."""
    found = starts(item) if isinstance(item, pytest.Function) else Counter[str]()
    hidden = {tier for tier in TIERS if tier not in found and item.get_closest_marker(tier)}
    return sum(TIERS[tier] * (HIDDEN if tier in hidden else found[tier]) for tier in hidden | found.keys())


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
