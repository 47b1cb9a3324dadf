"""Near-duplicate rows and benchmark contamination, by word sequences.

A text is split at every character that is neither a letter nor a digit, and case is ignored. Each sequence of three
words is a shingle. rensa computes MinHash signatures of the shingles. Rows whose signatures agree in a whole band are
compared (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). A word is identified by its first eight bytes
and its length, so that all words of a batch are hashed at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHINGLE = 3  # words
LONG_SHINGLE = 8  # words: a training row must not share a sequence of this length with a benchmark prompt
SLOTS, BAND = 64, 4  # 16 bands of 4: pairs of similarity 0.85 share a band with probability 0.99999, of 0.5 with 0.64
SEED = 3407
IDEOGRAPH = 0xE0  # from this first byte on, UTF-8 encodes scripts (among others) that put no spaces between words

_IN_WORD = bytes(b >= 128 or chr(b).isalnum() for b in range(256))
_IDEOGRAPH = bytes(b >= IDEOGRAPH for b in range(256))
_POSITION_FACTORS = np.random.default_rng(SEED).integers(1, 2**63, LONG_SHINGLE, np.uint64) | np.uint64(1)
_LOWER_CASE = np.uint64(0x2020202020202020)  # the bit that makes ASCII letters lower-case
_FIRST_BYTES = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)  # masks of the first n bytes


def hash_words(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Hash every word of a batch of texts.

    Args:
        texts: an Arrow array of large strings.

    Returns:
        One hash per word of all texts, in order (uint64), and the number of words of each text (int64).
    """
    starts = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    raw = (texts.buffers()[2] or b"")[starts[0] : starts[-1]]
    raw = (raw if isinstance(raw, bytes) else raw.to_pybytes()) + bytes(8)
    starts = starts - starts[0]
    inside = np.frombuffer(raw.translate(_IN_WORD), bool)
    boundary = np.empty(len(raw), bool)  # the first byte of each word, and of each stretch between two words
    boundary[0] = True
    np.not_equal(inside[1:], inside[:-1], out=boundary[1:])
    boundary[starts] = True
    if not raw.isascii():
        boundary |= np.frombuffer(raw.translate(_IDEOGRAPH), bool)
    positions = np.flatnonzero(boundary)
    first = np.flatnonzero(inside[positions])
    begins = positions[first]
    lengths = positions[first + 1] - begins  # the eight bytes of padding are in no word
    first_eight = np.lib.stride_tricks.as_strided(np.frombuffer(raw, np.uint64, 1), (len(raw) - 7,), (1,))
    hashes = (first_eight[begins] | _LOWER_CASE) & _FIRST_BYTES[np.minimum(lengths, 8)]
    hashes += lengths.astype(np.uint64) << np.uint64(56)
    hashes *= _POSITION_FACTORS[0]
    return hashes ^ (hashes >> np.uint64(32)), np.diff(np.searchsorted(begins, starts))


def hash_shingles(hashes: np.ndarray, counts: np.ndarray, length: int = SHINGLE) -> tuple[np.ndarray, np.ndarray]:
    """Hash every sequence of `length` words within a text.

    Args:
        hashes, counts: words, see `hash_words`.
        length: words per shingle. A text with fewer words, but at least one, has one shingle.

    Returns:
        One hash per shingle (uint64), and the number of shingles of each text (int64).
    """
    sums = hashes * _POSITION_FACTORS[0]
    for position in range(1, length):
        sums[:-position] += hashes[position:] * _POSITION_FACTORS[position]
    ends = counts.cumsum()
    position_in_text = np.arange(len(hashes)) - np.repeat(ends - counts, counts)
    kept = position_in_text < np.maximum(np.repeat(counts, counts) - length + 1, 1)
    mixed = sums[kept]
    mixed ^= mixed >> np.uint64(29)
    return mixed, np.where(counts > 0, np.maximum(counts - length + 1, 1), 0)


