"""Object stores: what their clients raise as sentences, listings that do not lie, many files at once, and a lock.

Of a store only this is relied on, which S3, Google's and Azure's all promise: a read or a listing shows every write
that was answered before it. There is no rename, and no writing on a condition.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.asyn import sync
from upath import UPath

from include.errors import Missing, NoPermission, RetuneError, TransientError, Unreachable

SCHEMES = ("s3", "gs", "az", "abfs")  # where a registry may be
FILES_AT_ONCE, READS_AT_ONCE = 8, 16  # the client holds up to 100 MB of each file in memory
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "adlfs", "azure")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoAuthTokenError")

log = logging.getLogger("airflow.task.retune")


def is_local(place: UPath | Path) -> bool:
    """Whether a place is on this machine's disk."""
    return not isinstance(place, UPath) or place.protocol in ("", "file", "local")


def at(uri: str) -> UPath:
    """A place in the world. What was listed there is never remembered: another worker may have written since."""
    remote = "://" in uri and not uri.startswith(("file:", "local:"))
    return UPath(uri, use_listings_cache=False) if remote else UPath(uri)


def _from_client(error: BaseException | None) -> bool:
    """Whether an object store's client raised it. s3fs passes some on as they are, others as an OSError's cause."""
    return any(type(each).__module__.partition(".")[0] in CLIENTS for each in (error, error and error.__cause__))


def _code(error: BaseException) -> str:
    """S3's name for what went wrong; empty where it has none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@contextmanager
def object_errors(what: str, setting: str) -> Iterator[None]:
    """Turns what an object store's client raises into a sentence; that a single object is not there passes as it is,
    and so does what a disk says.

    Args:
        what: whose place it is, for people: "the store s3://bucket/path".
        setting: what says where it is: "RETUNE_STORE".

    Raises:
        Missing: the bucket does not exist, or the client is not installed.
        NoPermission: there are no credentials, or they do not suffice.
        Unreachable: the object store does not answer, or answers that it cannot now.
    """
    try:
        yield
    except RetuneError:
        raise
    except ImportError as error:
        if "install" not in str(error).lower():
            raise
        raise Missing(f"{what} needs a package that is not there ({error})", "Install it on every machine") from error
    except Exception as error:
        code, kind = _code(error), type(error).__name__
        if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
            raise NoPermission(
                f"{what} cannot be asked ({error})", "Write AWS_ENDPOINT_URL_S3 as http(s)://host:port"
            ) from error
        if not _from_client(error) or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket"):
            raise
        if code == "NoSuchBucket":
            raise Missing(f"the bucket of {what} does not exist", f"Create it, or correct {setting}") from error
        if kind in NO_CREDENTIALS:
            raise NoPermission(
                f"{what} needs credentials, and there are none ({error})",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every machine",
            ) from error
        if isinstance(error, PermissionError):
            raise NoPermission(
                f"{what} does not let this account in ({error})",
                "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or allow this account to list, read, write and "
                f"delete there; {setting} says where it is",
            ) from error
        raise Unreachable(
            f"{what} does not answer ({' '.join(str(error).split()) or kind})",
            f"Check the network, {setting}" + (" and AWS_ENDPOINT_URL_S3" if "s3://" in what else ""),
        ) from error


def entries(folder: UPath) -> dict[str, bool]:
    """The names in a folder, and whether each is a folder itself; none where there is no such folder.

    UPath's own `glob` and `is_dir` say "nothing" also where the store has said "forbidden".

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        if is_local(folder):
            return {entry.name: entry.is_dir() for entry in os.scandir(folder.path)}
        found = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        if _code(error) == "NoSuchBucket":
            raise
        return {}
    names = {str(info["name"]).rstrip("/"): info["type"] == "directory" for info in found}
    return {name.rsplit("/", 1)[-1]: deep for name, deep in names.items() if name != folder.path.rstrip("/")}


def read_all(paths: Iterable[UPath]) -> dict[UPath, bytes]:
    """The content of each path that is there, several at once.

    Raises:
        OSError: one cannot be read.
    """
    wanted = list(paths)
    found = {path: _read(path) for path in wanted[:1]}  # see `_one_then_the_rest`
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found.update(zip(wanted[1:], pool.map(_read, wanted[1:]), strict=True))
    return {path: content for path, content in found.items() if content is not None}


