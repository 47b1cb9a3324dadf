"""Rows of one file: parquet, jsonl, json or csv, also gzipped, on a disk, at an address or in an object store."""

from __future__ import annotations

import codecs
import csv
import errno
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
import orjson

from include.data.json_rows import NoRows, NoSplit, json_rows
from include.errors import BadData, NoPermission, NoSpace, NotFound, RetuneError, Unreachable
from include.paths import var
from include.storage.hub import hub_errors
from include.storage.object_store import is_client_error, object_errors
from include.storage.web import SCHEMES as WEB
from include.storage.web import web_errors, web_options

FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
ROWS_PER_GROUP = 5000
BUFFER = 1 << 20
EXTRA_FIELDS = "(beyond the header)"  # column of a csv row's fields that have no name
BEGINNINGS = {  # what a file may be in place of rows, and the remedy
    codecs.BOM_UTF16_LE: ("is UTF-16 text", "Save it as UTF-8"),
    codecs.BOM_UTF16_BE: ("is UTF-16 text", "Save it as UTF-8"),
    b"<!doctype html": ("is a web page", "Name the address of the file itself, for example its raw or download link"),
    b"<html": ("is a web page", "Name the address of the file itself, for example its raw or download link"),
    b"version https://git-lfs": ("is a pointer of Git LFS", "Fetch its content: git lfs pull"),
    b"PK\x03\x04": ("is a zip archive", "Unpack it, and name the files in it"),
}
SPLIT_FIELDS = {"dataset": "dataset_split", "eval_dataset": "eval_split", "eval_split": "eval_split"}


def file_type(name: str) -> str | None:
    """Return which of `FORMATS` a path or URL has, or None. Case, and a URL's query, do not matter."""
    path = re.split("[?#]", name)[0] if name.startswith(WEB) else name
    return next((each for each in sorted(FORMATS, key=len, reverse=True) if path.lower().endswith(each)), None)


