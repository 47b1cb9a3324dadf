"""All kinds of registries: immutable versions, one of them live, no lost updates, nothing incomplete after a fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from include.errors import BadRecipe, Conflict, GateRefused, NoPermission, NotFound, PermanentError, Unreachable
from include.registry import FolderRegistry, HubRegistry, ObjectRegistry, Registry, open_registry
from include.storage.files import describe_files
from include.storage.hub import MAX_TRIES, hub_api, hub_errors
from tests.services.hub import Hub

ONE, TWO, THREE = b"one" * 100, b"two" * 100, b"three" * 100


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub; the environment has its address and token."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.write_token)
        yield hub


TTL = 6.0  # seconds: when the lease of a dead publisher expires in these tests


@pytest.fixture(params=["folder", "objects", "hub"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """An empty registry of each kind."""
    if request.param == "folder":
        return FolderRegistry(tmp_path / "registry")
    if request.param == "objects":
        request.getfixturevalue("s3")
        return ObjectRegistry("s3://retune/registry/small", TTL)
    request.getfixturevalue("hub")
    return HubRegistry("owner/adapter")


def weights(registry: Registry, revision: str) -> bytes:
    return (registry.fetch(revision) / "adapter_model.safetensors").read_bytes()


def test_versions_are_immutable_and_live_moves(registry: Registry, version: Callable) -> None:
    assert (registry.live(), registry.versions()) == (None, [])
    registry.check()
    one = registry.publish(version(ONE, run="first"), None, True)
    assert registry.live() == one
    two = registry.publish(version(TWO), one.revision, True)
    assert (one.name, two.name, one.run) == ("v1", "v2", "first")
    assert registry.live() == two
    assert registry.versions() == [one, two]
    assert (weights(registry, one.revision), weights(registry, two.revision)) == (ONE, TWO)


def test_the_same_content_is_one_version_whatever_its_card_says(registry: Registry, version: Callable) -> None:
    one = registry.publish(version(ONE, run="first"), None, True)
    again = registry.publish(version(ONE, card="made later", run="second"), one.revision, True)
    assert again == one
    assert registry.versions() == [one]


def test_a_version_that_went_live_since_the_comparison_is_not_replaced(registry: Registry, version: Callable) -> None:
    one = registry.publish(version(ONE), None, True)
    with pytest.raises(Conflict, match="v1 is live in .*, not nothing, which the candidate was compared with"):
        registry.publish(version(TWO), None, True)
    two = registry.publish(version(TWO), one.revision, True)
    with pytest.raises(Conflict, match="v2 is live in .*, not v1, .* Clear the task evaluate") as race:
        registry.publish(version(THREE), one.revision, True)
    assert race.value.retryable
    assert registry.live() == two


def test_an_older_version_is_promoted_and_the_next_version_follows_it(registry: Registry, version: Callable) -> None:
    one = registry.publish(version(ONE, card="card one"), None, True)
    two = registry.publish(version(TWO, card="card two", extra="more.json"), one.revision, True)
    again = registry.promote("v1", "v2 insults people,\nsays support")
    assert (again.name, again.content) == ("v1", one.content)
    assert registry.live() == again
    assert registry.promote(one.revision, "once more") == again, "v1 is already live"
    folder = registry.fetch(again.revision)
    assert (weights(registry, again.revision), (folder / "README.md").read_text()) == (ONE, "card one")
    assert not (folder / "more.json").exists(), "a file that only v2 had"
    assert [v.name for v in registry.versions()] == ["v1", "v2"]
    with pytest.raises(
        GateRefused, match="the candidate is v2 of .*, which was published before and is not live any more"
    ):
        registry.publish(version(TWO, extra="more.json"), again.revision, True)
    with pytest.raises(Conflict, match="v1 is live in .*, not v2"):
        registry.publish(version(THREE), two.revision, True)
    three = registry.publish(version(THREE), again.revision, True)
    assert (three.name, registry.live()) == ("v3", three)
    assert registry.promote("v2", "it was a mistake").name == "v2"
    assert weights(registry, registry.live().revision) == TWO
    with pytest.raises(NotFound, match="v9 is not in .* Choose one of these: v1, v2, v3"):
        registry.promote("v9", "why")


def test_reasons_are_recorded(tmp_path: Path, hub: Hub, version: Callable) -> None:
    folder, remote = FolderRegistry(tmp_path / "registry"), HubRegistry("owner/adapter")
    for registry in (folder, remote):
        one = registry.publish(version(ONE), None, True)
        registry.publish(version(TWO), one.revision, True)
        registry.promote("v1", "v2 insults people")
    last = json.loads((tmp_path / "registry" / "history.jsonl").read_text().splitlines()[-1])
    assert (last["live"], last["instead_of"], last["reason"]) == ("v1", "v2", "v2 insults people")
    repository = hub.repos["model:owner/adapter"]
    commits = [(commit.title, commit.message) for commit in repository.commits][1:]
    assert commits == [
        ("v1: adapter published by Retune", ""),
        ("v2: adapter published by Retune", ""),
        ("v1 is live again: v2 insults people", "Instead of v2. v2 insults people"),
    ]
    assert repository.tags == {f"v{i}": repository.commits[i].sha for i in (1, 2)}
    assert [path for _, path, _ in hub.requests if path.startswith("/lfs/")].__len__() == 2, "nothing is uploaded again"


def test_a_commit_of_a_person_is_not_a_version_and_its_files_are_kept(hub: Hub, version: Callable) -> None:
    registry = HubRegistry("owner/adapter")
    one = registry.publish(version(ONE, extra="old.json"), None, True)
    hub.put("owner/adapter", {"README.md": "edited by hand", "picture.png": b"x"})
    assert registry.live().name == "v1"
    two = registry.publish(version(TWO), one.revision, True)
    assert two.name == "v2"
    files = hub.repos["model:owner/adapter"].head.files
    assert "picture.png" in files and "old.json" not in files


def test_a_fetch_into_an_empty_folder_takes_nothing_from_the_cache(hub: Hub, tmp_path: Path, version: Callable) -> None:
    registry = HubRegistry("owner/adapter")
    one = registry.publish(version(ONE), None, True)
    digests = registry.file_digests(one.revision)
    cached = registry.fetch(one.revision) / "adapter_model.safetensors"
    cached.resolve().write_bytes(b"damaged")
    fresh = registry.fetch(one.revision, into=tmp_path / "empty")
    assert (fresh / "adapter_model.safetensors").read_bytes() == ONE
    assert digests["adapter_model.safetensors"] == describe_files(fresh)["adapter_model.safetensors"]["sha256"]


def test_a_registry_that_cannot_be_written_or_has_a_bad_uri_is_a_clear_error(tmp_path: Path, version: Callable) -> None:
    (tmp_path / "file").write_text("")
    blocked = FolderRegistry(tmp_path / "file" / "registry")
    for call in (blocked.check, lambda: blocked.publish(version(ONE), None, True)):
        with pytest.raises(NoPermission, match="field 'registry'"):
            call()
    with pytest.raises(BadRecipe, match="neither file:///folder, s3://bucket/path, .* nor hf://owner/name"):
        open_registry("file://relative")


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "there is no token"),
        ("read", "the token that was given does not allow it"),
        ("hf_wrong", "does not allow it"),
    ],
)
def test_the_error_for_an_insufficient_token_names_the_setting(
    exists: bool, token: str, message: str, hub: Hub, version: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exists:
        hub.put("owner/adapter", {"README.md": "there"}, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.read_token if token == "read" else token)
    registry = HubRegistry("owner/adapter")
    for call in (registry.check, lambda: registry.publish(version(ONE), None, True)):
        with pytest.raises(NoPermission, match=message) as refused:
            call()
        assert "Airflow connection huggingface_default, or into HF_TOKEN" in refused.value.do
        assert "a token of the type Write" in refused.value.do
    assert len(hub.repos) == int(exists)


def test_the_namespace_of_another_account_is_refused_before_a_repository_is_created(hub: Hub) -> None:
    with pytest.raises(NoPermission, match="write to the repository stranger/adapter"):
        HubRegistry("stranger/adapter").check()


# Faults of the Hub or the network at each request of a publication; the client itself repeats some of the requests.
FAULTS: dict[str, Callable[[Hub, str], Any]] = {
    "create 503": lambda hub, name: hub.fail("POST", "/api/repos/create", 503),
    "create, answer lost": lambda hub, name: hub.cut("POST", "/api/repos/create"),
    "refs 500": lambda hub, name: hub.fail("GET", f"/{name}/refs", 500),
    "refs cut": lambda hub, name: hub.cut("GET", f"/{name}/refs", after_bytes=5),
    "card check 502": lambda hub, name: hub.fail("POST", "/api/validate-yaml", 502),
    "preupload 429": lambda hub, name: hub.fail("POST", f"/{name}/preupload/", 429, retry_after=0),
    "lfs batch 500": lambda hub, name: hub.fail("POST", f"/{name}.git/info/lfs/objects/batch", 500),
    "upload cut": lambda hub, name: hub.cut("PUT", f"/lfs/models/owner/{name}/", after_bytes=100),
    "lfs verify 503": lambda hub, name: hub.fail("POST", f"/{name}.git/info/lfs/objects/verify", 503),
    "commit 429": lambda hub, name: hub.fail("POST", f"/{name}/commit/", 429, retry_after=1),
    "commit 500": lambda hub, name: hub.fail("POST", f"/{name}/commit/", 500, times=3),
    "commit 503, applied": lambda hub, name: hub.fail("POST", f"/{name}/commit/", 503, applied=True),
    "commit, answer lost": lambda hub, name: hub.cut("POST", f"/{name}/commit/"),
    "commit, answer cut": lambda hub, name: hub.cut("POST", f"/{name}/commit/", after_bytes=5),
    "commit, request cut": lambda hub, name: hub.cut("POST", f"/{name}/commit/", side="request"),
    "tag 500": lambda hub, name: hub.fail("POST", f"/{name}/tag/", 500),
    "tag, answer lost": lambda hub, name: hub.cut("POST", f"/{name}/tag/"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_there_is_one_commit_and_one_tag(fault: str, hub: Hub, version: Callable) -> None:
    FAULTS[fault](hub, "adapter")
    registry = HubRegistry("owner/adapter")
    done = registry.publish(version(ONE), None, True)
    assert all(fault.times == 0 for fault in hub.faults), "the fault happened"
    repository = hub.repos["model:owner/adapter"]
    assert [commit.title for commit in repository.commits][1:] == ["v1: adapter published by Retune"]
    assert repository.tags == {"v1": repository.head.sha}
    assert (done.name, done.revision) == ("v1", repository.head.sha)
    assert registry.live() == done


def test_after_a_fault_a_later_version_and_a_rollback_are_one_commit_each(hub: Hub, version: Callable) -> None:
    registry = HubRegistry("owner/adapter")
    one = registry.publish(version(ONE), None, True)
    hub.fail("POST", "/commit/", 503, applied=True, retry_after=0)
    assert registry.publish(version(TWO), one.revision, True).name == "v2"
    hub.cut("POST", "/commit/")
    assert registry.promote("v1", "to see").name == "v1"
    repository = hub.repos["model:owner/adapter"]
    assert (len(repository.commits), list(repository.tags)) == (4, ["v1", "v2"])


def test_a_hub_that_never_answers_is_one_clear_error(hub: Hub, version: Callable) -> None:
    hub.fail("POST", "/commit/", 503, times=100, retry_after=0)
    with pytest.raises(Unreachable, match="the Hub answered 503 for the repository owner/adapter"):
        HubRegistry("owner/adapter").publish(version(ONE), None, True)
    repository = hub.repos["model:owner/adapter"]
    assert (len(repository.commits), repository.tags) == (1, {})
    assert [status for _, path, status in hub.requests if "/commit/" in path] == [503] * MAX_TRIES
    hub.faults.clear()
    hub.fail("POST", "/commit/", 400)
    with pytest.raises(PermanentError, match="refused the repository owner/adapter .400."):
        HubRegistry("owner/adapter").publish(version(ONE), None, True)


def test_the_next_try_sets_the_missing_tag_of_a_commit(hub: Hub, version: Callable) -> None:
    registry = HubRegistry("owner/adapter")
    one = registry.publish(version(ONE), None, True)
    repository = hub.repos["model:owner/adapter"]
    repository.tags.clear()
    assert registry.publish(version(ONE), None, True) == one, "by the same run"
    assert repository.tags == {"v1": one.revision}
    repository.tags.clear()
    two = registry.publish(version(TWO), one.revision, True)
    assert repository.tags == {"v1": one.revision, "v2": two.revision}, "by the next run"


def test_of_two_runs_that_race_one_wins(registry: Registry, version: Callable) -> None:
    candidates = [version(ONE), version(TWO)]

    def publish(folder: Path) -> Any:
        try:
            return registry.publish(folder, None, True)
        except Conflict as error:
            return error

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(publish, candidates)
    loser, winner = (first, second) if isinstance(first, Conflict) else (second, first)
    assert isinstance(loser, Conflict)
    assert "v1 is live in" in str(loser)
    assert registry.live() == winner
    assert registry.versions() == [winner]


def test_of_two_commits_at_once_the_first_one_wins(hub: Hub, version: Callable) -> None:
    registry = HubRegistry("owner/adapter")
    one = registry.publish(version(ONE), None, True)
    rival = {path.name: path.read_bytes() for path in version(TWO).iterdir()}
    hub.before_commit(lambda: hub.put("owner/adapter", rival))
    with pytest.raises(Conflict, match="v2 is live in owner/adapter, not v1"):
        registry.publish(version(THREE), one.revision, True)
    assert registry.live().name == "v2"
    hub.before_commit(lambda: hub.put("owner/adapter", {"README.md": "edited"}))
    assert registry.promote("v1", "a person decides").name == "v1"
    assert registry.live().name == "v1"


def test_the_last_error_decides_and_not_an_earlier_one_that_was_handled(hub: Hub) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    hub.cut("GET", "/api/whoami-v2", times=10)
    with pytest.raises(Unreachable, match="cannot be reached"), hub_errors("owner/none", "registry", write=True):
        try:
            hub_api().auth_check("owner/none", write=True)
        except RepositoryNotFoundError:  # which alone would be a missing permission, and not tried again
            hub_api().whoami()
