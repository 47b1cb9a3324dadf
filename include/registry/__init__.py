"""Registries: published versions of adapters, in a folder, on an object store or on the Hugging Face Hub.

A version is immutable and is identified by the digest of its content; the same content twice is one version.
Publishing is a compare-and-swap on the version that the candidate was compared with, so that two runs cannot silently
overwrite each other. Only `promote`, called by a person with a reason, makes an older version live again.
"""

from __future__ import annotations

import re
from pathlib import Path

from include.errors import BadRecipe
from include.paths import registry_root
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
    """Return the registry at a URI: `file:///folder`, `s3://bucket/path` (see `SCHEMES`) or `hf://owner/name`.

    Raises:
        BadRecipe: the URI has another form.
    """
    scheme, _, path = uri.partition("://")
    if scheme == "hf" and re.fullmatch(r"[^/]+/[^/]+", path):
        return HubRegistry(path)
    if scheme == "file" and path.startswith("/"):
        return FolderRegistry(Path(path))
    if scheme in SCHEMES and re.fullmatch(r"[^/]+/.+", path):
        return ObjectRegistry(uri)
    raise BadRecipe(
        f"field 'registry': {uri} is neither file:///folder, {'://bucket/path, '.join(SCHEMES)}://bucket/path nor "
        "hf://owner/name",
        "Correct the field in the recipe; if the recipe has no such field, correct RETUNE_REGISTRY",
    )


def registry_uri(recipe_name: str, registry: str | None) -> str:
    """Return the URI of a recipe's registry.

    Args:
        registry: the recipe's field; None for the recipe's own folder under `RETUNE_REGISTRY`.
    """
    return registry or f"{registry_root()}/{recipe_name}"


def merged_uri(uri: str) -> str:
    """Return the URI of the registry for merged models that belongs to a registry of adapters.

    Merged models have a registry of their own because vLLM loads whole repositories only. A merged version has the
    `content` of its adapter.
    """
    return f"{uri}-merged"
