"""rollback: a version that was published before becomes live again, because a person says so."""

from __future__ import annotations

from include.errors import BadRecipe
from include.recipe import find, load
from include.registry import open_registry, registry_uri


def rollback(recipe_name: str, version: str, reason: str) -> str:
    """Make a published version live again in the recipe's registry; returns a line for people.

    It takes no lock that a training holds. A run that was compared with what was live before does not publish over it.

    Args:
        version: its name (v1) or, on the Hub, its commit.
        reason: kept in the registry's history.

    Raises:
        BadRecipe: no reason is given.
        Missing: there is no such recipe or version; the message lists those that there are.
        NoPermission, Unreachable: the registry cannot be written, or does not answer.
    """
    if not reason.strip():
        raise BadRecipe("no reason is given", "Say why, for those who look at the history later")
    registry = open_registry(registry_uri(load(find(recipe_name))))
    before = registry.live()
    now = registry.promote(version.strip(), reason.strip())
    if before and before.content == now.content:
        return f"{now.name} is live already: {now.place}"
    return f"{now.name} is live again instead of {before.name if before else 'nothing'}: {now.place}"
