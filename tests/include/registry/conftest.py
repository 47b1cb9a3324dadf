"""Fixtures of the registries' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from include.registry import content_digest
from include.storage.files import MANIFEST, describe_files, to_json


@pytest.fixture
def version(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder as `publish` makes it."""

    def make(weights: bytes, card: str = "card", extra: str = "", run: str = "run") -> Path:
        folder = tmp_path / f"version-{len(list(tmp_path.glob('version-*')))}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text("{}")
        if extra:
            (folder / extra).write_text("more")
        files = describe_files(folder)
        (folder / MANIFEST).write_bytes(to_json({"run": run, "content": content_digest(files), "files": files}))
        (folder / "README.md").write_text(card)
        return folder

    return make
