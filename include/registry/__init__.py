"""Registries: where published adapters live. One interface: a folder, an object store, the Hugging Face Hub.

A version is immutable and is known by the digest of its content; the same content twice is one version. Publishing
names what was live when the candidate was judged, so that two runs cannot silently overwrite each other. An older
version goes live again only when a person says so and why (`promote`).
"""

from __future__ import annotations

import re
from pathlib import Path

from include.errors import BadRecipe
from include.paths import registry_root
from include.recipe import Recipe
from include.registry.folder import FolderRegistry
from include.registry.hub import HubRegistry
from include.registry.interface import CARD, Registry, Version, content_digest
from include.registry.object_store import ObjectRegistry
from include.storage.object_store import SCHEMES

__all__ = [
    "CARD",
    "FolderRegistry",
    "HubRegistry",
    "ObjectRegistry",
    "Registry",
    "Version",
    "content_digest",
    "merged_uri",
    "open_registry",
    "registry_uri",
]


def open_registry(uri: str) -> Registry:
    """The registry at `file:///folder`, `s3://bucket/path` (or another object store's address) or `hf://owner/name`.

    Raises:
        BadRecipe: none of these.
    """
    scheme, _, place = uri.partition("://")
    if scheme == "hf" and re.fullmatch(r"[^/]+/[^/]+", place):
        return HubRegistry(place)
    if scheme == "file" and place.startswith("/"):
        return FolderRegistry(Path(place))
    if scheme in SCHEMES and re.fullmatch(r"[^/]+/.+", place):
        return ObjectRegistry(uri)
    raise BadRecipe(
        f"field 'registry': {uri} is neither file:///folder, {'://bucket/path, '.join(SCHEMES)}://bucket/path nor "
        "hf://owner/name",
        "Correct it in the recipe, or RETUNE_REGISTRY where the recipe names none",
    )


def registry_uri(recipe: Recipe) -> str:
    """Where the recipe's adapters are published: as it says, or in a folder under `RETUNE_REGISTRY`."""
    return recipe.registry or f"{registry_root()}/{recipe.name}"


def merged_uri(uri: str) -> str:
    """Where the merged model of a registry's adapter is published: a repository of its own, since vLLM takes no
    subfolder. The version made of an adapter has the adapter's `content`."""
    return f"{uri}-merged"
