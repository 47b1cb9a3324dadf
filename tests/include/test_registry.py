"""Both kinds of registry: immutable versions, one live, no silent overwriting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from include.errors import BadRecipe, NoPermission, PermanentError
from include.registry import FolderRegistry, content_digest, open_registry
from include.store import MANIFEST, describe_files, to_json
from tests.hub import Hub

PROJECT = Path(__file__).resolve().parents[2]


def version(folder: Path, weights: bytes, card: str = "card") -> Path:
    """A folder as `publish` makes it."""
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text(card)
    content = content_digest(describe_files(folder))
    (folder / MANIFEST).write_bytes(to_json({"content": content, "files": describe_files(folder)}))
    return folder


def test_versions_are_immutable_and_live_moves(tmp_path: Path) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    assert registry.live() is None
    one = registry.publish(version(tmp_path / "a", b"one"), None, True)
    two = registry.publish(version(tmp_path / "b", b"two"), one.revision, True)
    assert (one.name, two.name) == ("v1", "v2")
    assert registry.live() == two
    assert (registry.fetch("v1") / "adapter_model.safetensors").read_bytes() == b"one"
    assert (tmp_path / "registry" / "live" / "adapter_model.safetensors").read_bytes() == b"two"
    assert (registry.fetch("v1") / "adapter_model.safetensors").stat().st_mode & 0o222 == 0


def test_the_same_content_is_one_version_whatever_its_card_says(tmp_path: Path) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    one = registry.publish(version(tmp_path / "a", b"one"), None, True)
    again = registry.publish(version(tmp_path / "b", b"one", card="made later"), one.revision, True)
    assert again == one
    assert len(list((tmp_path / "registry" / "versions").glob("v*"))) == 1


def test_what_went_live_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    registry.publish(version(tmp_path / "a", b"one"), None, True)
    with pytest.raises(PermanentError, match="v1 is live in .*, not nothing, which the candidate was compared with"):
        registry.publish(version(tmp_path / "b", b"two"), None, True)
    assert registry.live().name == "v1"


def test_a_registry_that_cannot_be_written_or_understood_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoPermission, match="field 'registry'"):
        FolderRegistry(tmp_path / "file" / "registry").publish(version(tmp_path / "a", b"one"), None, True)
    with pytest.raises(BadRecipe, match="neither file:///folder nor hf://owner/name"):
        open_registry("file://relative")


HUB_STORY = """
import sys
from pathlib import Path
from include.registry import HubRegistry
from include.errors import PermanentError
registry = HubRegistry("user/adapter")
assert registry.live() is None
one = registry.publish(Path(sys.argv[1]), None, True)
assert registry.live() == one, (registry.live(), one)
assert registry.publish(Path(sys.argv[1]), one.revision, True) == one
try:
    registry.publish(Path(sys.argv[2]), None, True)
    raise SystemExit("a stale parent was accepted")
except PermanentError as error:
    assert "v1 is live" in str(error), error
two = registry.publish(Path(sys.argv[2]), one.revision, True)
assert (one.name, two.name) == ("v1", "v2")
assert (registry.fetch(one.revision) / "adapter_model.safetensors").read_bytes() == b"one"
assert (registry.fetch(two.revision) / "adapter_model.safetensors").read_bytes() == b"two"
"""


def test_the_hub_gets_one_commit_and_one_tag_for_each_version(tmp_path: Path) -> None:
    with Hub() as hub:
        owner = next(iter(hub.tokens.values()))[0]
        done = subprocess.run(
            [sys.executable, "-c", HUB_STORY.replace("user/", f"{owner}/"), version(tmp_path / "a", b"one"),
             version(tmp_path / "b", b"two")],
            cwd=PROJECT, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.write_token}, text=True,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        repository = hub.repos[f"model:{owner}/adapter"]
        assert [c.title for c in repository.commits][1:] == [f"v{i}: adapter published by Retune" for i in (1, 2)]
        assert repository.tags == {f"v{i}": repository.commits[i].sha for i in (1, 2)}