def minhash_signatures(hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute the MinHash signature of each text.

    Args:
        hashes, counts: words, see `hash_words`.

    Returns:
        Signatures, texts x SLOTS (uint32). The signature of a text without words is all zeros.
    """
    from rensa import RMinHash

    if not len(counts):
        return np.zeros((0, SLOTS), np.uint32)
    hashes, counts = hash_shingles(hashes, counts)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SLOTS, SEED)
    signatures = np.array(matrix.to_rows(), np.uint32)
    signatures[counts == 0] = 0
    return signatures


def near_duplicates(signatures: np.ndarray, holdout: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Find near-duplicates by locality-sensitive hashing.

    The similarity of two rows is the share of equal slots in their signatures. In each bucket (rows with one equal
    band) a row is compared with the first row and with the previous row of its side, and each training row with every
    held-out row.

    Args:
        signatures: MinHash signatures, rows x SLOTS.
        holdout: which rows are held out (bool).
        similarity: two rows are near-duplicates from this similarity on.

    Returns:
        For each row the index of an earlier near-duplicate on the same side, and for each training row the index of a
        held-out near-duplicate; -1 if there is none (int64).
    """
    earlier, held_out = np.full(len(signatures), -1), np.full(len(signatures), -1)
    non_empty = np.flatnonzero(signatures.any(axis=1))
    for band in range(0, SLOTS, BAND):
        keys = np.ascontiguousarray(signatures[non_empty, band : band + BAND]).view(np.uint64)
        keys = keys @ _POSITION_FACTORS[: BAND // 2]
        order = np.lexsort((non_empty, ~holdout[non_empty], keys))  # buckets; in each, held-out rows first
        rows, keys = non_empty[order], keys[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, int)
        sizes = np.diff(np.append(begins, len(keys)))
        for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True):
            bucket = rows[begin : begin + size]
            split = int(holdout[bucket].sum())
            for side in (bucket[:split], bucket[split:]):
                _link(signatures, side[:1], side[1:], similarity, earlier)
                _link(signatures, side[:-1], side[1:], similarity, earlier)
            for row in bucket[:split]:
                _link(signatures, np.array([row]), bucket[split:], similarity, held_out)
    return earlier, held_out


def _link(
    signatures: np.ndarray, sources: np.ndarray, targets: np.ndarray, similarity: float, found: np.ndarray
) -> None:
    """Set `found[target] = source` for each similar pair, unless it is set already. One source pairs with all."""
    if len(sources) and len(targets):
        near = (signatures[sources] == signatures[targets]).mean(axis=1) >= similarity
        new = near & (found[targets] < 0)
        found[targets[new]] = np.broadcast_to(sources, targets.shape)[new]


class Benchmark:
    """Prompts of a benchmark that must not occur in training rows.

    Args:
        prompts: an Arrow array of large strings.
    """

    def __init__(self, prompts: Any):
        hashes, counts = hash_words(prompts)
        self._by_length: dict[int, Any] = {}
        lengths = np.minimum(counts, LONG_SHINGLE)
        for length in np.unique(lengths[lengths > 0]):
            chosen = lengths == length
            kept = hashes[np.repeat(chosen, counts)]
            self._by_length[int(length)] = np.unique(hash_shingles(kept, counts[chosen], int(length))[0])

    def contaminates(self, hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Find texts that contain a prompt, or LONG_SHINGLE consecutive words of one.

        Args:
            hashes, counts: words, see `hash_words`.

        Returns:
            One bool per text.
        """
        contaminated = np.zeros(len(counts), bool)
        for length, prompts in self._by_length.items():
            long_enough = counts >= length  # a text shorter than the prompt cannot contain it
            kept, kept_counts = hash_shingles(hashes[np.repeat(long_enough, counts)], counts[long_enough], length)
            hits = np.repeat(np.flatnonzero(long_enough), kept_counts)[np.isin(kept, prompts)]
            contaminated[hits] = True
        return contaminated
