"""maintenance: remove artifacts, runs, unfinished work and caches that have not been used for long.

Everything that is live, published or in use is kept: the rules are in `include.pipeline.retention`. All machines share
one store. Each machine has a disk of its own, with unfinished work and caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from upath import UPath

from include.errors import RetuneError
from include.paths import recipe_files, var
from include.pipeline.records import log
from include.pipeline.retention import PublishedUnknown, Retention, folders, oldest_kept, read_runs
from include.recipe import Recipe, find_recipe, load_recipe
from include.storage.artifacts import Store
from include.storage.cleanup import LONG_AGO, Removal, remove_caches, remove_work
from tasks.stages import longest_try


def maintain_store(recipe: str = "", dry_run: bool = False) -> list[str]:
    """Remove expired artifacts, checkpoints and runs from the store (`keep_days` in the recipe).

    An artifact was last used when it was made, or by the newest run that used it. The inputs of all published versions
    are kept, and so are those of unfinished runs. A run without a change for a long time no longer counts as unfinished
    (see `include.pipeline.retention`). If a registry cannot be read, nothing of its recipe is removed.

    Args:
        recipe: its name; empty for all recipes.
        dry_run: only log what would be removed.

    Returns:
        One line per recipe.

    Raises:
        NotFound: there is no such recipe.
        NoPermission, TransientError: the store cannot be written, or does not answer.
    """
    store = Store()
    lines = []
    with store.write_errors():
        for each in _recipes(store.root, recipe):
            lines.append(_maintain_recipe(store, each, dry_run))
            log.info("%s", lines[-1])
    return lines


def _maintain_recipe(store: Store, recipe: Recipe, dry_run: bool) -> str:
    retention, removal = Retention(store, recipe, longest_try(recipe)), Removal(recipe.name, dry_run)
    try:
        for expired in retention.expired():
            removal.remove_folder(expired.folder, expired.kind, expired.size)
    except PublishedUnknown as error:
        return f"removed nothing of {recipe.name}: {error}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(retention.kept.items(), reverse=True))
    return f"{removal.summary('artifact')}; kept {retention.kept.total()}" + (f" ({reasons})" if reasons else "")


def maintain_disk(recipe: str = "", dry_run: bool = False) -> list[str]:
    """Remove expired unfinished work from this machine's disk, and old caches and logs.

    Work that a process has locked is kept, and so is the work of a recipe with an unfinished run. Caches and logs
    belong to all recipes: they are removed when they have not been used for the longest time that any recipe keeps.

    Args:
        recipe: its name; empty for all recipes, and for caches and logs.
        dry_run: only log what would be removed.

    Returns:
        One line per recipe, and one for caches and logs.

    Raises:
        NotFound: there is no such recipe.
    """
    store = Store()
    lines = []
    for each in _recipes(UPath(var() / "work"), recipe):
        removal = Removal(f"{each.name} on this machine", dry_run)
        any_active = any(run.active for run in read_runs(store, each, longest_try(each)))
        kept = remove_work(var() / "work" / each.name, LONG_AGO if any_active else oldest_kept(each), removal)
        lines.append(f"{removal.summary('work folder')}; kept {kept}")
        log.info("%s", lines[-1])
    if not recipe:
        lines.append(_maintain_caches(dry_run))
        log.info("%s", lines[-1])
    return lines


def _maintain_caches(dry_run: bool) -> str:
    """Remove caches unused for longer than any recipe's `keep_days` and longest stage timeout together."""
    kept_for = []
    for file in recipe_files():
        with suppress(RetuneError):
            recipe = load_recipe(file)
            kept_for.append(timedelta(days=recipe.keep_days) + longest_try(recipe))
    if not kept_for:
        return "removed no caches of this machine: there is no recipe that can be read"
    removal = Removal("this machine", dry_run)
    remove_caches(var(), datetime.now(UTC) - max(kept_for), removal)
    return removal.summary("cache", "log")


def _recipes(root: UPath, only: str) -> Iterator[Recipe]:
    """Yield the recipes that have a folder below a root. A folder without a readable recipe is logged and skipped."""
    if only:
        find_recipe(only)
    files = {file.stem: file for file in recipe_files()}
    for folder in folders(root):
        if only and folder.name != only:
            continue
        if folder.name not in files:
            log.warning("skipped %s: there is no recipe of that name", folder)
            continue
        try:
            recipe = load_recipe(files[folder.name])
            longest_try(recipe)  # names the stages of timeout_hours that do not exist
            yield recipe
        except RetuneError as error:
            log.warning("skipped %s: its recipe cannot be read: %s", folder, error)
