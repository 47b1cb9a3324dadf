"""The artifact store: complete or absent, on a disk and on an object store."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from include.errors import Damaged, NoPermission
from include.storage.artifacts import Store
from include.storage.files import DAMAGED, MANIFEST, fingerprint
from tests.conftest import PROJECT, unlock


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
        unlock(folder)
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
    unlock(folder)
    (folder / "deep" / "data.bin").write_bytes(b"x" * 999)
    assert store.find("r", "train", "abc") is None


def test_a_committed_artifact_is_read_only_and_a_changed_file_is_found_named_and_set_aside(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    folder = store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="").local()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert modes == {"abc": 0o555, "deep": 0o555, "data.bin": 0o444, "note.txt": 0o444, MANIFEST: 0o444}
    sealed = (folder / "note.txt").stat().st_mtime_ns

    os.utime(folder / "note.txt")  # only its time differs, as after a copy: its digest decides
    assert store.open("r", "train", "abc") is not None
    assert (folder / "note.txt").stat().st_mtime_ns == sealed, "it is not read again at the next check"

    unlock(folder)
    (folder / "note.txt").write_text("hullo")  # as long as before
    with pytest.raises(
        Damaged, match=r"output of train in .*/abc is damaged: note.txt has changed .* Clear the task train"
    ):
        store.open("r", "train", "abc")
    assert store.find("r", "train", "abc") is None, "the next try makes it again"
    (kept,) = folder.parent.glob(f".abc{DAMAGED}*")
    assert (kept / "note.txt").read_text() == "hullo"
    store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="")
    assert store.open("r", "train", "abc") is not None
    assert kept.exists()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_file_that_the_manifest_does_not_name_is_not_read(kind: str, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store" if kind == "file" else f"memory://{tmp_path.name}")
    made = store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="")
    folder = made.local()
    unlock(folder)
    (folder / "deep" / "cache-1.arrow").write_bytes(b"rows")
    assert made.files("deep") == [folder / "deep" / "data.bin"]
    assert store.find("r", "train", "abc") is not None


def test_a_fetched_file_that_was_changed_is_fetched_again(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    made = store.commit(work_folder(tmp_path), "r", "train", "abc", metadata={}, summary="")
    file = made.local() / "note.txt"
    unlock(file.parent)
    file.write_text("hullo")
    assert (made.local() / "note.txt").read_text() == "hello"


# every step that a read-only folder could stop, done by an account that may not write there
UNPRIVILEGED = """
import sys
from pathlib import Path
from include.storage.artifacts import Store
from include.storage.cleanup import Removal
from include.storage.files import MANIFEST, remove

root = Path(sys.argv[1])
store = Store(f"file://{root}/store")

def make():
    (root / "work" / "deep").mkdir(parents=True)
    (root / "work" / "deep" / "file").write_text("hello")
    return store.commit(root / "work", "r", "train", "abc", metadata={}, summary="").local()

folder = make()
for write in (lambda: (folder / "deep" / "file").write_text("x"), lambda: (folder / "deep" / "new").write_text("x")):
    try:
        write()
    except PermissionError:
        continue
    sys.exit("a committed folder was written to")
make()  # in place of the one that is there
assert [path.name for path in folder.parent.iterdir()] == ["abc"], list(folder.parent.iterdir())
Removal("r", dry_run=False).remove_folder(folder, "artifact", 5)
assert list(folder.parent.iterdir()) == []
make()
remove(store.path("r", "train"))
assert list(store.path("r").iterdir()) == []
"""


def obey_permissions() -> None:
    """Give up the right of root to ignore permissions, for the program that is started next."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_artifacts_are_replaced_and_removed_by_an_account_that_may_not_write_to_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNPRIVILEGED, str(tmp_path)]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, check=False, preexec_fn=obey_permissions
    )
    assert done.returncode == 0, done.stderr


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
