"""rollback: a version that was published before becomes live again, because a person says so."""

from __future__ import annotations

from include.errors import BadRecipe, NotFound
from include.recipe import find_recipe, load_recipe
from include.registry import Version, merged_uri, open_registry, registry_uri


def rollback(recipe_name: str, version: str, reason: str) -> str:
    """Make a published version live again in the recipe's registry; returns a line for people.

    It takes no lock that a training holds. A run that was compared with what was live before does not publish over it.

    Args:
        version: its name (v1) or, on the Hub, its commit.
        reason: kept in the registry's history.

    Raises:
        BadRecipe: no reason is given.
        NotFound: there is no such recipe or version; the message lists those that there are.
        NoPermission, Unreachable: the registry cannot be written, or does not answer.
    """
    if not reason.strip():
        raise BadRecipe("no reason is given", "Say why, for those who look at the history later")
    uri = registry_uri(load_recipe(find_recipe(recipe_name)))
    registry = open_registry(uri)
    try:
        before = registry.live()
    except NotFound:  # damaged: all the more reason
        before = None
    now = registry.promote(version.strip(), reason.strip())
    if before and before.content == now.content:
        line = f"{now.name} is live already: {now.place}"
    else:
        line = f"{now.name} is live again instead of {before.name if before else 'none'}: {now.place}"
    return line + _merged(merged_uri(uri), now, reason.strip())


def _merged(uri: str, now: Version, reason: str) -> str:
    """The merged model follows its adapter, where there is one."""
    registry = open_registry(uri)
    live = registry.live()
    if live is None or live.content == now.content:
        return ""
    for version in registry.versions():
        if version.content == now.content:
            return f"; merged: {registry.promote(version.revision, reason).place}"
    return f"; no merged model of {now.name} was ever published, {live.name} stays live in {uri}"