def file_system(path_or_url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a path or URL, and the path in it. Listings are not cached."""
    fs, path = fsspec.url_to_fs(path_or_url, **(web_options() if path_or_url.startswith(WEB) else {}))
    fs.invalidate_cache()
    return fs, path


@contextmanager
def file_errors(name: str, field: str = "dataset") -> Iterator[None]:
    """Convert errors of file systems and decompressors to errors for people.

    Args:
        name: the file, for the message.
        field: the recipe field that names the file.

    Raises:
        NotFound, NoPermission, Unreachable: the file cannot be opened.
        NoSpace: the disk is full, to which it is copied.
        BadData: the file is damaged.
    """
    where = f"field '{field}': {name}"
    try:
        if name.startswith(WEB):
            urlsplit(name)
    except ValueError as error:
        raise NotFound(f"{where} is not a valid address ({error})", "Correct the address") from error
    try:
        with ExitStack() as stack:
            if name.startswith(WEB):
                stack.enter_context(web_errors(re.split("[?#]", name)[0], field))  # no signature in a log
            elif name.startswith("hf://"):
                stack.enter_context(hub_errors(name, field))
            elif "://" in name:
                stack.enter_context(object_errors(where, f"field '{field}'"))
            yield
    except RetuneError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFound(
            f"field '{field}': there is no file {name}", "Check the path; a relative path is relative to the checkout"
        ) from error
    except PermissionError as error:
        raise NoPermission(f"{where} cannot be read", "Correct its permissions") from error
    except NoSplit as error:
        split = SPLIT_FIELDS.get(field)
        do = f"Set {split} to the name of one of its lists" if split else "Save the list of rows as a file of its own"
        if field == "eval_split":
            do += ", or name another file in eval_dataset"
        raise BadData(f"{where} cannot be read: it {error}", do) from None
    except NoRows as error:
        raise BadData(f"{where} cannot be read: it {error}", error.remedy) from None
    except ValueError as error:
        if str(error).startswith("Protocol not known"):
            raise NotFound(
                f"{where} has an unknown kind of address", "Use https://, s3://, gs://, az:// or hf://, or a path"
            ) from error
        raise _damaged(where, error) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(where, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space is left for a copy of {name} in {var()}", "Free some space and retry") from error
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise NotFound(f"{where} cannot be opened: {error.strerror}", "Check the path") from error
        if error.errno or "://" in name:
            raise Unreachable(f"{where} cannot be read ({error})", "Check the disk and the network") from error
        raise _damaged(where, error) from error


def _damaged(where: str, error: Exception) -> BadData:
    message = " ".join(str(error).split())
    return BadData(f"{where} cannot be read: {message}", "The file is truncated or damaged: replace it")


def file_rows(name: str, split: str, note: Callable[[str], None], named_split: bool = False) -> Iterator[bytes]:
    """Yield every row of a file as one JSON document. Rows that are not JSON are yielded as they are.

    Args:
        name: absolute path or URL.
        split, note, named_split: see `json_rows`.

    Raises:
        NotFound: the name has no known type.
        Exception: see `file_errors`, which converts what is raised here.
    """
    kind = file_type(name)
    if kind is None:
        raise NotFound(f"{name} has no known file type", f"Name a file that ends in {', '.join(FORMATS)}")
    if named_split and not kind.startswith(".json"):
        raise NoSplit(f"has one list of rows, and so no split '{split}'")
    with ExitStack() as stack:
        file: Any = stack.enter_context(_open(name, seek=kind == ".parquet"))
        _check_beginning(file)
        if kind == ".parquet":
            yield from _parquet_rows(file)
            return
        if file.peek(2)[:2] == b"\x1f\x8b":  # servers may also unpack a file on the way
            file = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file), BUFFER))
            _check_beginning(file)
        elif kind.endswith(".gz") and file.peek(1) and not name.startswith(WEB):
            raise gzip.BadGzipFile(f"not a gzipped file, it begins with {file.peek(4)[:4]!r}")
        beginning = file.peek(64).lstrip(b"\xef\xbb\xbf \r\n\t")
        if beginning.startswith(b"PAR1"):
            raise NoRows("is a parquet file", "Give it a name that ends in .parquet")
        if kind.startswith(".csv"):
            if beginning[:1] in (b"{", b"["):
                raise NoRows("has JSON and no header of columns", "Give it a name that ends in .jsonl or .json")
            yield from _csv_rows(file)
        else:
            yield from json_rows(file, split, note, kind.startswith(".jsonl"), named_split)


@contextmanager
def _open(name: str, seek: bool = False) -> Iterator[Any]:
    """Open a file. At an http address it is read as a stream, because many servers send no parts of files.

    Args:
        seek: whether the reader moves in the file; a file at an http address is then fetched whole, to a local disk.
    """
    with ExitStack() as stack:
        if "://" not in name:
            yield stack.enter_context(Path(name).open("rb", BUFFER))
            return
        fs, path = file_system(name)
        if not name.startswith(WEB):
            raw: Any = stack.enter_context(fs.open(path, "rb"))
        elif seek:
            raw = stack.enter_context(_fetched(fs, path))
        else:
            raw = stack.enter_context(fs.open(path, "rb", block_size=0))
        yield stack.enter_context(io.BufferedReader(raw, BUFFER))


@contextmanager
def _fetched(fs: Any, path: str) -> Iterator[BinaryIO]:
    folder = var() / "work"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as copy:
        with fs.open(path, "rb", block_size=0) as source:
            shutil.copyfileobj(source, copy, BUFFER)
        copy.seek(0)
        yield copy


def _check_beginning(file: io.BufferedReader) -> None:
    beginning = file.peek(64).lstrip().lower()
    for mark, (what, remedy) in BEGINNINGS.items():
        if beginning.startswith(mark.lower()):
            raise NoRows(what, remedy)


def _parquet_rows(file: io.BufferedReader) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_GROUP):
            yield from (orjson.dumps(row, default=plain_value) for row in _as_dicts(batch))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno or is_client_error(error) or type(error) is not OSError):
            raise  # the disk or the network, not the content
        message = " ".join(str(error).split())
        raise ValueError(f"not a complete parquet file: {message}") from error


def _as_dicts(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # then only the rows with such bytes are refused
        for number in range(len(batch)):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield f"a text of this row is not UTF-8: {error}"


def plain_value(value: Any) -> str:
    """Return a value that JSON does not have as text. Some programs write texts as binary columns."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return f"({len(value):,} bytes)"
    return str(value)


def _csv_rows(file: io.BufferedReader) -> Iterator[bytes]:
    csv.field_size_limit(2**31 - 1)
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield from io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        ended = True

    reader = csv.DictReader(lines(), restkey=EXTRA_FIELDS)
    try:
        twice = [name for name, times in Counter(reader.fieldnames or ()).items() if times > 1 and name]
        if twice:  # of two such fields only the last would be read
            raise ValueError(f"the header has the column '{twice[0][:60]}' twice")
        before = len(reader.fieldnames or ()) and reader.line_num
        for row in reader:
            if ended and reader.line_num > before + 1:  # the field asked for more: it took in the rows after it
                raise ValueError(f"not CSV, the quoted field that begins in line {before + 1} has no end")
            before = reader.line_num
            try:
                yield orjson.dumps(row)
            except TypeError:  # bytes that are not UTF-8: the row goes on as it is, and is refused
                yield json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except csv.Error as error:
        raise ValueError(f"not CSV, line {reader.line_num}: {error}") from error
