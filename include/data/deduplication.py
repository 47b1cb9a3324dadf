"""Rows that say nearly the same: MinHash signatures of their word sequences, compared where they meet in a bucket.

A row's text is cut at everything that is neither a letter nor a digit, case is ignored, and each sequence of three
words is a shingle. rensa makes the signatures; rows that agree in a whole band of a signature are compared (Leskovec,
Rajaraman, Ullman: Mining of Massive Datasets, 3.4). A word counts by its first eight bytes and its length, which a
whole batch of texts gives at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHINGLE = 3  # words
LONG_SHINGLE = 8  # words of a benchmark prompt that a row must not hold in a row
SLOTS, BAND = 64, 4  # 16 bands of 4: a pair of similarity 0.85 meets with probability 0.99999, one of 0.5 with 0.64
SEED = 3407
IDEOGRAPH = 0xE0  # first bytes from here on begin a character of Asian scripts, which put no spaces between words

_IN_WORD = bytes(b >= 128 or chr(b).isalnum() for b in range(256))
_IDEOGRAPH = bytes(b >= IDEOGRAPH for b in range(256))
_PLACE = np.random.default_rng(SEED).integers(1, 2**63, LONG_SHINGLE, np.uint64) | np.uint64(1)
_LOWER = np.uint64(0x2020202020202020)  # the bit that makes ASCII letters small
_FIRST = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)  # masks of the first so many bytes


def words(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """A number (uint64) for each word of an Arrow array of texts, and how many words each text has (int64)."""
    starts = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    raw = (texts.buffers()[2] or b"")[starts[0] : starts[-1]]
    raw = (raw if isinstance(raw, bytes) else raw.to_pybytes()) + bytes(8)
    starts = starts - starts[0]
    inside = np.frombuffer(raw.translate(_IN_WORD), bool)
    edges = np.empty(len(raw), bool)  # where a word begins, or what is between two
    edges[0] = True
    np.not_equal(inside[1:], inside[:-1], out=edges[1:])
    edges[starts] = True
    if not raw.isascii():
        edges |= np.frombuffer(raw.translate(_IDEOGRAPH), bool)
    places = np.flatnonzero(edges)
    first = np.flatnonzero(inside[places])
    begins = places[first]
    lengths = places[first + 1] - begins  # the eight bytes at the end are in no word
    eights = np.lib.stride_tricks.as_strided(np.frombuffer(raw, np.uint64, 1), (len(raw) - 7,), (1,))
    numbers = (eights[begins] | _LOWER) & _FIRST[np.minimum(lengths, 8)]
    numbers += lengths.astype(np.uint64) << np.uint64(56)
    numbers *= _PLACE[0]
    return numbers ^ (numbers >> np.uint64(32)), np.diff(np.searchsorted(begins, starts))


def shingles(numbers: np.ndarray, counts: np.ndarray, length: int = SHINGLE) -> tuple[np.ndarray, np.ndarray]:
    """A number for each sequence of words within a text, and how many each text has; a shorter text has one."""
    sums = numbers * _PLACE[0]
    for place in range(1, length):
        sums[:-place] += numbers[place:] * _PLACE[place]
    ends = counts.cumsum()
    place = np.arange(len(numbers)) - np.repeat(ends - counts, counts)
    kept = place < np.maximum(np.repeat(counts, counts) - length + 1, 1)
    mixed = sums[kept]
    mixed ^= mixed >> np.uint64(29)
    return mixed, np.where(counts > 0, np.maximum(counts - length + 1, 1), 0)


def signatures(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The MinHash signature of each text of `words` (uint32, texts x SLOTS); all zero for a text without words."""
    from rensa import RMinHash

    if not len(counts):
        return np.zeros((0, SLOTS), np.uint32)
    numbers, counts = shingles(numbers, counts)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(numbers, offsets, SLOTS, SEED)
    found = np.array(matrix.to_rows(), np.uint32)
    found[counts == 0] = 0
    return found


def near_duplicates(marks: np.ndarray, holdout: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Compare rows by their signatures.

    Args:
        marks: signatures, rows x SLOTS.
        holdout: which rows are held out (bool).
        similarity: least share of equal slots.

    Returns:
        For each row the place of an earlier row of its own side that it nearly equals, and for each row that may
        train the place of a held-out row that it nearly equals; -1 where there is none (int64).
    """
    earlier, held_out = np.full(len(marks), -1), np.full(len(marks), -1)
    some = np.flatnonzero(marks.any(axis=1))
    for band in range(0, SLOTS, BAND):
        keys = np.ascontiguousarray(marks[some, band : band + BAND]).view(np.uint64) @ _PLACE[: BAND // 2]
        order = np.lexsort((some, ~holdout[some], keys))  # buckets; in each the held-out rows first, then by place
        rows, keys = some[order], keys[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, int)
        sizes = np.diff(np.append(begins, len(keys)))
        for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True):
            bucket = rows[begin : begin + size]
            out = int(holdout[bucket].sum())
            for side in (bucket[:out], bucket[out:]):
                _link(marks, side[:1], side[1:], similarity, earlier)
                _link(marks, side[:-1], side[1:], similarity, earlier)
            for row in bucket[:out]:
                _link(marks, np.array([row]), bucket[out:], similarity, held_out)
    return earlier, held_out


def _link(marks: np.ndarray, some: np.ndarray, others: np.ndarray, similarity: float, found: np.ndarray) -> None:
    """Note for each of the others the row beside it (or the only one), where the two are similar enough."""
    if len(some) and len(others):
        near = (marks[some] == marks[others]).mean(axis=1) >= similarity
        new = near & (found[others] < 0)
        found[others[new]] = np.broadcast_to(some, others.shape)[new]


class Benchmark:
    """Prompts of a benchmark that must not be in the training rows.

    Args:
        prompts: an Arrow array of texts.
    """

    def __init__(self, prompts: Any):
        numbers, counts = words(prompts)
        self._by_length: dict[int, Any] = {}
        lengths = np.minimum(counts, LONG_SHINGLE)
        for length in np.unique(lengths[lengths > 0]):
            chosen = lengths == length
            kept = numbers[np.repeat(chosen, counts)]
            self._by_length[int(length)] = np.unique(shingles(kept, counts[chosen], int(length))[0])

    def within(self, numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Which texts of `words` hold one of the prompts, or LONG_SHINGLE words in a row of one (bool)."""
        found = np.zeros(len(counts), bool)
        for length, known in self._by_length.items():
            enough = counts >= length  # a text shorter than the prompt does not hold it
            own, own_counts = shingles(numbers[np.repeat(enough, counts)], counts[enough], length)
            hit = np.repeat(np.flatnonzero(enough), own_counts)[np.isin(own, known)]
            found[hit] = True
        return found
