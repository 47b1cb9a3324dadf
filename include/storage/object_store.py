"""Object stores: their clients' errors as Retune's errors, reliable listings, and copies of many files at once.

Only one property of a store is relied on, and S3, Google's and Azure's stores promise it: a read or a listing shows
each write that was answered before. Renaming and conditional writes are not used.
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
from include.storage.locations import is_local

SCHEMES = ("s3", "gs", "az", "abfs")  # that a registry's URI may have
PARALLEL_COPIES, PARALLEL_READS = 8, 16  # the client holds up to 100 MB of each file in memory
CLIENT_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "adlfs", "azure")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoAuthTokenError")

log = logging.getLogger("airflow.task.retune")


@contextmanager
def object_errors(what: str, setting: str) -> Iterator[None]:
    """Translate the errors of an object store's client.

    The error about a single object that does not exist passes unchanged, and so do the errors of a local disk.

    Args:
        what: the location for the message: "the store s3://bucket/path".
        setting: the setting that names the location: "RETUNE_STORE".

    Raises:
        NotFound: the bucket does not exist, or the client is not installed.
        NoPermission: there are no credentials, or they are not sufficient.
        Unreachable: the object store does not answer, or reports that it cannot answer now.
    """
    try:
        yield
    except RetuneError:
        raise
    except ImportError as error:
        if "install" not in str(error).lower():
            raise
        raise NotFound(
            f"{what} needs a package that is not installed ({error})", "Install it on every machine"
        ) from error
    except Exception as error:
        code, error_type = _error_code(error), type(error).__name__
        if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
            raise NoPermission(
                f"{what} has no valid endpoint ({error})", "Write AWS_ENDPOINT_URL_S3 as http(s)://host:port"
            ) from error
        if not is_client_error(error) or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket"):
            raise
        if code == "NoSuchBucket":
            raise NotFound(f"the bucket of {what} does not exist", f"Create it, or correct {setting}") from error
        if error_type in NO_CREDENTIALS:
            raise NoPermission(
                f"{what} needs credentials, and there are none ({error})",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every machine",
            ) from error
        if isinstance(error, PermissionError):
            raise NoPermission(
                f"{what} denies access to this account ({error})",
                "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or allow this account to list, read, write and "
                f"delete there; {setting} names the location",
            ) from error
        raise Unreachable(
            f"{what} does not answer ({' '.join(str(error).split()) or error_type})",
            f"Check the network, {setting}" + (" and AWS_ENDPOINT_URL_S3" if "s3://" in what else ""),
        ) from error


def is_client_error(error: BaseException) -> bool:
    """Return whether an object store's client raised the error. s3fs raises some errors of botocore unchanged, and
    others as an OSError with the original as its cause."""
    return any(type(each).__module__.partition(".")[0] in CLIENT_PACKAGES for each in (error, error.__cause__))


def _error_code(error: BaseException) -> str:
    """Return S3's error code, or an empty string if there is none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def list_dir(folder: UPath) -> dict[str, bool]:
    """Return the names in a folder, each with whether it is a folder; empty if there is no such folder.

    `glob` and `is_dir` of UPath return nothing and False also if the store denies access.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        if is_local(folder):
            return {entry.name: entry.is_dir() for entry in os.scandir(folder.path)}
        infos = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        if _error_code(error) == "NoSuchBucket":
            raise
        return {}
    names = {str(info["name"]).rstrip("/"): info["type"] == "directory" for info in infos}
    return {name.rsplit("/", 1)[-1]: deep for name, deep in names.items() if name != folder.path.rstrip("/")}


def list_files(folder: UPath) -> dict[str, dict[str, Any]]:
    """Return the store's description of each file below a folder, by relative path, with one listing."""
    prefix = folder.path.rstrip("/") + "/"
    return {name.removeprefix(prefix): info for name, info in folder.fs.find(folder.path, detail=True).items()}


def etag(info: dict[str, Any]) -> str | None:
    """Return what the store calls a file's content (another content has another ETag), or None.

    Args:
        info: a value of `list_files`.
    """
    # S3 and http, Azure, Google, the Hub
    return next((info[key] for key in ("ETag", "etag", "md5Hash", "blob_id") if info.get(key)), None)


def read_all(paths: Iterable[UPath]) -> dict[UPath, bytes]:
    """Return the content of each path that exists; several are read at once.

    Raises:
        OSError: one of them cannot be read.
    """
    wanted = list(paths)
    contents = {path: _read(path) for path in wanted[:1]}  # see `_first_and_rest`
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        contents.update(zip(wanted[1:], pool.map(_read, wanted[1:]), strict=True))
    return {path: content for path, content in contents.items() if content is not None}


def _read(path: UPath) -> bytes | None:
    try:
        return path.fs.cat_file(path.path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if _error_code(error) == "NoSuchBucket":
            raise
        return None


def upload(source: Path, names: Iterable[str], target: UPath) -> None:
    """Copy files of a local folder, by relative path, into a folder on an object store, several at once."""
    for part in _first_and_rest(names):
        remote = [(target / name).path for name in part]
        target.fs.put([str(source / name) for name in part], remote, batch_size=PARALLEL_COPIES)


def download(source: UPath, names: Iterable[str], target: Path) -> None:
    """Copy files of a folder on an object store, by relative path, into a local folder, several at once."""
    for part in _first_and_rest(names):
        for name in part:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        local = [str(target / name) for name in part]
        source.fs.get([(source / name).path for name in part], local, batch_size=PARALLEL_COPIES)


def _first_and_rest(names: Iterable[str]) -> list[list[str]]:
    """Split names into the first one and the rest. s3fs connects at its first request; if several requests come first
    at once, each one connects and closes the connections of the others."""
    names = list(names)
    return [part for part in (names[:1], names[1:]) if part]
