"""A small Hugging Face hub on 127.0.0.1: the real clients talk to it over HTTP once HF_ENDPOINT names it.

    with Hub() as hub:
        sha = hub.put("owner/data", {"train.jsonl": b"{}"}, kind="dataset")
        HfApi(endpoint=hub.url, token=hub.write_token).dataset_info("owner/data", revision=sha)

`python -m tests.services.hub --port 8800 --seed FOLDER` serves the repos found under FOLDER/models/OWNER/NAME and
FOLDER/datasets/OWNER/NAME until SIGINT or SIGTERM, and prints the URL and the two tokens as shell variables.

What differs from the real hub:
- Everything is in memory. There is no xet (clients need HF_HUB_DISABLE_XET=1), no pull request, no branch other than
  main, no gated repo, no multipart LFS upload, no pagination, no `expand`, no dataset viewer, no web page.
- A file is LFS by its suffix (LFS_SUFFIXES, as .gitattributes of a new repo lists them) or above LFS_SIZE; contents
  are not looked at, .gitattributes is not read back, and .gitignore never excludes a file.
- LFS files are answered directly by /resolve/, with the X-Linked-* headers, not by a redirect to a CDN. The URL that
  takes an LFS upload is open to whoever knows it; the SHA-256 is checked there, not only when it is verified.
- A 401 about a repo carries X-Error-Code: RepoNotFound. The client turns the real hub's 401 into
  RepositoryNotFoundError by matching https:// URLs, which this server does not have.
- One user owns the namespace of the same name; no organizations, no fine-grained tokens. More users: `hub.tokens`.
- Commit ids are SHA-1 of the content and the history, but no git commit ids. Tags have no message.
- README.md is checked for parseable YAML only, not for the values of its fields.
- Rate limits exist only where a test calls `fail(..., status=429)`. Uploads must state their length.
- Anything else that the real hub serves answers 501.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import yaml

LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".gz", ".parquet", ".pt", ".safetensors", ".zip", ".zst", "tokenizer.json")
LFS_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass
class Commit:
    """A commit with the whole tree that it leaves behind."""

    sha: str
    title: str
    message: str
    author: str
    date: str
    files: dict[str, bytes]
    lfs: set[str]


@dataclass
class Repo:
    """A repo: its commits on main (oldest first), its tags (name -> sha) and its uploaded LFS objects."""

    id: str
    kind: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        """The last commit of main."""
        return self.commits[-1]

    @property
    def path(self) -> str:
        """The repo in a web URL: datasets carry a prefix, models do not."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def commit(self, author: str, title: str, message: str, changes: dict[str, bytes | None], lfs: set[str]) -> str:
        """Append a commit; a change to None deletes the file."""
        files, old_lfs = (dict(self.head.files), self.head.lfs) if self.commits else ({}, set())
        for path, data in changes.items():
            if data is None:
                del files[path]
            else:
                files[path] = data
        tree = [(path, git_oid(data)) for path, data in sorted(files.items())]
        parent = self.head.sha if self.commits else None
        sha = hashlib.sha1(repr((self.kind, self.id, parent, title, message, tree)).encode()).hexdigest()
        lfs = {path for path in files if path in lfs or (path in old_lfs and path not in changes)}
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits.append(Commit(sha, title, message, author, date, files, lfs))
        return sha

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id (7 digits are enough) names."""
        sha = self.tags.get(revision, self.head.sha if revision in ("main", "refs/heads/main") else revision)
        for commit in self.commits:
            if len(sha) >= 7 and commit.sha.startswith(sha):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path (unquoted, without query) match the regexes."""

    method: str
    pattern: str
    times: int
    status: int = 0
    retry_after: int | None = None
    applied: bool = False
    delay: float = 0
    cut: bool = False
    side: str = ""
    after_bytes: int = 0
    reset: bool = False


