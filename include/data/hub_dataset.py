"""Rows of a dataset on the Hugging Face Hub.

`datasets` says which data files belong to a configuration and a split. The files are then read as local ones are, row
by row: `datasets` itself needs one type per column in all files. It reads the rows only where the split is a part or a
sum of splits, and where the files are of another type or have options of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from include.data.files import ROWS_PER_GROUP, SPLIT_FIELDS, file_errors, file_rows, file_type, plain_value
from include.data.listing import NOT_ROWS, joined
from include.errors import BadData, NoPermission, NoSpace, NotFound, PermanentError, RetuneError
from include.paths import var
from include.storage.hub import hub_api, hub_errors

COMMON_FIELDS = {"name", "version", "data_dir", "data_files", "description", "features"}  # of every configuration


def hub_rows(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    note: Callable[[str], None],
    field: str = "dataset",
) -> Iterator[bytes]:
    """Yield every row of a Hub dataset as one JSON document.

    Args:
        revision: the pinned commit.
        note: is told which files of the dataset are not read, and what `file_rows` has to say about a file.
        field: the recipe field that names the dataset, for messages.

    Raises:
        NotFound: the dataset, configuration or split does not exist, or the dataset has no data files.
        BadData: the dataset has a loading script, or a file cannot be read.
        NoPermission, Unreachable, PermanentError: see `hub_errors`.
    """
    with _dataset_errors(name, field):
        files = _data_files(name, config, split, revision, field)
        others = _other_files(name, revision, files)
    if others:
        note(f"not read, of the same dataset: {joined(others)}")
    if files is None:
        yield from _loaded_rows(name, config, split, revision, field)
        return
    for file in files:
        with hub_errors(f"the file {file} of the dataset {name}", field):
            path = hub_api().hf_hub_download(name, file, repo_type="dataset", revision=revision)

        def note_file(text: str, file: str = file) -> None:
            note(f"{file}: {text}" if len(files) > 1 else text)

        with file_errors(f"{name}/{file}", field):
            yield from file_rows(os.path.abspath(path), split, note_file)


def _data_files(name: str, config: str | None, split: str, revision: str | None, field: str) -> list[str] | None:
    """Return the paths of the split's data files in the dataset; None if `datasets` must read the rows itself."""
    from datasets import load_dataset_builder

    settings: Any = load_dataset_builder(name, config, revision=revision, cache_dir=_cache(revision)).config
    defaults = type(settings)()
    own_options = any(
        getattr(settings, field.name) != getattr(defaults, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in COMMON_FIELDS
    )
    by_split = {str(key): list(map(str, urls)) for key, urls in (settings.data_files or {}).items()}
    if by_split and split not in by_split and split.replace("_", "").isalnum():
        raise NotFound(
            f"field '{SPLIT_FIELDS[field]}': the dataset {name} has no split '{split}'",
            f"Choose one of: {', '.join(by_split)}",
        )
    urls, prefix = by_split.get(split, []), f"hf://datasets/{name}@{revision}/"
    if own_options or not urls or not all(url.startswith(prefix) and file_type(url) for url in urls):
        return None
    return [url.removeprefix(prefix) for url in urls]


def _other_files(name: str, revision: str | None, files: list[str] | None) -> list[str]:
    """Return the dataset's files of known types that are not of this configuration and split."""
    if files is None:
        return []
    known = filter(file_type, hub_api().list_repo_files(name, repo_type="dataset", revision=revision))
    return sorted(file for file in set(known) - set(files) if file.rsplit("/", 1)[-1] not in NOT_ROWS)


def _loaded_rows(name: str, config: str | None, split: str, revision: str | None, field: str) -> Iterator[bytes]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    with _dataset_errors(name, field):
        rows: Any = load_dataset(name, config, split=split, revision=revision, cache_dir=_cache(revision))
    # as Arrow tables: images and sounds are not decoded
    for table in rows.with_format("arrow").iter(ROWS_PER_GROUP):
        yield from (orjson.dumps(row, default=plain_value) for row in table.to_pylist())


def _cache(revision: str | None) -> str:
    # if the Hub fails, `datasets` takes any other revision that it finds in the same cache folder
    return str(var() / "cache" / "datasets" / str(revision))


@contextmanager
def _dataset_errors(name: str, field: str) -> Iterator[None]:
    """Translate the errors of `datasets`; those of the Hub's client among their causes are translated as such."""
    with hub_errors(f"the dataset {name}", field):
        try:
            yield
        except RetuneError:
            raise
        except Exception as error:
            if translated := _translate(error, name, field):
                raise translated from error
            raise


def _translate(error: Exception, name: str, field: str) -> RetuneError | None:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import (
        DataFilesNotFoundError,
        DatasetGenerationError,
        DatasetNotFoundError,
        DatasetsError,
    )

    where, message = f"field '{field}': the dataset {name}", " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in message:
        return BadData(
            f"{where} has a loading script, which the library datasets no longer runs",
            "Name a dataset with data files. The Hub may have made such files of this one: set dataset_revision: "
            "refs/convert/parquet",
        )
    if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
        return NotFound(
            f"{where} has no data files of a known type ({message})", "Name another dataset, or another dataset_config"
        )
    if isinstance(error, DatasetNotFoundError):
        if "gated" in message:
            return NoPermission(f"{where} is gated", "Accept its terms on the Hub with the account of your token")
        return None if error.__cause__ else NotFound(f"{where} cannot be read: {message}", "Check name and revision")
    if isinstance(error, DatasetGenerationError):
        root: BaseException = error
        while cause := root.__cause__ or root.__context__:
            root = cause
        if isinstance(root, OSError):  # the network or the disk
            return None
        message = " ".join(str(root).split())
        return BadData(f"{where} cannot be read: {message}", "Correct its files, or name another dataset")
    if isinstance(error, OSError) and message.startswith("Not enough disk space"):
        return NoSpace(f"{where} does not fit on the disk: {message}", "Free some space and retry the task")
    if isinstance(error, (DatasetsError, ImportError)):
        return PermanentError(f"{where} cannot be read: {message}", "Correct the dataset, or name another one")
    if isinstance(error, ValueError) and "format for all splits" in message:
        return BadData(f"{where}: {message}", f"Name its files, for example {field}: hf://datasets/{name}/*.jsonl")
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        # unknown configuration or split; the message lists the known ones
        settings = "dataset_config and dataset_split" if field == "dataset" else SPLIT_FIELDS[field]
        return NotFound(f"{where}: {message}", f"Set {settings}")
    return None
