"""The files that a dataset names: one file, the files of a folder, those that match a pattern, or a list of these."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from include.data.files import FORMATS, file_errors, file_system, file_type
from include.errors import NotFound
from include.storage.files import file_digest, fingerprint
from include.storage.object_store import etag
from include.storage.web import SCHEMES as WEB

MAGIC = set("*?[")
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # written by `datasets`
MAX_NAMES = 20  # in a message


@dataclass(frozen=True)
class Files:
    """The files of a dataset.

    Attributes:
        infos: by absolute path or URL, in the order in which they are read, what the file system says about the file;
            empty for a file on a disk.
        others: names of files and folders beside them that are not read.
        single: the dataset is one file, and not a folder, pattern or list.
        field: the recipe field that names them, for messages.
    """

    infos: dict[str, dict[str, Any]]
    others: tuple[str, ...]
    single: bool
    field: str

    def describe(self) -> Iterator[str]:
        """Yield sentences about what is read and what is not, if there is something to say."""
        if not self.single:
            yield f"files read, in this order: {names_of(self.infos)}"
        if self.others:
            yield f"not read: {names_of(self.others)}"

    def revision(self) -> str:
        """Return a digest of the files' content, and of their names if they are not one single file.

        Raises:
            Exception: see `file_errors`, which gives the error of a file its name.
        """
        revisions = []
        for name, info in self.infos.items():
            with file_errors(name, self.field):
                revisions.append([name, _revision(name, info)])
        return str(revisions[0][1]) if self.single else fingerprint(revisions)


def names_of(paths: Iterable[str]) -> str:
    """Return the last parts of paths for a message, see `joined`."""
    return joined([path.rstrip("/").rsplit("/", 1)[-1] for path in paths])


def joined(names: list[str]) -> str:
    """Return names for a message, at most `MAX_NAMES` of them."""
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def find_files(paths: Iterable[str], field: str) -> Files:
    """Return the files of a dataset. Those of a folder or pattern are in the order of their names.

    Args:
        paths: absolute paths or URLs of files, folders and patterns (`*`, `?`, `[...]`; `**` for folders below).
        field: the recipe field that names them, for messages.

    Raises:
        NotFound: a path is no file of a known type, a folder has no such file, or no file matches a pattern.
        NoPermission, Unreachable: see `file_errors`.
    """
    paths = tuple(paths)
    infos: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    single = len(paths) == 1
    for path in paths:
        with file_errors(path, field):
            found = {path: {}} if path.startswith(WEB) else _remote(path) if "://" in path else _local(path)
        if list(found) == [path]:
            if file_type(path) is None:
                raise _unknown_type(path, field)
            infos.update(found)
            continue
        single = False
        rows, rest = _split(found)
        if not rows:
            raise _no_rows(path, rest, any(info.get("type") == "directory" for info in found.values()), field)
        infos.update(rows)
        others += rest
    return Files(infos, tuple(dict.fromkeys(others)), single, field)


def _split(found: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Split what was found into files of rows and the rest, both by name; hidden files are neither."""
    rows, rest = {}, []
    for path, info in sorted(found.items()):
        name = path.rsplit("/", 1)[-1]
        if info.get("type") != "directory" and file_type(name) and name not in NOT_ROWS and not name.startswith("."):
            rows[path] = info
        elif not name.startswith("."):
            rest.append(path)
    return rows, rest


def _no_rows(path: str, rest: list[str], folders: bool, field: str) -> NotFound:
    what = "matches" if MAGIC & set(path) else "has"
    below = f"; {path.rstrip('/')}/**/* are the files of the folders below" if folders else ""
    return NotFound(
        f"field '{field}': {path} {what} no file of a known type" + (f"; it has: {names_of(rest)}" if rest else ""),
        f"Name files that end in {', '.join(FORMATS)}{below}",
    )


def _unknown_type(path: str, field: str) -> NotFound:
    if path.startswith(WEB):
        return NotFound(
            f"field '{field}': the address {path} does not end like a file of a known type",
            f"Name a file that ends in {', '.join(FORMATS)}; folders at http addresses cannot be listed",
        )
    return NotFound(
        f"field '{field}': '{path}' is neither a Hub id (owner/name) nor a file of a known type",
        f"Name a file that ends in {', '.join(FORMATS)}, a folder of such files, or a pattern such as data/*.jsonl",
    )


def _local(path: str) -> dict[str, dict[str, Any]]:
    here = Path(path)
    if here.is_dir():
        return {str(each): {"type": "directory"} if each.is_dir() else {} for each in here.iterdir()}
    if MAGIC & set(path) and not here.exists():
        # unlike Path.glob, it leaves out hidden files and folders
        matches = glob(path, recursive=True)  # noqa: PTH207
        return {each: {} for each in matches if not Path(each).is_dir()}
    if file_type(path):
        here.stat()
    return {path: {}}


def _remote(path: str) -> dict[str, dict[str, Any]]:
    fs, inside = file_system(path)
    if MAGIC & set(inside):
        found = {fs.unstrip_protocol(key): info for key, info in fs.glob(inside, detail=True).items()}
        if not found:  # a denied access also looks like this
            fs.ls(next(part for part in _parents(inside) if not MAGIC & set(part)))
        return {name: info for name, info in found.items() if info["type"] != "directory"}
    if file_type(path) and (info := fs.info(inside))["type"] != "directory":
        return {path: info}
    listed = {fs.unstrip_protocol(str(info["name"]).rstrip("/")): info for info in fs.ls(inside, detail=True)}
    own = fs.unstrip_protocol(inside.rstrip("/"))
    if own in listed and listed[own]["type"] != "directory":
        return {path: listed[own]}
    return {name: info for name, info in listed.items() if name != own}


def _parents(path: str) -> Iterator[str]:
    while "/" in path.strip("/"):
        path = path.rsplit("/", 1)[0]
        yield path
    yield path


def _revision(name: str, info: dict[str, Any]) -> str:
    if "://" not in name:
        state = Path(name).stat()
        return _digest(name, state.st_mtime_ns, state.st_size)
    fs, path = file_system(name)
    info = info or fs.info(path)
    if known := etag(info):
        return fingerprint([name, known])
    checksum = 0
    with fs.open(path, "rb", **({"block_size": 0} if name.startswith(WEB) else {})) as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return fingerprint([checksum, info.get("size")])


@functools.lru_cache(maxsize=4096)
def _digest(path: str, mtime_ns: int, size: int) -> str:
    """Return the digest of a file, cached until its time or size changes: a dataset watch asks every few minutes."""
    return file_digest(Path(path))
