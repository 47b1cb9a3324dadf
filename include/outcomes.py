"""What became of each recipe with its data and base pinned: published, or refused. Such a one need not run again.

One small document for each, `<store>/<recipe>/outcomes/<mark>.json`.
"""

from __future__ import annotations

from typing import Any

import orjson

from include.recipe import Recipe
from include.store import Store, fingerprint, now, to_json, write_aside

FINAL = ("published", "unchanged", "refused", "rejected")  # verdicts of runs after which nothing is left to do
FOLDER = "outcomes"


def mark(frozen: Recipe) -> str:
    """The name of a recipe with everything pinned, made of what decides the model."""
    return fingerprint(frozen.made_of)


def settle(store: Store, frozen: Recipe, verdict: str, **facts: Any) -> None:
    """Note that a run came to its end.

    Args:
        verdict: one of `FINAL`.
        facts: run, version, and whether the recipe's values were its file's own (`own`), which they then remain.
    """
    earlier = outcome(store, frozen)
    content = {"dataset": frozen.dataset, "revision": frozen.dataset_revision, "base": frozen.base_revision,
               "verdict": verdict, "at": now(), **facts}  # fmt: skip
    content["own"] = content["own"] or bool(earlier and earlier["own"])
    with store.writing():
        write_aside(store.path(frozen.name, FOLDER, f"{mark(frozen)}.json"), to_json(content))


def outcome(store: Store, frozen: Recipe) -> dict[str, Any] | None:
    """What became of this very recipe; None where no run of it has come to its end."""
    path = store.path(frozen.name, FOLDER, f"{mark(frozen)}.json")
    try:
        with store.reading():
            return orjson.loads(path.fs.cat_file(path.path))
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


def settled(store: Store, recipe: str, dataset: str) -> list[dict[str, Any]]:
    """Outcomes of a recipe as its file says it, of any revision of a dataset, oldest first."""
    found = store.documents(store.path(recipe, FOLDER)).values()
    own = [entry for entry in found if entry["own"] and entry["dataset"] == dataset]
    return sorted(own, key=lambda entry: entry["at"])