class HubError(Exception):
    """An answer of 400 or more, with the code that tells the client which exception to raise."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message.splitlines()[0], **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code
        self.body = {"error": message, **body}


class Hub:
    """The server. `repos`, `requests`, `tokens` and `faults` are plain data, to read and to change."""

    def __init__(self, port: int = 0, user: str = "owner"):
        self.write_token, self.read_token = (f"hf_{secrets.token_hex(17)}" for _ in range(2))
        self.tokens = {self.write_token: (user, "write"), self.read_token: (user, "read")}
        self.repos: dict[str, Repo] = {}  # "model:owner/name" -> Repo
        self.requests: list[tuple[str, str, int]] = []  # method, path without query, status (0: cut)
        self.faults: list[Fault] = []
        self.hooks: list[Callable[[], object]] = []
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        for connection in list(self.connections):
            hang_up(connection)

    def put(self, repo_id: str, files: dict, kind: str = "model", message: str = "put", private: bool = False) -> str:
        """Commit files (bytes or str; None deletes) without a client, creating the repo if need be; return the sha."""
        changes = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        with self.lock:
            repo = self.repos.get(f"{kind}:{repo_id}") or self.create(repo_id, kind, private)
            lfs = {path for path, data in changes.items() if data is not None and is_lfs(path, len(data))}
            repo.objects |= {hashlib.sha256(changes[path]).hexdigest(): changes[path] for path in lfs}
            return repo.commit(repo_id.split("/")[0], message, "", changes, lfs)

    def create(self, repo_id: str, kind: str = "model", private: bool = False) -> Repo:
        """Create a repo with its first commit, as the hub does."""
        repo = self.repos[f"{kind}:{repo_id}"] = Repo(repo_id, kind, private)
        repo.commit(repo_id.split("/")[0], "initial commit", "", {".gitattributes": GITATTRIBUTES}, set())
        return repo

    def fail(self, method: str, pattern: str, status: int, times: int = 1, **options) -> None:
        """Answer `status` to matching requests; `retry_after=1` adds the header, `applied=True` handles them first."""
        self.faults.append(Fault(method, pattern, times, status, **options))

    def delay(self, method: str, pattern: str, seconds: float, times: int = 1) -> None:
        """Wait before matching requests are handled; they are, even if the client has given up by then."""
        self.faults.append(Fault(method, pattern, times, delay=seconds))

    def cut(self, method: str, pattern: str, after_bytes: int = 0, times: int = 1, **options) -> None:
        """Close the connection in the middle of matching requests.

        side="request" (the default for PUT) reads `after_bytes` of the body and then resets the connection: nothing is
        applied. side="response" (the default for the others) applies the request and sends `after_bytes` of the
        answer's body (0: not even its headers); reset=True ends that with a TCP reset and not with an orderly close.
        """
        options.setdefault("side", "request" if method == "PUT" else "response")
        self.faults.append(Fault(method, pattern, times, cut=True, after_bytes=after_bytes, **options))

    def before_commit(self, hook: Callable[[], object], times: int = 1) -> None:
        """Call `hook` before each of the next `times` commits is applied: a rival who is faster uses `put` in it."""
        self.hooks += [hook] * times

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Use up one turn of the first fault that matches."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Stay silent when a client goes away; show everything else."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+?)"


def route(method: str, pattern: str):
    """Register a handler method for a path; the groups of the pattern become its arguments."""

    def register(handler):
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def do_GET(self):
        """Serve one request of any method: read it, let a fault have its say, answer."""
        self.base = f"http://{self.headers.get('Host')}"
        raw_path, _, query = self.path.partition("?")
        path, self.query = unquote(raw_path), parse_qs(query)
        fault = self.hub.take_fault(self.command, path) or Fault("", "", 0)
        length = int(self.headers.get("Content-Length") or 0)
        if fault.side == "request":
            self.rfile.read(min(length, fault.after_bytes))
            self.hub.requests.append((self.command, path, 0))
            return self.drop(reset=True)
        self.body = self.rfile.read(length)
        self.hub.stopping.wait(fault.delay)
        if not fault.status or fault.applied:
            status, headers, body = self.answer(raw_path)
        if fault.status:
            status, body = fault.status, {"error": HTTPStatus(fault.status).phrase}
            headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json; charset=utf-8", **headers}
        self.hub.requests.append((self.command, path, 0 if fault.cut else status))
        if not fault.cut or fault.after_bytes:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "X-Request-Id": secrets.token_hex(8), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body[: fault.after_bytes if fault.cut else None])
        if fault.cut:
            self.drop(fault.reset)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self, path: str) -> tuple[int, dict, object]:
        """Status, headers and body that the handler of the route returns or raises."""
        method = self.command.replace("HEAD", "GET")
        matches = [
            (match, handler) for verb, regex, handler in ROUTES if verb == method and (match := regex.fullmatch(path))
        ]
        try:
            if not matches:
                raise HubError(501, f"tests/hub.py does not serve {self.command} {path}")
            match, handler = matches[0]
            if handler is _Handler.commit and self.hub.hooks:
                self.hub.hooks.pop(0)()
            with self.hub.lock:
                result = handler(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
            return result if isinstance(result, tuple) else (200, {}, result)
        except HubError as exc:
            return exc.status, exc.headers, exc.body

    def drop(self, reset: bool) -> None:
        """End the connection without finishing the answer."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            hang_up(self.connection)

    def who(self) -> tuple[str | None, str | None]:
        """The user and the role of the token; (None, None) without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None, None
        if header.removeprefix("Bearer ") not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[header.removeprefix("Bearer ")]

    def repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo:
        """The repo, if the caller may read (or write) it."""
        user, role = self.who()
        repo = self.hub.repos.get(f"{(kind or 'models').removesuffix('s')}:{repo_id}")
        owner = repo_id.split("/")[0]
        missing = repo is None or (repo.private and user != owner)
        if user is None and (missing or write):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if missing:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and (role != "write" or user != owner):
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        user, role = self.who()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": role, "role": role, "createdAt": "2024-01-01T00:00:00.000Z"}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": git_oid(user.encode()), "name": user, "fullname": user, "orgs": [], "auth": auth}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        try:
            data = front_matter(json.loads(self.body)["content"])
        except yaml.YAMLError as exc:
            raise HubError(400, "Invalid YAML", errors=[{"message": str(exc)}], warnings=[]) from exc
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    @route("POST", "/api/repos/create")
    def create(self):
        user, role = self.who()
        wanted = json.loads(self.body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or owner != user:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id = f"{owner}/{wanted['name']}"
        repo = self.hub.repos.get(f"{kind}:{repo_id}")
        if repo:
            raise HubError(409, f"You already created this {kind} repo", url=f"{self.base}/{repo.path}")
        repo = self.hub.create(repo_id, kind, wanted.get("visibility") == "private")
        return {"url": f"{self.base}/{repo.path}", "name": repo_id}

    @route("GET", API + "(?:/revision/(?P<rev>[^/]+))?")
    def info(self, kind, id, rev):
        repo = self.repo(kind, id)
        commit = repo.at(rev or "main")
        siblings = []
        for path in sorted(commit.files):
            file = entry(commit, path)
            lfs = file.get("lfs") and {**file["lfs"], "sha256": file["lfs"]["oid"]}
            blob = {"size": file["size"], "blobId": file["oid"]} | ({"lfs": lfs} if lfs else {})
            siblings.append({"rfilename": path} | (blob if "blobs" in self.query else {}))
        try:
            card = front_matter(commit.files.get("README.md", b"").decode())
        except yaml.YAMLError:
            card = {}
        facts = {"id": id, "author": id.split("/")[0], "sha": commit.sha, "private": repo.private, "cardData": card}
        dates = {"createdAt": repo.commits[0].date, "lastModified": repo.head.date}
        return {**facts, **dates, "gated": False, "disabled": False, "tags": [], "siblings": siblings}

    @route("GET", API + "/auth-check(?P<write>/write)?")
    def auth_check(self, kind, id, write):
        self.repo(kind, id, write=bool(write))
        return {}

    @route("GET", API + "/refs")
    def refs(self, kind, id):
        repo = self.repo(kind, id)
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.sha}
        return {"branches": [main], "converts": [], "tags": tags, "pullRequests": []}

    @route("GET", API + "/commits/(?P<rev>[^/]+)")
    def commits(self, kind, id, rev):
        repo = self.repo(kind, id)
        history = repo.commits[: repo.commits.index(repo.at(rev)) + 1]
        return [
            {"id": c.sha, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in reversed(history)
        ]

    @route("GET", API + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, kind, id, rev, path):
        commit = self.repo(kind, id).at(rev)
        prefix, recursive = f"{path}/" if path else "", self.query.get("recursive", [""])[0].lower() in ("true", "1")
        found = {}
        for file in sorted(name for name in commit.files if name.startswith(prefix)):
            parts = file[len(prefix) :].split("/")
            names = [prefix + "/".join(parts[: depth + 1]) for depth in range(len(parts))]
            found |= {name: entry(commit, name) for name in (names if recursive else names[:1])}
        if path and not found:
            raise HubError(404, f'{path} does not exist on "{rev}"', "EntryNotFound")
        return list(found.values())

    @route("POST", API + "/paths-info/(?P<rev>[^/]+)")
    def paths_info(self, kind, id, rev):
        commit = self.repo(kind, id).at(rev)
        paths = [path.rstrip("/") for path in parse_qs(self.body.decode())["paths"]]
        known = [f"{file}/" for file in commit.files]
        return [entry(commit, path) for path in paths if any(file.startswith(f"{path}/") for file in known)]

    @route("GET", WEB + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def resolve(self, kind, id, rev, path):
        commit = self.repo(kind, id).at(rev)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        data, file = commit.files[path], entry(commit, path)
        headers |= {"ETag": f'"{file["oid"]}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "lfs" in file:
            headers |= {"ETag": f'"{file["lfs"]["oid"]}"', "X-Linked-Size": len(data)}
            headers["X-Linked-Etag"] = headers["ETag"]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, headers, data
        first, last = wanted.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

    @route("POST", API + "/preupload/(?P<rev>[^/]+)")
    def preupload(self, kind, id, rev):
        commit = self.repo(kind, id, write=True).at(rev)
        files = []
        for file in json.loads(self.body)["files"]:
            old = entry(commit, file["path"]) if file["path"] in commit.files else None
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            oid = old and old.get("lfs", old)["oid"]
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @route("POST", WEB + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind, id):
        repo = self.repo(kind, id, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.objects:
                upload = {"href": f"{self.base}/lfs/{repo.kind}s/{id}/{item['oid']}"}
                verify = {"href": f"{self.base}/{repo.path}.git/info/lfs/objects/verify"}
                item["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", r"/lfs/(?P<kind>\w+)s/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, kind, id, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not match its SHA-256")
        self.hub.repos[f"{kind}:{id}"].objects[oid] = self.body
        return b""

    @route("POST", WEB + r"\.git/info/lfs/objects/verify")
    def lfs_verify(self, kind, id):
        sent = json.loads(self.body)
        if len(self.repo(kind, id, write=True).objects.get(sent["oid"], b"")) != sent["size"]:
            raise HubError(404, "Object not found")
        return {}

    @route("POST", API + "/commit/(?P<rev>[^/]+)")
    def commit(self, kind, id, rev):
        repo = self.repo(kind, id, write=True)
        if "create_pr" in self.query:
            raise HubError(501, "tests/hub.py has no pull requests")
        if rev != "main":
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        header = header["value"]
        if not repo.head.sha.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        changes, lfs = {}, set()
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                changes[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                    raise HubError(400, f"{message} Offending file: - {path}")
                changes[path] = repo.objects[value["oid"]]
                lfs.add(path)
            else:
                folder = path.rstrip("/") + "/" if key == "deletedFolder" else None
                gone = [name for name in repo.head.files if (name.startswith(folder) if folder else name == path)]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                changes |= dict.fromkeys(gone)
        sha = repo.commit(self.who()[0], header["summary"], header.get("description", ""), changes, lfs)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.base}/{repo.path}/commit/{sha}"}

    @route("POST", API + "/tag/(?P<rev>[^/]+)")
    def tag(self, kind, id, rev):
        repo = self.repo(kind, id, write=True)
        sha, name = repo.at(rev).sha, json.loads(self.body)["tag"]
        if name in repo.tags:
            raise HubError(409, "Tag reference exists already")
        repo.tags[name] = sha
        return {}

    @route("DELETE", API + "/tag/(?P<rev>[^/]+)")
    def delete_tag(self, kind, id, rev):
        if self.repo(kind, id, write=True).tags.pop(rev, None) is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return {}


def is_lfs(path: str, size: int) -> bool:
    """Whether a file goes to LFS."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def git_oid(data: bytes) -> str:
    """The id that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(commit: Commit, path: str) -> dict:
    """A file or a folder of a commit as the tree lists it."""
    if path not in commit.files:
        return {"type": "directory", "path": path, "size": 0, "oid": git_oid(f"{commit.sha}:{path}".encode())}
    data = commit.files[path]
    if path not in commit.lfs:
        return {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    lfs = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(data), "oid": git_oid(pointer), "lfs": lfs}


def front_matter(readme: str) -> dict:
    """The YAML block at the top of a README.md; yaml.YAMLError if it is no mapping."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", readme, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    if not isinstance(data or {}, dict):
        raise yaml.YAMLError("the metadata is not a mapping")
    return data or {}


def hang_up(connection: socket.socket) -> None:
    """Shut a connection down, which may be gone already."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.services.hub", description="A small Hugging Face hub for tests."
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--user", default="owner", help="the user, and the namespace, that the tokens belong to")
    parser.add_argument("--seed", type=Path, help="folder with models/OWNER/NAME/... and datasets/OWNER/NAME/...")
    options = parser.parse_args()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with Hub(options.port, options.user) as hub:
        for folder in options.seed.glob("*s/*/*/") if options.seed else []:
            files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
            kind, *name = folder.relative_to(options.seed).parts
            hub.put("/".join(name), files, kind=kind.removesuffix("s"), message="seed")
        print(f"HF_ENDPOINT={hub.url}\nHF_TOKEN={hub.write_token}\nHF_READ_TOKEN={hub.read_token}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
