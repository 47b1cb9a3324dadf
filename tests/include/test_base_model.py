"""Base models and their revisions."""

from __future__ import annotations

from include.base_model import DEMO_SOURCES
from include.paths import PROJECT


def test_the_demos_base_has_another_revision_when_any_of_its_sources_changes() -> None:
    modules = {path.name for path in (PROJECT / "include" / "demo").glob("*.py")} - {"__init__.py"}
    assert set(DEMO_SOURCES) == modules
