"""Datasets and base models: pin them to a revision, fetch what was pinned.

A dataset is a Hub id (`owner/name`), or a path or URL of a parquet, jsonl(.gz), json(.gz) or csv file. A base model
is a Hub id, a local folder, or `demo://little-llama`. Revisions are commit shas on the Hub and content digests
elsewhere, so that a run knows exactly what it used.
"""

from __future__ import annotations

import csv
import functools
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fsspec
import orjson

from include.data.sharegpt import read
from include.errors import BadData, Conflict, NoPermission, NotFound, RetuneError, Unreachable
from include.paths import PROJECT, var
from include.recipe import Recipe
from include.storage.files import file_digest, fingerprint
from include.storage.hub import hub_api, hub_errors
from include.storage.object_store import etag, object_errors

FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
ROWS_PER_GROUP = 5000


def is_hub_id(name: str) -> bool:
    """Whether a dataset or model name means the Hub: `owner/name`, and neither a file type nor something on disk."""
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "~"))
    return bool(plain) and not name.endswith(FORMATS) and not (PROJECT / name).exists()


def absolute(place: str) -> str:
    """A path relative to the checkout as an absolute one; URLs as they are."""
    return place if "://" in place else str((PROJECT / Path(place).expanduser()).resolve())


def located(place: str) -> str:
    """A dataset or model so that it means the same from everywhere: a Hub id or URL as it is, a path absolute."""
    return place if is_hub_id(place) else absolute(place)


def pin_dataset(recipe: Recipe, wanted: str | None = None) -> str:
    """The revision of the recipe's dataset as it is now.

    Args:
        wanted: a revision that it had; the Hub still has it, a file must still be it.

    Raises:
        Conflict: the file is not the wanted one any more.
        NotFound, NoPermission, Unreachable: it is not there, not readable, or its server does not answer.
    """
    name = recipe.dataset
    if is_hub_id(name):
        with hub_errors(f"the dataset {name}", "dataset"):
            return str(hub_api().dataset_info(name, revision=wanted or recipe.dataset_revision).sha)
    if not name.endswith(FORMATS):
        raise NotFound(
            f"field 'dataset': '{name}' is neither a Hub id (owner/name) nor a file of a known type",
            f"Name a file that ends in {', '.join(FORMATS)}",
        )
    with file_errors(name):
        found = _file_revision(name)
    if wanted and found != wanted:
        raise Conflict(
            f"field 'dataset': {name} has changed, it was {wanted[:8]} and is {found[:8]}",
            "Run again: a run uses one state of it from end to end",
        )
    return found


@functools.lru_cache(maxsize=64)
def _digest(path: str, mtime_ns: int, size: int) -> str:
    """The digest of a file, made anew when its time or size has changed; a watch asks for it every few minutes."""
    return file_digest(Path(path))


def _file_revision(name: str) -> str:
    if "://" not in name:
        state = Path(absolute(name)).stat()
        return _digest(absolute(name), state.st_mtime_ns, state.st_size)
    fs, path = fsspec.url_to_fs(name)
    fs.invalidate_cache()  # a file system remembers what it has listed
    info = fs.info(path)
    if known := etag(info):
        return fingerprint([name, known])
    with fs.open(path) as file:
        return fingerprint([zlib.crc32(file.read()), info.get("size")])


@contextmanager
def file_errors(name: str, field: str = "dataset") -> Iterator[None]:
    """Turns what file systems and decompressors raise into one sentence about the file that a field names.

    Raises:
        NotFound, NoPermission, BadData, Unreachable: see there.
    """
    try:
        with object_errors(f"field '{field}': {name}", f"field '{field}'") if "://" in name else nullcontext():
            yield
    except RetuneError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFound(
            f"field '{field}': there is no file {name}", "Check the path; it is taken from the checkout"
        ) from error
    except PermissionError as error:
        raise NoPermission(f"field '{field}': {name} cannot be read", "Correct its permissions") from error
    except (EOFError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, OSError) and "://" in name:
            raise Unreachable(f"field '{field}': {name} cannot be fetched ({error})", "Check the address") from error
        raise BadData(
            f"field '{field}': {name} cannot be read: {error}", "The file is cut or damaged: replace it"
        ) from error


