"""Tokenized rows: conversations as ids and loss masks, and the Arrow files in which stages exchange them.

A reader maps these files into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from include.chat.encoder import range_indices

SUMMED = ("rows", "conversations", "tokens", "trained")
IGNORED = -100  # the label that PyTorch's cross entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """Conversations as the trainer needs them: sequences of tokens, one after another in flat arrays.

    Attributes:
        ids: token ids (int32).
        loss_mask: whether the loss counts each token (bool, same length).
        ends: the end of each sequence in the two arrays (int64, one entry per sequence).
        origin: the index of each sequence's conversation (int64, ascending); by default each has one sequence.
        bos: how many beginning-of-text tokens the template writes in each sequence (int32); by default one.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    ends: np.ndarray
    origin: np.ndarray = None  # type: ignore[assignment]
    bos: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.origin is None:
            object.__setattr__(self, "origin", np.arange(len(self.ends)))
        if self.bos is None:
            object.__setattr__(self, "bos", np.ones(len(self.ends), np.int32))

    @property
    def labels(self) -> np.ndarray:
        """Return the ids where the loss counts the token, else -100 (int32, as long as `ids`)."""
        return np.where(self.loss_mask, self.ids, np.int32(IGNORED))

    @property
    def starts(self) -> np.ndarray:
        """Return the start of each sequence (int64, one entry per sequence)."""
        return np.concatenate([[0], self.ends])[:-1].astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each sequence (int64)."""
        return self.ends - self.starts

    def truncate(self, max_tokens: int) -> Encoded:
        """Return the sequences with at most their first `max_tokens` tokens."""
        kept = np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths) < max_tokens
        ends = np.minimum(self.lengths, max_tokens).cumsum()
        return Encoded(self.ids[kept], self.loss_mask[kept], ends, self.origin, self.bos)

    def rows(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the ids and the labels of each sequence, as lists."""
        labels = self.labels
        for start, end in zip(self.starts, self.ends, strict=True):
            yield self.ids[start:end].tolist(), labels[start:end].tolist()

    def replaced(self, conversations: np.ndarray, other: Encoded) -> Encoded:
        """Return this with the sequences of some conversations replaced.

        Args:
            conversations: the indices of these conversations, ascending (int64).
            other: their sequences; its `origin` counts in `conversations`.
        """
        keep = np.flatnonzero(~np.isin(self.origin, conversations))
        origin = np.concatenate([self.origin[keep], conversations[other.origin]])
        starts = np.concatenate([self.starts[keep], other.starts + len(self.ids)])
        lengths = np.concatenate([self.lengths[keep], other.lengths])
        order = np.argsort(origin, kind="stable")
        indices = range_indices(starts[order], lengths[order])
        ids, mask = (np.concatenate([getattr(of, name) for of in (self, other)]) for name in ("ids", "loss_mask"))
        bos = np.concatenate([self.bos[keep], other.bos])
        return Encoded(ids[indices], mask[indices], lengths[order].cumsum(), origin[order], bos[order])


def batch(encoded: Encoded, rows: Any, chosen: Any) -> Any:
    """Return an Arrow record batch of the chosen sequences: `row`, `input_ids`, `labels`.

    Args:
        rows: the row number of each sequence (int64 array).
        chosen: the indices of the chosen sequences, ascending.
    """
    import pyarrow as pa

    lengths = encoded.ends - encoded.starts
    ids, labels = encoded.ids, encoded.labels
    if len(chosen) < len(rows):
        keep = np.zeros(len(rows), bool)
        keep[chosen] = True
        flat = np.repeat(keep, lengths)
        ids, labels = ids[flat], labels[flat]
    offsets = pa.array(np.concatenate([[0], lengths[chosen].cumsum()]).astype(np.int32))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, labels)]
    return pa.RecordBatch.from_arrays([pa.array(rows[chosen]), *lists], ["row", "input_ids", "labels"])


def pair_batch(chosen: Encoded, rejected: Encoded, rows: Any, used: Any) -> Any:
    """Return an Arrow record batch of the used preference rows: `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`.

    On both sides, prompt and answer together are the conversation's tokens up to the end of the answer. Where a token
    covers the end of the header and the begin of an answer, the pair is cut before that token (see `prompt_tokens`).

    Args:
        chosen: the conversations with the chosen answer, which is the last segment of tokens in the loss.
        rejected: the same conversations with the rejected answer.
        rows: the row number of each conversation (int64 array).
        used: the indices of the used conversations.
    """
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for i in used:
        begin = prompt_tokens(chosen, rejected, i)
        for name, encoded in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            ids = encoded.ids[encoded.starts[i] : encoded.ends[i]]
            columns[name].append(ids[begin : answer_span(encoded, i)[1]])
        columns["prompt_ids"].append(ids[:begin])
    lists = {name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()}
    return pa.RecordBatch.from_pydict({"row": pa.array(rows[np.asarray(used, int)]), **lists})


