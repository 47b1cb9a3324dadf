"""rollback: make a published version live again, because a person asks for it."""

from __future__ import annotations

from include.errors import BadRecipe, NotFound
from include.recipe import find_recipe, load_recipe
from include.registry import Version, merged_uri, open_registry, registry_uri


def rollback(recipe_name: str, version: str, reason: str) -> str:
    """Make a published version live again in the recipe's registry, and return a line for people.

    A rollback does not wait for a training. A run whose candidate was compared with the version that was live before
    does not publish: it ends with a Conflict.

    Args:
        version: its name (v1) or, on the Hub, its commit.
        reason: kept in the registry's history.

    Raises:
        BadRecipe: no reason is given.
        NotFound: there is no such recipe or version; the message lists the versions.
        NoPermission, Unreachable: the registry cannot be written, or does not answer.
    """
    if not reason.strip():
        raise BadRecipe("no reason is given", "Give a reason; it is kept in the history")
    recipe = load_recipe(find_recipe(recipe_name))
    uri = registry_uri(recipe.name, recipe.registry)
    registry = open_registry(uri)
    try:
        before = registry.live()
    except NotFound:  # the live version is damaged, and the rollback replaces it
        before = None
    now = registry.promote(version.strip(), reason.strip())
    if before and before.content == now.content:
        line = f"{now.name} is live already: {now.place}"
    else:
        line = f"{now.name} is live again instead of {before.name if before else 'none'}: {now.place}"
    return line + _promote_merged(merged_uri(uri), now, reason.strip())


def _promote_merged(uri: str, adapter: Version, reason: str) -> str:
    """Make the merged model of an adapter live, if merged models are published, and return an addition to the line."""
    registry = open_registry(uri)
    live = registry.live()
    if live is None or live.content == adapter.content:
        return ""
    for version in registry.versions():
        if version.content == adapter.content:
            return f"; merged: {registry.promote(version.revision, reason).place}"
    return f"; no merged model of {adapter.name} was ever published, {live.name} stays live in {uri}"