def read_rows(recipe: Recipe) -> Iterator[bytes]:
    """Every row of the pinned dataset as it stands, as one JSON document each.

    A line of a jsonl file that is no JSON is passed on as it is: judging rows is the business of `validate`.

    Raises:
        NotFound, NoPermission, BadData, Unreachable: see `pin_dataset`; BadData names the file.
    """
    name = recipe.dataset
    if is_hub_id(name):
        yield from _hub_rows(recipe)
        return
    with file_errors(name):
        yield from _file_rows(name)


def _file_rows(name: str) -> Iterator[bytes]:
    place = absolute(name)
    if not name.endswith(FORMATS):
        raise NotFound(f"{name} is no file of a known type", f"Name a file that ends in {', '.join(FORMATS)}")
    kind = next(k for k in sorted(FORMATS, key=len, reverse=True) if place.endswith(k)).removesuffix(".gz")
    if kind == ".parquet":
        yield from _parquet_rows(place)
        return
    with fsspec.open(place, "rb", compression="infer") as file:
        yield from {".jsonl": _lines, ".json": _json_rows, ".csv": _csv_rows}[kind](file)


def read_prompts(place: str) -> list[str]:
    """The texts of a benchmark file: lines of a .txt, or the first text column or user turns of rows.

    Raises:
        NotFound, NoPermission, BadData, Unreachable: see `pin_dataset`.
    """
    with file_errors(place, "decontaminate_against"):
        if place.endswith(".txt"):
            with fsspec.open(absolute(place), "rt", encoding="utf-8") as file:
                return [line.strip() for line in file if line.strip()]
        return [text for raw in _file_rows(place) if (text := _prompt(raw))]


def _prompt(raw: bytes) -> str:
    conversation = read(raw).conversation
    if "user" in conversation.roles:
        return conversation.contents[conversation.roles.index("user")]
    row = orjson.loads(raw)
    values = row.values() if isinstance(row, dict) else [row]
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def _hub_rows(recipe: Recipe) -> Iterator[bytes]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    with hub_errors(f"the dataset {recipe.dataset}", "dataset"):
        try:
            rows = load_dataset(
                recipe.dataset,
                recipe.dataset_config,
                split=recipe.dataset_split,
                revision=recipe.dataset_revision,
                # datasets falls back to another revision that it has in the same cache when the Hub fails
                cache_dir=str(var() / "cache" / "datasets" / str(recipe.dataset_revision)),
            )
        except ValueError as error:  # an unknown configuration or split; the message lists the known ones
            problem = " ".join(str(error).split())
            raise NotFound(f"field 'dataset': {problem}", "Set dataset_config and dataset_split") from error
    for row in rows:
        yield orjson.dumps(row, default=str)


def _parquet_rows(place: str) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(place, "rb") as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_GROUP):
                yield from (orjson.dumps(row, default=str) for row in batch.to_pylist())
        except (pa.ArrowException, OSError) as error:
            problem = " ".join(str(error).split())
            raise BadData(
                f"field 'dataset': {place} is no whole parquet file: {problem}", "Replace the file"
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
        if content.lstrip()[:1] == b"{":  # lines of JSON under the name of .json
            yield from _lines(io.BytesIO(content))
            return
        raise ValueError(f"not JSON, {error}") from None
    if isinstance(rows, dict):
        rows = next((value for value in rows.values() if isinstance(value, list)), [rows])
    if not isinstance(rows, list):
        raise ValueError("it holds no list of rows")
    yield from (orjson.dumps(row) for row in rows)


def _csv_rows(file: Any) -> Iterator[bytes]:
    csv.field_size_limit(2**31 - 1)
    try:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        yield from (orjson.dumps(row, option=orjson.OPT_NON_STR_KEYS) for row in csv.DictReader(text))
    except csv.Error as error:
        raise ValueError(f"not CSV, {error}") from error