def prompt_tokens(chosen: Encoded, rejected: Encoded, i: int) -> int:
    """Return the number of tokens that the two conversations of a pair have in common before either answer begins."""
    before = min(answer_span(encoded, i)[0] for encoded in (chosen, rejected))
    one, other = (encoded.ids[encoded.starts[i] : encoded.starts[i] + before] for encoded in (chosen, rejected))
    differ = np.flatnonzero(one != other)
    return int(differ[0]) if len(differ) else before


def sample(table: Any, most: int) -> np.ndarray:
    """Return the indices of at most so many rows, ascending (int64): all, or those whose ids have the lowest digests.

    The sample is random with respect to everything but a row's content, and other rows hardly change it.

    Args:
        table: an Arrow table with columns of token ids, whose names end in `_ids`.
    """
    if len(table) <= most:
        return np.arange(len(table))
    columns = [table[name] for name in table.column_names if name.endswith("_ids")]
    digests = [
        hashlib.sha256(b"|".join(ids.values.to_numpy().tobytes() for ids in row)).digest()
        for row in zip(*columns, strict=True)
    ]
    return np.sort(sorted(range(len(table)), key=digests.__getitem__)[:most])


def answer_span(encoded: Encoded, i: int) -> tuple[int, int]:
    """Return begin and end of a conversation's last segment of tokens in the loss, counted from its first token.

    A conversation without such tokens gives an empty span at its end.
    """
    mask = encoded.loss_mask[encoded.starts[i] : encoded.ends[i]]
    if not mask.any():
        return len(mask), len(mask)
    end = int(np.flatnonzero(mask)[-1]) + 1
    before = np.flatnonzero(~mask[:end])
    return (int(before[-1]) + 1 if len(before) else 0), end


def write_rows(path: Path, batches: list[Any]) -> dict[str, Any]:
    """Write record batches as one Arrow stream; without any row, write no file.

    Returns:
        The number of rows, of conversations (a split one has several rows), of tokens and of tokens in the loss
        (`trained`), and the sha256 of all ids and labels.
    """
    import pyarrow as pa

    metadata: dict[str, Any] = {"rows": 0, "conversations": 0, "tokens": 0, "trained": 0, "sha256": ""}
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        return metadata
    digest = hashlib.sha256()
    metadata["conversations"] = len({row for batch in batches for row in batch["row"].to_pylist()})
    with pa.ipc.new_stream(str(path), batches[0].schema) as writer:
        for batch in batches:
            lists = {name: batch[name].flatten().to_numpy() for name in batch.schema.names[1:]}
            for values in lists.values():
                digest.update(values.tobytes())
            metadata["rows"] += len(batch)
            metadata["tokens"] += sum(len(values) for name, values in lists.items() if name != "labels")
            metadata["trained"] += (
                int((lists["labels"] != IGNORED).sum())
                if "labels" in lists
                else sum(len(lists[name]) for name in ("chosen_ids", "rejected_ids"))
            )
            writer.write_batch(batch)
    return {**metadata, "sha256": digest.hexdigest()}


def sum_up(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of what `write_rows` returned for several files.

    `ids_sha256` is the sha256 of the files' digests, in their order.
    """
    sums: dict[str, Any] = {name: sum(file[name] for file in files) for name in SUMMED}
    digests = "".join(file["sha256"] for file in files)
    return {**sums, "ids_sha256": hashlib.sha256(digests.encode()).hexdigest()}


def load_table(files: Iterable[Path]) -> Any:
    """Return the rows of Arrow streams, one file after another, as one `pyarrow.Table` of mapped memory."""
    import pyarrow as pa

    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files])


def load_rows(files: Iterable[Path]) -> Any:
    """Return the rows of Arrow streams, one file after another, as one `datasets.Dataset`.

    The dataset does not know the files: libraries write caches beside the files of a dataset.
    """
    from datasets import Dataset

    files = list(files)
    names = [[str(file), file.stat().st_size] for file in files]  # by default the fingerprint reads every row
    return Dataset(load_table(files), fingerprint=hashlib.sha256(repr(names).encode()).hexdigest()[:16])
