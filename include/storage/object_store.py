"""Object stores: what their clients raise as sentences, listings that do not lie, many files at once, and a lock.

Of a store only this is relied on, which S3, Google's and Azure's all promise: a read or a listing shows every write
that was answered before it. There is no rename, and no writing on a condition.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upath import UPath

from include.errors import NoPermission, NotFound, RetuneError, Unreachable

SCHEMES = ("s3", "gs", "az", "abfs")  # where a registry may be
FILES_AT_ONCE, READS_AT_ONCE = 8, 16  # the client holds up to 100 MB of each file in memory
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "adlfs", "azure")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoAuthTokenError")

log = logging.getLogger("airflow.task.retune")


def is_local(place: UPath | Path) -> bool:
    """Whether a place is on this machine's disk."""
    return not isinstance(place, UPath) or place.protocol in ("", "file", "local")


def open_path(uri: str) -> UPath:
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
        NotFound: the bucket does not exist, or the client is not installed.
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
        raise NotFound(f"{what} needs a package that is not there ({error})", "Install it on every machine") from error
    except Exception as error:
        code, kind = _code(error), type(error).__name__
        if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
            raise NoPermission(
                f"{what} cannot be asked ({error})", "Write AWS_ENDPOINT_URL_S3 as http(s)://host:port"
            ) from error
        if not _from_client(error) or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket"):
            raise
        if code == "NoSuchBucket":
            raise NotFound(f"the bucket of {what} does not exist", f"Create it, or correct {setting}") from error
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


def list_dir(folder: UPath) -> dict[str, bool]:
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


def list_files(folder: UPath) -> dict[str, dict[str, Any]]:
    """What the store says of each file below a folder, by relative path, in one listing."""
    start = folder.path.rstrip("/") + "/"
    return {name.removeprefix(start): info for name, info in folder.fs.find(folder.path, detail=True).items()}


def etag(info: dict[str, Any]) -> str | None:
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
