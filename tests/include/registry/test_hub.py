"""The hub of the tests, through the real clients."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read when huggingface_hub is imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import httpx
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.conftest import PROJECT
from tests.services.hub import Hub

REPO = "owner/name"


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.write_token)


def add(path, data=b"data"):
    return CommitOperationAdd(path, data)


def statuses(hub, method, pattern):
    return [status for seen, path, status in hub.requests if seen == method and re.search(pattern, path)]


def run_client(hub, tmp_path, code, token=""):
    """Run code in a process whose client reads HF_ENDPOINT when it is imported; return what it prints as JSON."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    environment = {**os.environ, **settings, **({"HF_TOKEN": token} if token else {})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_create_commit_and_read_back(hub, api, tmp_path):
    url = api.create_repo(REPO, private=True)
    assert (url.repo_id, url.repo_type) == (REPO, "model")
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as conflict:
        api.create_repo(REPO)
    assert conflict.value.response.status_code == 409
    first = api.model_info(REPO).sha

    card = "---\nlicense: mit\n---\n# A card\n"
    weights = bytes(range(256)) * 5000
    operations = [add("README.md", card.encode()), add("a/b.txt"), add("adapter.safetensors", weights)]
    commit = api.create_commit(REPO, operations, commit_message="publish", parent_commit=first)
    repo = hub.repos[f"model:{REPO}"]
    assert [c.sha for c in repo.commits] == [first, commit.oid]
    assert (repo.head.title, repo.head.author, repo.head.lfs) == ("publish", "owner", {"adapter.safetensors"})
    assert repo.head.files["adapter.safetensors"] == weights

    info = api.model_info(REPO, revision=commit.oid, files_metadata=True)
    assert (info.sha, info.private, info.card_data.license) == (commit.oid, True, "mit")
    lfs = {s.rfilename: s.lfs.size for s in info.siblings if s.lfs}
    assert lfs == {"adapter.safetensors": len(weights)}
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md", "a/b.txt", "adapter.safetensors"]
    assert [item.path for item in api.list_repo_tree(REPO)] == [
        ".gitattributes",
        "README.md",
        "a",
        "adapter.safetensors",
    ]
    assert [item.path for item in api.list_repo_tree(REPO, "a")] == ["a/b.txt"]
    assert [item.path for item in api.get_paths_info(REPO, ["a", "README.md", "none"])] == ["a", "README.md"]
    assert [c.commit_id for c in api.list_repo_commits(REPO)] == [commit.oid, first]

    for revision in (commit.oid, "main"):
        path = api.hf_hub_download(REPO, "adapter.safetensors", revision=revision, cache_dir=tmp_path)
        with open(path, "rb") as file:
            assert file.read() == weights
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "adapter.safetensors", revision=first, cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "README.md", revision="v9", cache_dir=tmp_path)


def test_commit_updates_deletes_and_copies(hub, api):
    hub.put(REPO, {"README.md": "one", "old.txt": "x", "logs/1": "x", "logs/2": "x", "w.bin": b"w"})
    before = hub.repos[f"model:{REPO}"].head.sha
    same = api.create_commit(REPO, [add("old.txt", b"x"), add("w.bin", b"w")], commit_message="nothing new")
    assert same.oid == before and len(hub.repos[f"model:{REPO}"].commits) == 2

    gone = [CommitOperationDelete("old.txt"), CommitOperationDelete("logs/")]
    operations = [add("README.md", b"---\nlicense: mit\n---\n"), CommitOperationCopy("w.bin", "v.bin"), *gone]
    api.create_commit(REPO, operations, commit_message="clean up")
    files = hub.repos[f"model:{REPO}"].head.files
    assert set(files) == {".gitattributes", "README.md", "v.bin", "w.bin"} and files["v.bin"] == b"w"
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("old.txt", REPO)
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.create_commit(REPO, [add("README.md", b"---\na: [\n---\n")], commit_message="bad card")


