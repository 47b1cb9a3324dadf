"""Decontamination: rows that contain a prompt of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import orjson
import regex

from include.data.columns import CONVERSATION_COLUMNS
from include.data.conversation import ParsedRow
from include.data.files import file_errors
from include.data.literals import read_literal
from include.data.sharegpt import parse_row
from include.data.sources import DatasetRef, absolute_path, is_hub_id, read_rows
from include.data.words import hash_shingles, hash_words
from include.errors import BadData, NotFound

FIELD = "decontaminate_against"
COLUMNS = ("prompt", "question", "instruction", "turns", *CONVERSATION_COLUMNS)  # the first one that a file has is read
LEAST_WORDS = 8  # consecutive words of a prompt that a row must not contain
LEAST_CHARACTERS = 16  # the same where each character is a word, see `include.data.words`
Note = Callable[[str], None]
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


def read_prompts(name: str, column: str | None = None, note: Note = lambda _: None) -> tuple[str, list[str]]:
    """Return where the prompts of a benchmark file come from, for people, and its prompts, "" for a row without one.

    They are the lines of a .txt file. Other files have rows: a column is read by its name. `instruction` is joined
    with `input`; of a list of turns or of a conversation the first turn of the user is read.

    Args:
        name: path or URL of the file, or of a folder or pattern. Of a JSON file with several lists of rows, `test` is
            read.
        column: the column to read; None: the first of `COLUMNS` that the file has.
        note: see `include.data.sources.read_rows`.

    Raises:
        NotFound, NoPermission, Unreachable: see `include.data.sources.pin_dataset`.
        BadData: the file is damaged, has no such column, or no prompt in it.
    """
    if is_hub_id(name):
        raise NotFound(f"field '{FIELD}': there is no file {name}", "Give the path or URL of a file: a Hub id is none")
    if name.endswith(".txt"):
        with file_errors(name, FIELD), fsspec.open(absolute_path(name), "rt", encoding="utf-8-sig") as file:
            prompts = [line.strip() for line in file if line.strip()]
        found = "lines"
    else:
        with file_errors(name, FIELD):
            rows = [orjson.loads(raw) for raw in read_rows(DatasetRef(name, split="test", field=FIELD), note)]
        rows = [{"conversations": row} if isinstance(row, list) else row for row in rows]
        names = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
        chosen = column or next((known for known in COLUMNS if known in names), None)
        if chosen is None or chosen not in names:
            has = ", ".join(names) or "none"
            raise BadData(
                f"field '{FIELD}': {name} has no column {column or 'of prompts'} (its columns: {has})",
                "Name the column of the prompts in decontaminate_column",
            )
        prompts = [_prompt(row, chosen) if isinstance(row, dict) else "" for row in rows]
        found = f"column {chosen}"
    if not any(prompts):
        raise BadData(
            f"field '{FIELD}': {name} has no prompt in its {found}",
            "Name the column of the prompts in decontaminate_column, or correct the file",
        )
    return found, prompts


def describe_prompts(name: str, found: str, prompts: list[str]) -> str:
    """Return one line for the log: how many prompts were read, from where, and the first ones."""
    taken = [" ".join(prompt.split()) for prompt in prompts if prompt]
    shown = "; ".join(f'"{prompt[:60]}{"..." if len(prompt) > 60 else ""}"' for prompt in taken[:3])
    number = f"{len(taken):,} prompt{'s' if len(taken) > 1 else ''}"
    without = f" (rows without one: {len(prompts) - len(taken):,})" if len(taken) < len(prompts) else ""
    return f"{FIELD}: {number} from the {found} of {Path(name).name}{without}, first {shown}"


def _prompt(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # a list in a CSV file
        value = read_literal(value, column, ParsedRow())
    if isinstance(value, list) and column not in CONVERSATION_COLUMNS and value and isinstance(value[0], dict):
        row, column = {"conversations": value}, "conversations"
    if column in CONVERSATION_COLUMNS:
        conversation = parse_row(orjson.dumps({column: row.get(column)})).conversation
        return next(
            (text for role, text in zip(conversation.roles, conversation.contents, strict=True) if role == "user"), ""
        ).strip()
    if isinstance(value, list):
        value = next((text for text in value if isinstance(text, str)), "")
    text = value.strip() if isinstance(value, str) else ""
    extra = row.get("input") if column == "instruction" else None
    return f"{text}\n\n{extra.strip()}" if text and isinstance(extra, str) and extra.strip() else text


class Benchmark:
    """Prompts of a benchmark that must not occur in training rows.

    A text contains a prompt if the two share `LEAST_WORDS` consecutive words, or `LEAST_CHARACTERS` in scripts where
    each character is a word. A prompt with fewer words is too common to be searched for in longer texts: it must be
    the whole text.

    Args:
        prompts: the prompts; "" is none.
    """

    def __init__(self, prompts: list[str]):
        import pyarrow as pa

        hashes, counts = hash_words(pa.array(prompts, pa.large_string()))
        unspaced = np.array([len(_UNSPACED.findall(prompt)) for prompt in prompts], np.int64)
        least = np.where(2 * unspaced > counts, LEAST_CHARACTERS, LEAST_WORDS)
        self._known: list[tuple[int, bool, np.ndarray, np.ndarray]] = []  # length, whole text?, shingles, prompts
        for length in np.unique(np.minimum(counts, least)[counts > 0]).tolist():
            for whole in (False, True):
                chosen = (np.minimum(counts, least) == length) & ((counts < least) == whole) & (counts > 0)
                shingles, numbers = hash_shingles(hashes[np.repeat(chosen, counts)], counts[chosen], length)
                shingles, first = np.unique(shingles, return_index=True)
                if len(shingles):
                    self._known.append((length, whole, shingles, np.repeat(np.flatnonzero(chosen), numbers)[first]))

    def find(self, hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return for each text the index of a prompt that it contains, or -1 (int32).

        Args:
            hashes, counts: words of the texts, see `hash_words`.
        """
        found = np.full(len(counts), -1, np.int32)
        for length, whole, prompts, owners in self._known:
            chosen = counts == length if whole else counts >= length
            shingles, numbers = hash_shingles(hashes[np.repeat(chosen, counts)], counts[chosen], length)
            places = np.minimum(np.searchsorted(prompts, shingles), len(prompts) - 1)
            hits = prompts[places] == shingles
            found[np.repeat(np.flatnonzero(chosen), numbers)[hits]] = owners[places[hits]]
        return found
