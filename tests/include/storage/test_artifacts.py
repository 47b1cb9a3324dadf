"""The artifact store: complete or absent, on a disk and on an object store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from include.errors import NoPermission
from include.storage.artifacts import Store
from include.storage.files import DAMAGED, MANIFEST, fingerprint


def work_folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "deep").mkdir(parents=True)
    (work / "deep" / "data.bin").write_bytes(b"x" * 1000)
    (work / "note.txt").write_text("hello")
    return work


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_an_artifact_is_found_whole_and_read_from_any_kind_of_store(kind: str, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store" if kind == "file" else f"memory://{tmp_path.name}")
    assert store.find("r", "train", "abc") is None
    store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={"loss": 1.5}, summary="done")
    found = store.find("r", "train", "abc")
    assert found is not None
    assert found.metadata == {"loss": 1.5}
    local = found.local()
    assert (local / "deep" / "data.bin").read_bytes() == b"x" * 1000
    assert found.local() == local
    assert not (tmp_path / "work").exists()


def test_without_its_manifest_or_one_of_its_files_an_artifact_is_absent_and_can_be_made_again(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    for missing in (MANIFEST, "note.txt"):
        folder = store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="").local()
        (folder / missing).unlink()
        assert store.find("r", "train", "abc") is None
        store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="")
        assert store.find("r", "train", "abc") is not None
        kept = [path for path in folder.parent.iterdir() if path.name != "abc"]
        assert [DAMAGED in path.name for path in kept] == ([True] if missing == "note.txt" else [])
        assert all((path / "deep" / "data.bin").exists() for path in kept), "a damaged artifact is moved, not deleted"


def test_a_cut_file_makes_an_artifact_absent(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    folder = store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="").local()
    (folder / "deep" / "data.bin").write_bytes(b"x" * 999)
    assert store.find("r", "train", "abc") is None


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(f"file://{tmp_path}/file/store")
    with pytest.raises(NoPermission, match="the store file://.* cannot be written"):
        store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="")
    assert (tmp_path / "work" / "note.txt").exists(), "the work must not be lost"
    shutil.rmtree(tmp_path / "work")


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