def test_upload_folder_skips_what_the_hub_has(hub, api, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"w" * 3000)
    (tmp_path / "sub" / "config.json").write_text("{}")
    (tmp_path / "note.tmp").write_text("no")
    api.create_repo(REPO, repo_type="dataset")
    arguments = {"repo_id": REPO, "repo_type": "dataset", "folder_path": tmp_path, "ignore_patterns": ["*.tmp"]}
    first = api.upload_folder(**arguments)
    assert set(hub.repos[f"dataset:{REPO}"].head.files) == {".gitattributes", "model.safetensors", "sub/config.json"}
    assert statuses(hub, "PUT", "/lfs/") == [200] and statuses(hub, "POST", "/verify$") == [200]
    assert api.upload_folder(**arguments).oid == first.oid
    assert len(statuses(hub, "POST", "/commit/")) == 1


def test_tags(hub, api):
    first = hub.put(REPO, {"a": "1"})
    second = hub.put(REPO, {"a": "2"})
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_tag(REPO, tag="v2/final", tag_message="done")
    with pytest.raises(HfHubHTTPError) as conflict:
        api.create_tag(REPO, tag="v1")
    assert conflict.value.response.status_code == 409
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="v3", revision="0" * 40)
    refs = api.list_repo_refs(REPO)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first, "v2/final": second}
    assert [(branch.name, branch.target_commit) for branch in refs.branches] == [("main", second)]
    assert api.model_info(REPO, revision="v1").sha == api.model_info(REPO, revision=first[:8]).sha == first
    api.delete_tag(REPO, tag="v2/final")
    assert hub.repos[f"model:{REPO}"].tags == {"v1": first}
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v2/final")


def test_tokens(hub, api):
    hub.put(REPO, {"a": "1"})
    hub.put("owner/secret", {"a": "1"}, private=True)
    hub.put("other/secret", {"a": "1"}, private=True)
    reader, nobody = HfApi(endpoint=hub.url, token=hub.read_token), HfApi(endpoint=hub.url, token=False)
    wrong = HfApi(endpoint=hub.url, token="hf_wrong")
    assert [api.whoami()["name"], reader.whoami()["auth"]["accessToken"]["role"]] == ["owner", "read"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    assert nobody.model_info(REPO).id == REPO and reader.model_info("owner/secret").private
    for client, repo_id, status in [
        (nobody, "owner/secret", 401),
        (nobody, "owner/none", 401),
        (reader, "owner/none", 404),
        (reader, "other/secret", 404),
    ]:
        with pytest.raises(RepositoryNotFoundError) as missing:
            client.model_info(repo_id)
        assert missing.value.response.status_code == status
        assert missing.value.response.headers["X-Error-Code"] == "RepoNotFound"
        assert missing.value.request_id
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as invalid:
        wrong.model_info(REPO)
    assert invalid.value.response.status_code == 401 and type(invalid.value) is HfHubHTTPError
    for call in (
        lambda: reader.create_commit(REPO, [add("b")], commit_message="no"),
        lambda: reader.create_tag(REPO, tag="v1"),
        lambda: reader.create_repo("owner/new"),
        lambda: api.create_repo("other/new"),
        lambda: reader.auth_check(REPO, write=True),
    ):
        with pytest.raises(HfHubHTTPError) as forbidden:
            call()
        assert forbidden.value.response.status_code == 403
    with pytest.raises(RepositoryNotFoundError):
        nobody.create_commit(REPO, [add("b")], commit_message="no")
    api.auth_check(REPO, write=True)
    assert len(hub.repos) == 3 and len(hub.repos[f"model:{REPO}"].commits) == 2


def test_ranges(hub):
    sha = hub.put(REPO, {"w.bin": b"0123456789"}, kind="dataset")
    url = f"{hub.url}/datasets/{REPO}/resolve/main/w.bin"
    head = httpx.head(url)
    assert (head.headers["X-Repo-Commit"], head.headers["X-Linked-Size"], head.content) == (sha, "10", b"")
    for wanted, status, content, content_range in [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
    ]:
        got = httpx.get(url, headers={"Range": wanted})
        assert (got.status_code, got.content, got.headers["Content-Range"]) == (status, content, content_range)
    assert httpx.get(url, headers={"Range": "bytes=10-"}).status_code == 416
    assert httpx.get(f"{hub.url}/api/spaces").status_code == 501


def test_datasets_snapshot_and_file_system(hub, tmp_path):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3]}), buffer)
    parquet = hub.put("owner/parquet", {"data/train-00000.parquet": buffer.getvalue()}, kind="dataset", private=True)
    lines = hub.put("owner/lines", {"train.jsonl": '{"n": 1}\n{"n": 2}\n', "README.md": "# x"}, kind="dataset")
    hub.put("owner/lines", {"train.jsonl": '{"n": 9}\n'}, kind="dataset")
    hub.put(REPO, {"config.json": "{}", "w.bin": b"w", "logs/1.txt": "x"})
    hub.repos[f"model:{REPO}"].tags["v1"] = hub.repos[f"model:{REPO}"].head.sha
    code = f"""
import json, os
from datasets import load_dataset
from huggingface_hub import HfFileSystem, snapshot_download
folder = snapshot_download("{REPO}", revision="v1", allow_patterns=["*.json", "*.bin"])
fs = HfFileSystem()
print(json.dumps([
    load_dataset("owner/parquet", split="train", revision="{parquet}")["n"][:],
    load_dataset("owner/lines", split="train", revision="{lines}")["n"][:],
    sorted(os.listdir(folder)),
    sorted(os.listdir(snapshot_download("{REPO}"))),
    fs.ls("datasets/owner/parquet", detail=False),
    fs.read_text("datasets/owner/lines@{lines}/train.jsonl").count("n"),
]))
"""
    assert run_client(hub, tmp_path, code, hub.read_token) == [
        [1, 2, 3],
        [1, 2],
        ["config.json", "w.bin"],
        [".gitattributes", "config.json", "logs", "w.bin"],
        ["datasets/owner/parquet/.gitattributes", "datasets/owner/parquet/data"],
        2,
    ]


