"""Object stores, on a real S3 server: killed, pinned and racing publishers, other workers' writes, clear failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from include.errors import NoPermission, NotFound, TransientError, Unreachable
from include.paths import registry_root
from include.pipeline.stage import recorded
from include.registry import ObjectRegistry, content_digest
from include.storage.artifacts import Store
from include.storage.files import MANIFEST, describe_files, to_json
from include.storage.lock import Lease, lock
from include.storage.locations import open_path
from tests.conftest import PROJECT
from tests.services.s3 import S3, Proxy, forget_clients

LAPSE = 9.0
PUBLISH = """
import sys
from pathlib import Path
from include.errors import RetuneError
from include.registry import ObjectRegistry
try:
    print(ObjectRegistry(sys.argv[1], float(sys.argv[3])).publish(Path(sys.argv[2]), sys.argv[4] or None, True).name)
except RetuneError as error:
    print(type(error).__name__, error)
"""
PROMOTE = """
import sys
from include.registry import ObjectRegistry
for number in range(4):
    ObjectRegistry(sys.argv[1]).promote(f"v{number % 2 + 1}", f"{sys.argv[2]} {number}")
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A worker: another process, with a folder of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=PROJECT, env={**os.environ, **environment},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=120)[0].strip()


@pytest.fixture
def version(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder as `publish` makes it, of a few files."""

    def make(weights: str) -> Path:
        folder = tmp_path / f"version-{weights}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text(weights * 1000)
        (folder / "adapter_config.json").write_text("{}")
        files = describe_files(folder)
        (folder / MANIFEST).write_bytes(to_json({"run": weights, "content": content_digest(files), "files": files}))
        (folder / "README.md").write_text("card")
        return folder

    return make


def whole(registry: ObjectRegistry, weights: str) -> None:
    """There is one version, it is live, whole, and in the history once."""
    (version,) = registry.versions()
    assert (registry.live(), version.run) == (version, weights)
    folder = registry.fetch(version.name)
    assert (folder / "adapter_model.safetensors").read_text() == weights * 1000
    assert json.loads((folder / MANIFEST).read_bytes())["files"].items() <= describe_files(folder).items()
    assert (folder / "README.md").read_text() == "card"
    assert [made["run"] for made in registry.manifests()] == [weights]


def history(s3: S3, place: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((s3.folder / place / "history").iterdir())]


def test_a_publisher_killed_after_any_request_leaves_what_the_next_try_makes_one_version_of(
    s3: S3, version: Callable
) -> None:
    one, two = version("one"), version("two")

    def killed_after(request: int) -> str:
        uri = f"s3://retune/killed-{request}"

        def strike(number: int, path: str) -> None:
            if number == request:
                victim.kill()

        with Proxy(s3, strike) as proxy:
            victim = python(PUBLISH, uri, str(one), str(LAPSE), "", **proxy.environment)
            name = said(victim)
        registry = ObjectRegistry(uri, LAPSE)
        done = said(python(PUBLISH, uri, str(one), str(LAPSE), ""))
        assert done in ("v1", "v2"), "the number of a half is not taken again"
        whole(registry, "one")
        assert [entry["live"] for entry in history(s3, f"retune/killed-{request}")] == [done]
        assert not [key for key in s3.objects("retune") if key.startswith(f"killed-{request}/claims/")]
        if request in (3, 5):
            after = said(python(PUBLISH, uri, str(two), str(LAPSE), done))
            assert [version.name for version in registry.versions()] == [done, after]
        halves = {key.split("/")[2] for key in s3.objects("retune") if key.startswith(f"killed-{request}/versions/")}
        assert halves == {version.name for version in registry.versions()}
        return name

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(killed_after, range(1, 10)))
    # claim, three files, manifest, live, history; then the claim is withdrawn
    assert ended[:7] == [""] * 7, "it was killed before it could say that it was done"
    assert ended[8] == "v1", "there is no ninth request"


def test_of_many_publishers_at_once_one_wins_and_no_change_is_lost(s3: S3, version: Callable) -> None:
    uri = "s3://retune/registry/small"
    folders = [version(weights) for weights in ("a", "b", "c", "d")]
    racing = [python(PUBLISH, uri, str(folder), "60", "") for folder in folders]
    words = Counter(said(process).split()[0] for process in racing)
    assert words == {"v1": 1, "Conflict": 3}
    registry = ObjectRegistry(uri)
    (first,) = registry.versions()
    assert registry.live() == first
    loser = next(folder for folder in folders if json.loads((folder / MANIFEST).read_bytes())["run"] != first.run)
    registry.publish(loser, "v1", True)

    promoting = [python(PROMOTE, uri, who) for who in ("ann", "bob", "cid")]
    assert [process.wait(120) for process in promoting] == [0, 0, 0]
    entries = history(s3, "retune/registry/small")
    assert [entry["entry"] for entry in entries] == list(range(1, len(entries) + 1))
    assert [entry["instead_of"] for entry in entries] == [None, *(entry["live"] for entry in entries[:-1])]
    assert registry.live().name == entries[-1]["live"]
    assert len({entry["reason"] for entry in entries[2:]}) == len(entries) - 2, "each by another call"


def test_a_publisher_that_was_frozen_longer_than_its_claim_lasts_changes_nothing_when_it_wakes(
    s3: S3, version: Callable
) -> None:
    uri, pinned = "s3://retune/registry", threading.Event()

    def strike(number: int, path: str) -> None:
        if "/versions/" in path and not pinned.is_set():
            os.kill(sleeper.pid, signal.SIGSTOP)
            pinned.set()

    with Proxy(s3, strike) as proxy:
        sleeper = python(PUBLISH, uri, str(version("slow")), str(LAPSE), "", **proxy.environment)
        try:
            assert pinned.wait(60)
            assert said(python(PUBLISH, uri, str(version("quick")), str(LAPSE), "")) == "v2"
        finally:
            sleeper.send_signal(signal.SIGCONT)
        word = said(sleeper)
    assert word.startswith(("TransientError the object store did not answer for 4.5 s", "Unreachable")), word
    whole(ObjectRegistry(uri), "quick")


def test_a_claim_that_is_renewed_is_respected_and_one_that_is_not_lapses(s3: S3) -> None:
    folder = open_path("s3://retune/registry/claims")
    with (
        lock(folder, lapse=2),
        pytest.raises(TransientError, match=r"s3://retune/registry is being changed by \S+ \d+ for 5 s"),
        lock(folder, lapse=2, patience=5),
    ):
        pass
    assert s3.objects("retune") == set()
    Lease(folder / "dead", 2).renew()
    with lock(folder, lapse=2) as claim:
        assert s3.objects("retune") == {f"registry/claims/{claim.path.name}"}


def test_what_says_what_is_live_may_be_damaged_and_a_rollback_mends_it(s3: S3, version: Callable) -> None:
    registry = ObjectRegistry("s3://retune/registry")
    registry.publish(version("one"), None, True)
    registry.publish(version("two"), "v1", True)
    (s3.folder / "retune/registry/live.json").write_text("{")
    with pytest.raises(NotFound, match="live.json is damaged. Make a version live with the DAG rollback"):
        registry.live()
    assert registry.promote("v1", "live.json was damaged").name == "v1"
    assert registry.live().name == "v1"
    assert [entry["live"] for entry in history(s3, "retune/registry")] == ["v1", "v2", "v1"]
    manifest = registry.root / "versions" / "v2" / MANIFEST
    manifest.fs.rm_file(manifest.path)
    with pytest.raises(NotFound, match="the version v2 is not in s3://retune/registry, or its manifest is damaged"):
        registry.manifests()
    assert [version.name for version in registry.versions()] == ["v1"]


# --- the store ---

COMMIT = """
import sys
from pathlib import Path
from include.storage.artifacts import Store
work = Path(sys.argv[1])
work.mkdir(parents=True)
for number in range(3):
    (work / f"{number}.bin").write_bytes(sys.argv[2].encode())
Store().commit(work, "small", "train", sys.argv[3], summary="", metadata={"by": sys.argv[2]}, inputs={})
Store().write_record("small", "run", sys.argv[3], {"by": sys.argv[2]})
"""


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("RETUNE_STORE", "s3://retune/store")
    monkeypatch.setenv("RETUNE_REGISTRY", "s3://retune/registry")
    assert registry_root() == "s3://retune/registry"
    return Store()


def worked(store: Store, tmp_path: Path, by: str, mark: str) -> None:
    process = python(COMMIT, str(tmp_path / f"{by}-{mark}"), by, mark)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_what_another_worker_has_written_or_removed_is_seen_at_once(store: Store, s3: S3, tmp_path: Path) -> None:
    worked(store, tmp_path, "one", "a")
    assert store.find("small", "train", "a")
    assert store.find("small", "train", "b") is None
    assert set(store.read_records("small", "run")) == {"a"}
    folder = store.path("small", "train")
    assert sorted(path.name for path in folder.iterdir()) == ["a"]
    worked(store, tmp_path, "two", "b")
    assert store.find("small", "train", "b").metadata == {"by": "two"}
    assert set(store.read_records("small", "run")) == {"a", "b"}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    worked(store, tmp_path, "three", "a")
    assert (store.find("small", "train", "a").local() / "0.bin").read_bytes() == b"three"
    subprocess.run(
        [sys.executable, "-c", "from include.storage.artifacts import *; p = Store().path('small/train/b/1.bin'); p.fs.rm(p.path)"],
        cwd=PROJECT, check=True,
    )  # fmt: skip
    assert store.find("small", "train", "b") is None


def test_many_files_are_committed_with_few_requests_at_a_time_and_found_with_two(
    store: Store, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "many"
    (work / "deep").mkdir(parents=True)
    for number in range(300):
        (work / "deep" / f"{number}.bin").write_bytes(b"x" * number)
    store.commit(work, "small", "template", "many", summary="", metadata={}, inputs={})
    requests: list[str] = []
    with Proxy(s3, lambda number, path: None, requests.append) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        forget_clients()
        assert len(Store().find("small", "template", "many").manifest["files"]) == 300
    assert len(requests) == 2, requests


@pytest.mark.parametrize("many", [1, 3])
def test_what_is_removed_goes_manifest_first_and_a_kill_on_the_way_leaves_nothing_half_valid(
    store: Store, s3: S3, tmp_path: Path, many: int
) -> None:
    worked(store, tmp_path, "one", "a")

    def strike(number: int, path: str) -> None:
        if number == many:
            remover.kill()

    with Proxy(s3, strike) as proxy:
        remover = python(
            "from include.storage.artifacts import *; from include.storage.files import *; remove(Store().path('small', 'train', 'a'))", **proxy.environment
        )
        said(remover)
    assert store.find("small", "train", "a") is None
    left = {key for key in s3.objects("retune") if key.startswith("store/small/train/a/")}
    assert len(left) == (3 if many == 1 else 0)


def broken(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()


FAILURES: dict[str, tuple[dict[str, str], type[Exception], str, str]] = {
    "no bucket": (
        {"RETUNE_STORE": "s3://nowhere/store", "RETUNE_REGISTRY": "s3://nowhere/registry"},
        NotFound, "the bucket of the {kind} s3://nowhere/{kind}.* does not exist", "Create it, or correct .*{setting}",
    ),
    "wrong secret": (
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
        NoPermission, "the {kind} s3://retune/{kind}.* does not let this account in", "Correct AWS_ACCESS_KEY_ID and",
    ),
    "unknown key": (
        {"AWS_ACCESS_KEY_ID": "nobody"},
        NoPermission, "the {kind} s3://retune/{kind}.* does not let this account in", "Correct AWS_ACCESS_KEY_ID and",
    ),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
        NoPermission, "the {kind} s3://retune/{kind}.* needs credentials, and there are none", "Set AWS_ACCESS_KEY_ID",
    ),
    "no server": (
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"},
        Unreachable, "the {kind} s3://retune/{kind}.* does not answer", "{setting} and AWS_ENDPOINT_URL_S3",
    ),
    "no address": (
        {"AWS_ENDPOINT_URL_S3": "minio:9000"},
        NoPermission, "the {kind} s3://retune/{kind}.* cannot be asked", "AWS_ENDPOINT_URL_S3 as http",
    ),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_is_a_sentence_and_never_looks_like_nothing(
    failure: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked(store, tmp_path, "one", "a")
    environment, kind, what, do = FAILURES[failure]
    broken(monkeypatch, **environment)
    store, registry = Store(), ObjectRegistry(f"{registry_root()}/small", LAPSE)
    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("store", "RETUNE_STORE", store.probe),
        ("store", "RETUNE_STORE", lambda: store.find("small", "train", "a")),
        ("store", "RETUNE_STORE", lambda: store.read_records("small", "run")),
        ("registry", "RETUNE_REGISTRY", registry.check),
        ("registry", "RETUNE_REGISTRY", registry.live),
        ("registry", "RETUNE_REGISTRY", registry.manifests),
    ]
    for name, setting, call in calls:
        with pytest.raises(kind, match=what.format(kind=name, setting=setting)) as caught:
            call()
        assert re.search(do.format(kind=name, setting=setting), caught.value.do), caught.value.do
        assert "\n" not in str(caught.value)
    if failure == "no bucket":
        assert not (tmp_path / "s3" / "nowhere").exists(), "a bucket is not made by a slip of the pen"


def test_a_stage_says_so_when_the_store_goes_away_under_it_and_a_line_that_is_lost_is_no_failure(
    store: Store, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()
    with (
        pytest.raises(Unreachable, match="the store s3://retune/store does not answer"),
        recorded(Store(), "small", "run", "train") as record,
    ):
        s3.stop()
        record.say("step 1")
        (store.path("small") / "x").read_bytes()
    s3.start()
    assert store.read_records("small", "run")["train"]["state"] == "running"
