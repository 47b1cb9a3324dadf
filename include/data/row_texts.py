"""What the rows of an Arrow table say: words per row without system turns, and benchmark prompts in any turn."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import orjson

from include.data.decontamination import Benchmark
from include.data.words import hash_words


class RowTexts:
    """The texts of rows, and their words: turns, tool calls, and the rejected answer of a preference row.

    Args:
        table: rows with the columns of `parse_rows`.
    """

    def __init__(self, table: Any):
        self._table, self._contents = table, _texts_of(table)
        self._offsets = self._contents.offsets.to_numpy()
        self._hashes, self._counts = hash_words(self._contents.values)
        opens = np.array([roles.startswith("system") for roles in table["roles"].to_pylist()], bool)
        self._by_system = np.zeros(len(self._counts), bool)
        self._by_system[self._offsets[:-1][opens]] = True

    def words_of_rows(self) -> tuple[Any, Any]:
        """Return the hashed words of all rows and their number per row, without system turns, which make rows alike."""
        hashes = self._hashes[~np.repeat(self._by_system, self._counts)]
        sums = np.concatenate([[0], np.where(self._by_system, 0, self._counts).cumsum()])
        first, last = sums[self._offsets[0]], sums[self._offsets[-1]]
        return hashes[first:last], np.diff(sums[self._offsets])

    def digests_of_rows(self) -> Any:
        """Return a digest of each row's texts without system turns (uint64)."""
        texts, found = self._contents.values.to_pylist(), []
        for begin, end in zip(self._offsets[:-1], self._offsets[1:], strict=True):
            said = [texts[i] for i in range(begin, end) if not self._by_system[i]]
            found.append(int.from_bytes(hashlib.sha256(orjson.dumps(said)).digest()[:8]))
        return np.array(found, np.uint64)

    def prompts(self, benchmark: Benchmark | None) -> Any:
        """Return for each row the index of a benchmark's prompt that one of its turns contains, or -1 (int32)."""
        found = np.full(len(self._table), -1, np.int32)
        if benchmark:
            of_turns = benchmark.find(self._hashes, self._counts)
            turns = np.flatnonzero(of_turns >= 0)
            found[np.searchsorted(self._offsets, turns, "right") - 1] = of_turns[turns]
        return found


def _texts_of(table: Any) -> Any:
    """Return the texts of each row (Arrow lists): its turns, and behind them its tool calls and rejected answer."""
    import pyarrow as pa

    contents, *others = (table[name].combine_chunks() for name in ("contents", "calls", "rejected"))
    if all(column.null_count == len(column) for column in others):
        return contents
    rows = zip(contents.to_pylist(), *(column.to_pylist() for column in others), strict=True)
    return pa.array([[*turns, *filter(None, further)] for turns, *further in rows], contents.type)