def test_rival_commits(hub, api):
    head = hub.put(REPO, {"a": "1"})
    hub.before_commit(lambda: hub.put(REPO, {"rival": "1"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as stale:
        api.create_commit(REPO, [add("b")], commit_message="mine", parent_commit=head)
    assert stale.value.response.status_code == 412 and "b" not in hub.repos[f"model:{REPO}"].head.files
    head = api.model_info(REPO).sha
    api.create_commit(REPO, [add("b")], commit_message="mine", parent_commit=head)
    hub.before_commit(lambda: hub.put(REPO, {"rival": "2"}))
    api.create_commit(REPO, [add("c")], commit_message="without a parent, it goes on top")
    assert [c.title for c in hub.repos[f"model:{REPO}"].commits] == [
        "initial commit",
        "put",
        "put",
        "mine",
        "put",
        "without a parent, it goes on top",
    ]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_commit_is_not_retried_by_the_client(hub, api, status):
    hub.put(REPO, {"a": "1"})
    hub.fail("POST", "/commit/", status=status, retry_after=1)
    with pytest.raises(HfHubHTTPError) as failed:
        api.create_commit(REPO, [add("b")], commit_message="one")
    assert failed.value.response.status_code == status and failed.value.response.headers["Retry-After"] == "1"
    hub.fail("POST", "/commit/", status=status, applied=True)
    with pytest.raises(HfHubHTTPError):
        api.create_commit(REPO, [add("b")], commit_message="two")
    assert [c.title for c in hub.repos[f"model:{REPO}"].commits] == ["initial commit", "put", "two"]
    assert statuses(hub, "POST", "/commit/") == [status, status]


def test_answer_of_a_commit_is_lost(hub, api):
    hub.put(REPO, {"a": "1"})
    for after_bytes in (0, 5):
        hub.cut("POST", "/commit/", after_bytes=after_bytes)
        with pytest.raises(httpx.RemoteProtocolError):
            api.create_commit(REPO, [add(f"b{after_bytes}")], commit_message="applied")
    hub.cut("POST", "/commit/", side="request")
    with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):  # a race in the client decides which
        api.create_commit(REPO, [add("c")], commit_message="not applied")
    assert [c.title for c in hub.repos[f"model:{REPO}"].commits] == ["initial commit", "put", "applied", "applied"]
    assert statuses(hub, "POST", "/commit/") == [0, 0, 0]


def test_uploads_are_retried_by_the_client(hub, api):
    hub.put(REPO, {"a": "1"})
    weights = os.urandom(3_000_000)
    hub.cut("PUT", "/lfs/", after_bytes=1000)
    hub.fail("POST", "/preupload/", status=429, retry_after=0)
    api.create_commit(REPO, [add("w.bin", weights)], commit_message="weights")
    assert hub.repos[f"model:{REPO}"].head.files["w.bin"] == weights
    assert statuses(hub, "PUT", "/lfs/") == [0, 200] and statuses(hub, "POST", "/preupload/") == [429, 200]


def test_a_lost_upload_is_refused(hub, api):
    hub.put(REPO, {"a": "1"})
    operation = add("w.bin", b"weights")
    api.preupload_lfs_files(REPO, [operation])
    hub.repos[f"model:{REPO}"].objects.clear()
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        api.create_commit(REPO, [operation], commit_message="weights")


def test_faults_of_downloads(hub, api, tmp_path):
    data = os.urandom(11_000_000)  # the client keeps what it has in steps of 10 MiB
    hub.put(REPO, {"w.bin": data, "config.json": "{}"})
    hub.cut("GET", "/resolve/", after_bytes=10_600_000)
    with open(api.hf_hub_download(REPO, "w.bin", cache_dir=tmp_path / "resumed"), "rb") as file:
        assert file.read() == data
    assert statuses(hub, "GET", "/resolve/") == [0, 206]
    hub.cut("GET", "/resolve/", after_bytes=10_600_000, reset=True)
    with pytest.raises(httpx.ReadError):
        api.hf_hub_download(REPO, "w.bin", cache_dir=tmp_path / "reset")
    hub.fail("GET", "/resolve/", status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "get")

    hub.fail("HEAD", "/resolve/", status=503)
    api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "head")
    hub.delay("HEAD", "/resolve/", seconds=60)
    api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "slow", etag_timeout=0.2)
    hub.fail("HEAD", "/resolve/", status=404)
    with pytest.raises(LocalEntryNotFoundError) as hidden:
        api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "gone")
    assert hidden.value.__cause__.response.status_code == 404
    hub.cut("HEAD", "/resolve/")
    with pytest.raises(httpx.RemoteProtocolError):
        api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "cut")


