"""Outcomes: the final verdict on each pinned recipe. A pinned recipe with an outcome need not run again.

One small document each, `<store>/<recipe>/outcomes/<fingerprint>.json`.
"""

from __future__ import annotations

from typing import Any

import orjson

from include.recipe import Recipe
from include.storage.artifacts import Store
from include.storage.files import atomic_write, fingerprint, now, to_json

FINAL = ("published", "unchanged", "refused", "rejected")  # verdicts after which a run has nothing left to do
FOLDER = "outcomes"


def outcome_id(pinned: Recipe) -> str:
    """Return the fingerprint of everything in a pinned recipe that decides the model."""
    return fingerprint(pinned.training_inputs)


def record_outcome(store: Store, pinned: Recipe, verdict: str, **facts: Any) -> None:
    """Write the outcome of a run. An earlier outcome of the same pinned recipe is replaced.

    Args:
        verdict: one of `FINAL`.
        facts: `run`, `version`, and `from_recipe_file`: whether the run used only values of the recipe file. Once True,
            it stays True for this pinned recipe.

    Raises:
        NoPermission, NotFound, NoSpace, TransientError: see `Store.write_errors`.
    """
    earlier = find_outcome(store, pinned)
    content = {"dataset": pinned.dataset, "revision": pinned.dataset_revision, "base": pinned.base_revision,
               "verdict": verdict, "at": now(), **facts}  # fmt: skip
    content["from_recipe_file"] = content["from_recipe_file"] or bool(earlier and earlier["from_recipe_file"])
    with store.write_errors():
        atomic_write(store.path(pinned.name, FOLDER, f"{outcome_id(pinned)}.json"), to_json(content))


def find_outcome(store: Store, pinned: Recipe) -> dict[str, Any] | None:
    """Return the outcome of a pinned recipe, or None if no run of it has ended with one of `FINAL`."""
    path = store.path(pinned.name, FOLDER, f"{outcome_id(pinned)}.json")
    try:
        with store.read_errors():
            return orjson.loads(path.fs.cat_file(path.path))
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


def completed_revisions(store: Store, recipe: str, dataset: str | list[str]) -> list[dict[str, Any]]:
    """Return the outcomes of runs with exactly the recipe file's values, for all dataset revisions, oldest first."""
    outcomes = store.read_documents(store.path(recipe, FOLDER)).values()
    # versions up to 0.4.0 wrote no `from_recipe_file`: their revisions count as not completed
    from_recipe_file = [entry for entry in outcomes if entry.get("from_recipe_file") and entry["dataset"] == dataset]
    return sorted(from_recipe_file, key=lambda entry: entry["at"])
