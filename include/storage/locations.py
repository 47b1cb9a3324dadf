"""Locations: open a URI as a path, and tell a local path from one on an object store."""

from __future__ import annotations

from pathlib import Path

from upath import UPath


def is_local(path: UPath | Path) -> bool:
    """Return whether a path is on this machine's disk."""
    return not isinstance(path, UPath) or path.protocol in ("", "file", "local")


def open_path(uri: str) -> UPath:
    """Return the path of a URI. Listings are not cached, because another worker may have written meanwhile."""
    remote = "://" in uri and not uri.startswith(("file:", "local:"))
    return UPath(uri, use_listings_cache=False) if remote else UPath(uri)
