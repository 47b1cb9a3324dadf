"""What became of each recipe with its data and base pinned: published, or refused. Such a one need not run again.

One small document for each, `<store>/<recipe>/outcomes/<mark>.json`.
"""

from __future__ import annotations

from typing import Any

import orjson

from include.recipe import Recipe
from include.storage.artifacts import Store
from include.storage.files import atomic_write, fingerprint, now, to_json

FINAL = ("published", "unchanged", "refused", "rejected")  # verdicts of runs after which nothing is left to do
FOLDER = "outcomes"


def outcome_id(pinned: Recipe) -> str:
    """The name of a recipe with everything pinned, made of what decides the model."""
    return fingerprint(pinned.training_inputs)


def record_outcome(store: Store, pinned: Recipe, verdict: str, **facts: Any) -> None:
    """Note that a run came to its end.

    Args:
        verdict: one of `FINAL`.
        facts: run, version, and whether the recipe's values were its file's own (`own`), which they then remain.
    """
    earlier = find_outcome(store, pinned)
    content = {"dataset": pinned.dataset, "revision": pinned.dataset_revision, "base": pinned.base_revision,
               "verdict": verdict, "at": now(), **facts}  # fmt: skip
    content["from_recipe_file"] = content["from_recipe_file"] or bool(earlier and earlier["from_recipe_file"])
    with store.writing():
        atomic_write(store.path(pinned.name, FOLDER, f"{outcome_id(pinned)}.json"), to_json(content))


def find_outcome(store: Store, pinned: Recipe) -> dict[str, Any] | None:
    """What became of this very recipe; None where no run of it has come to its end."""
    path = store.path(pinned.name, FOLDER, f"{outcome_id(pinned)}.json")
    try:
        with store.reading():
            return orjson.loads(path.fs.cat_file(path.path))
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


def completed_revisions(store: Store, recipe: str, dataset: str) -> list[dict[str, Any]]:
    """Outcomes of a recipe as its file says it, of any revision of a dataset, oldest first."""
    found = store.documents(store.path(recipe, FOLDER)).values()
    own = [entry for entry in found if entry["from_recipe_file"] and entry["dataset"] == dataset]
    return sorted(own, key=lambda entry: entry["at"])