def test_faults_of_look_ups(hub, api):
    hub.put(REPO, {"a": "1"})
    hub.fail("GET|POST", "/api/models/", status=500, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            api.model_info(REPO)
    hub.delay("GET", "/api/models/", seconds=60)
    with pytest.raises(httpx.ReadTimeout):
        api.model_info(REPO, timeout=0.2)
    hub.cut("GET", "/api/models/", after_bytes=10)
    with pytest.raises(httpx.RemoteProtocolError):
        api.model_info(REPO)
    assert api.model_info(REPO).id == REPO


def test_stopping_does_not_wait_for_a_delayed_request():
    with Hub() as hub:
        hub.put(REPO, {"a": "1"})
        hub.delay("GET", "/api/", seconds=60)
        with pytest.raises(httpx.ReadTimeout):
            HfApi(endpoint=hub.url).model_info(REPO, timeout=0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    with pytest.raises(httpx.ConnectError):
        httpx.get(hub.url)


def test_command_line(tmp_path):
    (tmp_path / "datasets" / "owner" / "lines").mkdir(parents=True)
    (tmp_path / "datasets" / "owner" / "lines" / "train.jsonl").write_text("{}\n")
    command = [sys.executable, "-m", "tests.services.hub", "--seed", str(tmp_path)]
    root = PROJECT
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            values = dict(process.stdout.readline().strip().split("=") for _ in range(3))
            api = HfApi(endpoint=values["HF_ENDPOINT"], token=values["HF_TOKEN"])
            assert api.list_repo_files("owner/lines", repo_type="dataset") == [".gitattributes", "train.jsonl"]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
