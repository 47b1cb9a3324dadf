"""Sources of rows: pin a dataset to a revision, and read the rows of the pinned dataset.

A dataset is a Hub id (`owner/name`), or paths and URLs of parquet, jsonl(.gz), json(.gz) or csv(.gz) files, of folders
of such files, and patterns. A revision is a commit sha on the Hub, and a digest of the content elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from include.data.files import FORMATS, ROWS_PER_GROUP, file_errors, file_rows
from include.data.hub_dataset import hub_rows
from include.data.listing import find_files
from include.errors import BadRecipe, Conflict
from include.paths import PROJECT
from include.storage.hub import hub_api, hub_errors

__all__ = [
    "FORMATS", "ROWS_PER_GROUP", "DatasetRef", "absolute_dataset", "absolute_path", "absolute_source", "dataset_label",
    "is_hub_id", "pin_dataset", "read_rows", "short_name",
]  # fmt: skip


@dataclass(frozen=True)
class DatasetRef:
    """A dataset and the part of it that is read.

    Attributes:
        name: a Hub id; or the path or URL of a file, of a folder, or a pattern; or a list of these. A relative path is
            relative to the checkout.
        config, split: configuration and split of a Hub dataset. Of a JSON file with several lists of rows, the one with
            the name of the split is read.
        revision: branch, tag or commit of a Hub dataset; None: the newest commit.
        field: the recipe field that names the dataset, for messages.
        named_split: whether files must have a list with the name of the split. Otherwise files without any such lists
            are read, too.
    """

    name: str | list[str]
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str = "dataset"
    named_split: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name, or the names of the list."""
        return (self.name,) if isinstance(self.name, str) else tuple(self.name)

    @property
    def hub_id(self) -> str | None:
        """Return the Hub id, or None for files.

        Raises:
            BadRecipe: a list has a Hub id among its files.
        """
        hub_ids = [name for name in self.names if is_hub_id(name)]
        if hub_ids and len(self.names) > 1:
            raise BadRecipe(
                f"field '{self.field}': the list has '{hub_ids[0]}', which is neither a file nor a folder that exists",
                "A list has files, folders and patterns; name a Hub dataset alone",
            )
        return hub_ids[0] if hub_ids else None

    @property
    def has_splits(self) -> bool:
        """Return whether the split says which rows are read."""
        return self.named_split or self.hub_id is not None


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


def absolute_dataset(dataset: str | list[str]) -> str | list[str]:
    """Return `absolute_source` of a dataset, or of each name of its list."""
    return absolute_source(dataset) if isinstance(dataset, str) else [absolute_source(name) for name in dataset]


def dataset_label(dataset: str | list[str]) -> str:
    """Return a dataset's name as one text; names of a list are joined by commas."""
    return dataset if isinstance(dataset, str) else ", ".join(dataset)


def short_name(dataset: str | list[str]) -> str:
    """Return a dataset's or model's name without the folders before it: `owner/name`, `rows.jsonl`, `data/*.jsonl`."""
    if not isinstance(dataset, str):
        return ", ".join(map(short_name, dataset))
    if is_hub_id(dataset):
        return dataset
    return "/".join(dataset.rstrip("/").split("/")[-2 if "*" in dataset.rsplit("/", 1)[-1] else -1 :])


def pin_dataset(dataset: DatasetRef, expected: str | None = None) -> str:
    """Return the dataset's current revision.

    Args:
        dataset: the dataset; `revision` counts only for a Hub dataset.
        expected: a revision from an earlier call. For a Hub dataset, `expected` replaces `revision`: the Hub keeps old
            commits. For files, the current revision must be equal to `expected`.

    Raises:
        Conflict: the files have another revision than expected.
        NotFound: the dataset does not exist, or no file matches it.
        NoPermission: it cannot be read with this account.
        Unreachable: its server does not answer.
        BadData: a file is damaged.
        BadRecipe: a list names a Hub dataset.
    """
    if hub_id := dataset.hub_id:
        with hub_errors(f"the dataset {hub_id}", dataset.field):
            return str(hub_api().dataset_info(hub_id, revision=expected or dataset.revision).sha)
    revision = find_files(map(absolute_path, dataset.names), dataset.field).revision()
    if expected and revision != expected:
        name = dataset_label(dataset.name)
        raise Conflict(
            f"field '{dataset.field}': {name} has changed: its revision was {expected[:8]} and is now {revision[:8]}",
            "Run again: a run reads one revision from start to end",
        )
    return revision


def read_rows(dataset: DatasetRef, note: Callable[[str], None]) -> Generator[bytes]:
    """Yield every row of a pinned dataset as one JSON document.

    A row that is not JSON is yielded as it is: `validate` refuses such rows.

    Args:
        dataset: `revision` is the pinned one, see `pin_dataset`.
        note: is told, in sentences, which files and which parts of them are read and which are not.

    Raises:
        NotFound, NoPermission, Unreachable, BadData, BadRecipe: see `pin_dataset`.
    """
    if hub_id := dataset.hub_id:
        yield from hub_rows(hub_id, dataset.config, dataset.split, dataset.revision, note, dataset.field)
        return
    files = find_files(map(absolute_path, dataset.names), dataset.field)
    for sentence in files.describe():
        note(sentence)
    for name in files.infos:

        def note_file(text: str, name: str = name) -> None:
            note(text if files.single else f"{name.rsplit('/', 1)[-1]}: {text}")

        with file_errors(name, dataset.field):
            yield from file_rows(name, dataset.split, note_file, dataset.named_split)