def _read(path: UPath) -> bytes | None:
    try:
        return path.fs.cat_file(path.path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if _code(error) == "NoSuchBucket":
            raise
        return None


def sizes(folder: UPath) -> dict[str, dict[str, Any]]:
    """What the store says of each file below a folder, by relative path, in one listing."""
    start = folder.path.rstrip("/") + "/"
    return {name.removeprefix(start): info for name, info in folder.fs.find(folder.path, detail=True).items()}


def tag(info: dict[str, Any]) -> str | None:
    """What a store calls the content of a file: another one, another content. None where it does not say."""
    return next((info[key] for key in ("ETag", "etag", "md5Hash") if info.get(key)), None)  # S3 and http, Azure, Google


def upload(source: Path, names: Iterable[str], target: UPath) -> None:
    """Copy files of a folder, by relative path, into one on an object store, several at once."""
    for part in _one_then_the_rest(names):
        there = [(target / name).path for name in part]
        target.fs.put([str(source / name) for name in part], there, batch_size=FILES_AT_ONCE)


def download(source: UPath, names: Iterable[str], target: Path) -> None:
    """Copy files of a folder on an object store, by relative path, to this machine, several at once."""
    for part in _one_then_the_rest(names):
        for name in part:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        here = [str(target / name) for name in part]
        source.fs.get([(source / name).path for name in part], here, batch_size=FILES_AT_ONCE)


def _one_then_the_rest(names: Iterable[str]) -> list[list[str]]:
    """s3fs connects at its first request; of several at once each connects anew and cuts the others off."""
    names = list(names)
    return [part for part in (names[:1], names[1:]) if part]


class Claim:
    """The right to change a place, which one at a time has (see `alone`)."""

    def __init__(self, path: UPath, lapse: float):
        self.path, self.lapse = path, lapse
        self._beats, self._renewed = 0, 0.0
        self._over = threading.Event()

    def renew(self) -> None:
        """Write it down, another time than before."""
        began = time.monotonic()
        self._beats += 1
        content = f"{socket.gethostname()} {os.getpid()} {self._beats}".encode()
        self._put(self.path, content)
        self._renewed = began

    def withdraw(self) -> None:
        """Give it up; where that fails, it lapses."""
        with suppress(Exception):
            self.path.fs.rm_file(self.path.path)

    def write(self, path: UPath, content: bytes) -> None:
        """Write a small object, unless the claim may have lapsed, and never after it may have.

        Raises:
            TransientError: it could not be renewed in time.
        """
        self.check()
        self._put(path, content)

    def check(self) -> None:
        """Raises:
        TransientError: the claim could not be renewed in time, so that others may take it for dead.
        """
        if time.monotonic() - self._renewed > self.lapse / 2:
            raise TransientError(
                f"the object store did not answer for {self.lapse / 2:g} s while {self.path.parent.parent} was changed",
                "Retry the task: what is there already is not written again",
            )

    def _put(self, path: UPath, content: bytes) -> None:
        fs = path.fs
        if fs.async_impl:  # one that hangs must not arrive when the claim has lapsed
            sync(fs.loop, fs._pipe_file, path.path, content, timeout=self.lapse / 3)
        else:
            fs.pipe_file(path.path, content)

    def _keep(self) -> None:
        while not self._over.wait(self.lapse / 6):
            with suppress(Exception):  # the next one may arrive; `check` looks at the time
                self.check()
                self.renew()

    @contextmanager
    def kept(self) -> Iterator[Claim]:
        """Renews it as long as this process lives and is at it."""
        keeper = threading.Thread(target=self._keep, daemon=True)
        keeper.start()
        try:
            yield self
        finally:
            self._over.set()
            keeper.join()


@contextmanager
def alone(folder: UPath, lapse: float = 60.0, patience: float = 900.0) -> Iterator[Claim]:
    """Waits until nobody else has a claim in a folder, and holds one there.

    Who sees no claim writes one, then lists them all, and goes on only when there is no other: of two, the one that
    wrote later sees the other's. Otherwise it withdraws and tries again after a random pause. A claim is renewed
    while its owner lives; one that stayed the same for `lapse` has lost its owner. Clocks are not compared.

    Args:
        lapse: seconds.
        patience: seconds to wait for others that are alive.

    Raises:
        TransientError: others had claims all the time.
    """
    claim = Claim(folder / uuid.uuid4().hex, lapse)
    seen: dict[UPath, tuple[bytes, float]] = {}
    began, pause = time.monotonic(), 0.1
    try:
        while True:
            others = _living(folder, claim, seen)
            if not others:
                claim.renew()
                others = _living(folder, claim, seen)
                if not others:
                    break
                claim.withdraw()
            if time.monotonic() - began > patience:
                raise TransientError(
                    f"{folder.parent} is being changed by {', '.join(others)} for {patience:g} s", "Retry the task"
                )
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, lapse / 12)
        with claim.kept():
            yield claim
    finally:
        claim.withdraw()


def _living(folder: UPath, own: Claim, seen: dict[UPath, tuple[bytes, float]]) -> list[str]:
    """Who else has a claim that has not lapsed: machine and process of each.

    Args:
        seen: each claim's content and since when it is known; kept from look to look.
    """
    looked = time.monotonic()
    contents = read_all(folder / name for name in entries(folder) if name != own.path.name)
    for gone in seen.keys() - contents.keys():
        del seen[gone]
    living = []
    for path, content in contents.items():
        if path not in seen or seen[path][0] != content:
            seen[path] = content, time.monotonic()
        if looked - seen[path][1] < own.lapse:
            living.append(" ".join(content.decode(errors="replace").split()[:2]))
        else:
            log.info("%s has lost its owner, %s, and is removed", path, content.decode(errors="replace"))
            path.fs.rm_file(path.path)
    return living
