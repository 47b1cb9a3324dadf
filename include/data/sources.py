"""Sources of rows: pin a dataset to a revision, and read the rows of the pinned dataset.

A dataset is a Hub id (`owner/name`), or a path or URL of a parquet, jsonl(.gz), json(.gz) or csv(.gz) file. A revision
is a commit sha on the Hub, and a digest of the content elsewhere.
"""

from __future__ import annotations

import csv
import functools
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import orjson

from include.errors import BadData, Conflict, NoPermission, NotFound, RetuneError, Unreachable
from include.paths import PROJECT, var
from include.storage.files import file_digest, fingerprint
from include.storage.hub import hub_api, hub_errors
from include.storage.object_store import etag, object_errors

FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
ROWS_PER_GROUP = 5000


@dataclass(frozen=True)
class DatasetRef:
    """A dataset and the part of it that is read.

    Attributes:
        name: Hub id, path or URL. A relative path is relative to the checkout.
        config, split: configuration and split of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset; None: the newest commit.
        field: the recipe field that names the dataset, for messages.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str = "dataset"


def is_hub_id(name: str) -> bool:
    """Return whether a dataset or model is on the Hub: `owner/name` without a known file type, and no local path."""
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "~"))
    return bool(plain) and not name.endswith(FORMATS) and not (PROJECT / name).exists()


def absolute_path(path_or_url: str) -> str:
    """Return the absolute path of a path relative to the checkout. URLs stay as they are."""
    return path_or_url if "://" in path_or_url else str((PROJECT / Path(path_or_url).expanduser()).resolve())


def absolute_source(name: str) -> str:
    """Return the name of a dataset or model with an absolute path, if it is a path. Hub ids and URLs stay as they are.

    The result means the same dataset or model in every working folder.
    """
    return name if is_hub_id(name) else absolute_path(name)


def pin_dataset(dataset: DatasetRef, expected: str | None = None) -> str:
    """Return the dataset's current revision.

    Args:
        dataset: the dataset; `revision` counts only for a Hub dataset.
        expected: a revision from an earlier call. For a Hub dataset, `expected` replaces `revision`: the Hub keeps old
            commits. For a file, the current revision must be equal to `expected`.

    Raises:
        Conflict: the file has another revision than expected.
        NotFound: the dataset does not exist.
        NoPermission: it cannot be read with this account.
        Unreachable: its server does not answer.
        BadData: the file is damaged.
    """
    name = dataset.name
    if is_hub_id(name):
        with hub_errors(f"the dataset {name}", dataset.field):
            return str(hub_api().dataset_info(name, revision=expected or dataset.revision).sha)
    if not name.endswith(FORMATS):
        raise NotFound(
            f"field '{dataset.field}': '{name}' is neither a Hub id (owner/name) nor a file of a known type",
            f"Name a file that ends in {', '.join(FORMATS)}",
        )
    with file_errors(name, dataset.field):
        revision = _file_revision(name)
    if expected and revision != expected:
        raise Conflict(
            f"field '{dataset.field}': {name} has changed: its revision was {expected[:8]} and is now {revision[:8]}",
            "Run again: a run reads one revision from start to end",
        )
    return revision


@functools.lru_cache(maxsize=64)
def _digest(path: str, mtime_ns: int, size: int) -> str:
    """Return the digest of a file, cached until its time or size changes: a dataset watch asks every few minutes."""
    return file_digest(Path(path))


def _file_revision(name: str) -> str:
    if "://" not in name:
        state = Path(absolute_path(name)).stat()
        return _digest(absolute_path(name), state.st_mtime_ns, state.st_size)
    fs, path = fsspec.url_to_fs(name)
    fs.invalidate_cache()  # fsspec caches listings
    info = fs.info(path)
    if known := etag(info):
        return fingerprint([name, known])
    with fs.open(path) as file:
        return fingerprint([zlib.crc32(file.read()), info.get("size")])


@contextmanager
def file_errors(name: str, field: str = "dataset") -> Iterator[None]:
    """Convert errors of file systems and decompressors to errors for people.

    Args:
        name: the file, for the message.
        field: the recipe field that names the file.

    Raises:
        NotFound, NoPermission, Unreachable: the file cannot be opened.
        BadData: the file is damaged.
    """
    try:
        with object_errors(f"field '{field}': {name}", f"field '{field}'") if "://" in name else nullcontext():
            yield
    except RetuneError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFound(
            f"field '{field}': there is no file {name}", "Check the path; a relative path is relative to the checkout"
        ) from error
    except PermissionError as error:
        raise NoPermission(f"field '{field}': {name} cannot be read", "Correct its permissions") from error
    except (EOFError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, OSError) and "://" in name:
            raise Unreachable(f"field '{field}': {name} cannot be fetched ({error})", "Check the address") from error
        raise BadData(
            f"field '{field}': {name} cannot be read: {error}", "The file is truncated or damaged: replace it"
        ) from error


def read_rows(dataset: DatasetRef) -> Iterator[bytes]:
    """Yield every row of a pinned dataset, unchanged, as one JSON document.

    A line of a jsonl file that is not JSON is yielded as it is: `validate` refuses such rows.

    Args:
        dataset: `revision` is the pinned one, see `pin_dataset`.

    Raises:
        NotFound, NoPermission, Unreachable, BadData: see `pin_dataset`.
    """
    if is_hub_id(dataset.name):
        yield from _hub_rows(dataset)
        return
    with file_errors(dataset.name, dataset.field):
        yield from _file_rows(dataset.name)


def _file_rows(name: str) -> Iterator[bytes]:
    path = absolute_path(name)
    if not name.endswith(FORMATS):
        raise NotFound(f"{name} has no known file type", f"Name a file that ends in {', '.join(FORMATS)}")
    file_type = next(k for k in sorted(FORMATS, key=len, reverse=True) if path.endswith(k)).removesuffix(".gz")
    if file_type == ".parquet":
        yield from _parquet_rows(path)
        return
    with fsspec.open(path, "rb", compression="infer") as file:
        yield from {".jsonl": _lines, ".json": _json_rows, ".csv": _csv_rows}[file_type](file)


def _hub_rows(dataset: DatasetRef) -> Iterator[bytes]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    with hub_errors(f"the dataset {dataset.name}", dataset.field):
        try:
            rows = load_dataset(
                dataset.name,
                dataset.config,
                split=dataset.split,
                revision=dataset.revision,
                # if the Hub fails, `datasets` takes any other revision that it finds in the same cache folder
                cache_dir=str(var() / "cache" / "datasets" / str(dataset.revision)),
            )
        except ValueError as error:  # unknown configuration or split; the message lists the known ones
            message = " ".join(str(error).split())
            split = "dataset_config and dataset_split" if dataset.field == "dataset" else "eval_split"
            raise NotFound(f"field '{dataset.field}': {message}", f"Set {split}") from error
    for row in rows:
        yield orjson.dumps(row, default=str)


def _parquet_rows(path: str) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(path, "rb") as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_GROUP):
                yield from (orjson.dumps(row, default=str) for row in batch.to_pylist())
        except (pa.ArrowException, OSError) as error:
            message = " ".join(str(error).split())
            raise BadData(
                f"field 'dataset': {path} is not a complete parquet file: {message}", "Replace the file"
            ) from error


def _lines(file: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(file):
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line := line.strip():
            yield line


def _json_rows(file: io.BufferedIOBase) -> Iterator[bytes]:
    content = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        rows = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        if content.lstrip()[:1] == b"{":  # JSON lines in a file named .json
            yield from _lines(io.BytesIO(content))
            return
        raise ValueError(f"not JSON, {error}") from None
    if isinstance(rows, dict):
        rows = next((value for value in rows.values() if isinstance(value, list)), [rows])
    if not isinstance(rows, list):
        raise ValueError("it has no list of rows")
    yield from (orjson.dumps(row) for row in rows)


def _csv_rows(file: Any) -> Iterator[bytes]:
    csv.field_size_limit(2**31 - 1)
    try:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        yield from (orjson.dumps(row, option=orjson.OPT_NON_STR_KEYS) for row in csv.DictReader(text))
    except csv.Error as error:
        raise ValueError(f"not CSV, {error}") from error
