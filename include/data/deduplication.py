"""Near-duplicate rows: pairs whose Jaccard similarity of shingles (see `include.data.words`) reaches a threshold.

Candidate pairs come from MinHash signatures (rensa): rows whose signatures agree in a whole band (Leskovec, Rajaraman,
Ullman: Mining of Massive Datasets, 3.4). Every candidate pair is then verified on the whole sets of shingles, so that
no pair below the threshold is linked. Of the pairs at the threshold, `RECALL` share a band; of those above it, more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from include.data.words import SEED, hash_shingles

SLOTS = 64  # per signature
RECALL = 0.998  # share of the pairs at the threshold that must share a band
MISSED = 0.001  # share of the pairs at the threshold that the signatures' estimate may rule out
SMALL, LARGE = 8, 1000  # rows: buckets whose pairs are listed at once; buckets that are searched by their rare shingles
COUNTERS = 2**22  # counters of shingles in a large bucket; shingles that share one only seem more frequent
ROUNDING = 1e-9

_FACTORS = np.random.default_rng(SEED).integers(1, 2**63, SLOTS, np.uint64) | np.uint64(1)


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


def shingle_sets(hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different shingles of each text, ascending (uint64, one text after another), and their numbers.

    Args:
        hashes, counts: words, see `hash_words`.
    """
    shingles, counts = hash_shingles(hashes, counts)
    text = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((shingles, text))
    shingles, text = shingles[order], text[order]
    new = np.ones(len(shingles), bool)
    new[1:] = (shingles[1:] != shingles[:-1]) | (text[1:] != text[:-1])
    return shingles[new], np.bincount(text[new], minlength=len(counts))


def band_width(similarity: float) -> int:
    """Return the slots per band: as many as possible if `RECALL` of the pairs at this similarity share a band."""
    widths = [w for w in range(1, SLOTS + 1) if 1 - (1 - similarity**w) ** (SLOTS // w) >= RECALL]
    return max(widths, default=1)


def least_equal_slots(similarity: float) -> int:
    """Return the lowest number of equal slots that is likely at this similarity, but for a probability of `MISSED`."""
    below, equal = 0.0, 0
    while (below := below + math.comb(SLOTS, equal) * similarity**equal * (1 - similarity) ** (SLOTS - equal)) < MISSED:
        equal += 1
    return equal


def candidate_rows(signatures: np.ndarray, similarity: float) -> np.ndarray:
    """Return which rows share a band with another row (bool): only these can have a near-duplicate."""
    found = np.zeros(len(signatures), bool)
    for _, rows, sizes in _bands(signatures, np.arange(len(signatures)), similarity):
        found[rows[np.repeat(sizes > 1, sizes)]] = True
    return found


@dataclass
class ShingleSets:
    """The sets of shingles of the candidate rows, which may be a memory-mapped file.

    Attributes:
        shingles: the sets one after another, each ascending (uint64).
        begins, sizes: begin and size of each row's set in `shingles` (int64); size 0 for other rows.
    """

    shingles: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray, counts: np.ndarray) -> ShingleSets:
        """Return the sets of all texts; for the arguments see `hash_words`."""
        shingles, sizes = shingle_sets(hashes, counts)
        return cls(shingles, sizes.cumsum() - sizes, sizes)

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the set of a row."""
        return self.shingles[self.begins[row] : self.begins[row] + self.sizes[row]]

    def similarities(self, row: int, others: np.ndarray) -> np.ndarray:
        """Return the Jaccard similarity of a row and each of the others (float64)."""
        own, found = np.asarray(self[row]), np.zeros(len(others))
        for begin in range(0, len(others), SMALL * SLOTS):  # bounded memory
            part = others[begin : begin + SMALL * SLOTS]
            sizes = self.sizes[part]
            shingles = np.concatenate([self[other] for other in part])
            places = np.minimum(np.searchsorted(own, shingles), len(own) - 1)
            common = np.add.reduceat(own[places] == shingles, sizes.cumsum() - sizes, dtype=np.int64)
            found[begin : begin + len(part)] = common / (len(own) + sizes - common)
        return found


@dataclass
class Groups:
    """Rows linked to groups of near-duplicates: connected components, by union-find.

    Attributes:
        parents: for each row a row of its group; following them ends at the group's first row.
        pairs: the verified pairs that link the groups, with their similarity; one fewer than rows in a group.
    """

    parents: np.ndarray
    pairs: list[tuple[int, int, float]] = field(default_factory=list)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the first row of each row's group. Rows with one key need no comparison."""
        found = self.parents[rows]
        while ((above := self.parents[found]) != found).any():
            found = above
        self.parents[rows] = found
        return found

    def add(self, row: int, other: int, similarity: float) -> bool:
        """Link the groups of two similar rows, unless they are one group; return whether they were two."""
        first, second = sorted(self.keys(np.array([row, other])).tolist())
        if first != second:
            self.parents[second] = first
            self.pairs.append((min(row, other), max(row, other), similarity))
        return first != second


@dataclass
class Matches:
    """For each training row the first evaluation row that is found to be similar.

    Attributes:
        states: 1 for an evaluation row, 0 for a training row, -1 for one with a match (int8).
        pairs: training row, evaluation row, similarity.
    """

    states: np.ndarray
    pairs: list[tuple[int, int, float]] = field(default_factory=list)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the state of each row. Rows with one key, and rows with -1, need no comparison."""
        return self.states[rows]

    def add(self, row: int, other: int, similarity: float) -> bool:
        """Record a match, unless the training row has one; return whether it had none."""
        train, evaluation = (row, other) if self.states[other] == 1 else (other, row)
        new = bool(self.states[train] == 0)
        if new:
            self.states[train] = -1
            self.pairs.append((train, evaluation, similarity))
        return new


def near_duplicate_groups(signatures: np.ndarray, sets: ShingleSets, rows: np.ndarray, similarity: float) -> Groups:
    """Link near-duplicates to groups. Every row is compared with all rows that share a band with it, except with rows
    of its own group.

    Args:
        signatures: MinHash signatures of all rows, rows x SLOTS.
        sets: shingles of all rows that `candidate_rows` returns.
        rows: the indices of the rows that count, ascending.
        similarity: two rows are near-duplicates from this similarity on.
    """
    groups = Groups(np.arange(len(signatures)))
    _Search(signatures, sets, similarity, groups).run(rows)
    return groups


def near_duplicates_of(
    evaluation: np.ndarray, signatures: np.ndarray, sets: ShingleSets, rows: np.ndarray, similarity: float
) -> Matches:
    """Find the training rows that are near-duplicates of evaluation rows.

    Args:
        evaluation: which rows are evaluation rows (bool).
        signatures, sets, rows, similarity: see `near_duplicate_groups`.
    """
    matches = Matches(evaluation.astype(np.int8))
    _Search(signatures, sets, similarity, matches).run(rows)
    return matches


def _bands(signatures: np.ndarray, rows: np.ndarray, similarity: float) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield for each band its first slot, the rows, one bucket (rows with an equal band) after another, and the sizes
    of the buckets.
    """
    non_empty: np.ndarray = np.any(signatures, axis=1)
    rows = rows[non_empty[rows]]
    width = band_width(similarity)
    for begin in range(0, SLOTS // width * width, width):
        keys = signatures[rows, begin : begin + width].astype(np.uint64) @ _FACTORS[:width]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, int)
        yield begin, rows[order], np.diff(np.append(begins, len(keys)))


class _Search:
    """Goes through the buckets and gives every verified pair to `found`, which says which pairs are still of use."""

    def __init__(self, signatures: np.ndarray, sets: ShingleSets, similarity: float, found: Groups | Matches):
        self._signatures, self._sets, self._similarity, self._found = signatures, sets, similarity, found
        self._least_equal, self._width = least_equal_slots(similarity), band_width(similarity)
        self._begin = 0  # the first slot of the band

    def run(self, rows: np.ndarray) -> None:
        for first_slot, ordered, sizes in _bands(self._signatures, rows, self._similarity):
            self._begin = first_slot
            begins = sizes.cumsum() - sizes
            self._small(ordered, begins, sizes)
            for begin, size in zip(begins[sizes > SMALL], sizes[sizes > SMALL], strict=True):
                self._bucket(ordered[begin : begin + size])

    def _small(self, rows: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> None:
        """Compare all pairs of the small buckets, those with the first rows first."""
        places = []
        for distance in range(1, SMALL):
            chosen = (sizes > distance) & (sizes <= SMALL)
            spans = sizes[chosen] - distance
            first = np.repeat(begins[chosen] - (spans.cumsum() - spans), spans) + np.arange(spans.sum())
            places.append(np.stack([first, first + distance]))
        one, other = rows[np.concatenate(places, axis=1)]
        open_ = self._open(one, other)
        one, other = one[open_], other[open_]
        likely = self._likely(one, other)
        one, other = one[likely], other[likely]
        order = np.lexsort((other, one))
        for a, b in zip(one[order].tolist(), other[order].tolist(), strict=True):
            if self._open(np.array([a]), np.array([b]))[0]:
                self._verify(a, np.array([b]))

    def _bucket(self, bucket: np.ndarray) -> None:
        """Compare each row of a bucket with all rows after it."""
        later: Callable[[int], np.ndarray] = lambda place: np.arange(place + 1, len(bucket))  # noqa: E731
        rare = None
        if len(bucket) > LARGE:
            rare = _RareShingles(bucket, self._sets, self._similarity)
            rare.prune(self._found.keys(bucket))
            later = rare.later
        keys, changed = self._found.keys(bucket), 0
        for place, row in enumerate(bucket[:-1].tolist()):
            if keys[place] < 0 or (keys[place] == keys).all():
                continue
            others = later(place)
            others = others[(keys[others] != keys[place]) & (keys[others] >= 0)]
            others = bucket[others]
            others = others[self._likely(np.full(len(others), row), others)]
            if len(others) and (count := self._verify(row, others)):
                keys, changed = self._found.keys(bucket), changed + count
                if rare and changed > len(bucket) // 20:
                    rare.prune(keys)
                    changed = 0

    def _open(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        first, second = self._found.keys(one), self._found.keys(other)
        return (first != second) & (first >= 0) & (second >= 0)

    def _likely(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return which pairs can be similar, by the sizes of their sets and the equal slots of their signatures, and
        have not met in an earlier band.
        """
        a, b = self._sets.sizes[one], self._sets.sizes[other]
        likely = np.minimum(a, b) >= self._similarity * np.maximum(a, b) - ROUNDING
        chosen = np.flatnonzero(likely)
        for begin in range(0, len(chosen), 100_000):  # bounded memory
            part = chosen[begin : begin + 100_000]
            equal = self._signatures[one[part]] == self._signatures[other[part]]
            met = equal[:, : self._begin].reshape(len(part), -1, self._width).all(axis=2).any(axis=1)
            likely[part] = (equal.sum(axis=1) >= self._least_equal) & ~met
        return likely

    def _verify(self, row: int, others: np.ndarray) -> int:
        """Compare a row with others exactly; return how many pairs were new to `found`."""
        similarities = self._sets.similarities(row, others)
        near = similarities >= self._similarity - ROUNDING
        pairs: Iterable[tuple[int, float]] = zip(others[near].tolist(), similarities[near].tolist(), strict=True)
        return sum(self._found.add(row, other, similarity) for other, similarity in pairs)


class _RareShingles:
    """The pairs of a large bucket that share one of their rare shingles; all others are below the threshold.

    Prefix filtering (Chaudhuri, Ganti, Kaushik: A Primitive Operator for Similarity Joins, 2006): if two
    sets have at least the part s of each in common, then in any one order of elements their first (1 - s) |x| + 1
    elements have one in common. Ordered by frequency, the shingles of a template that all rows share come last, so that
    the template makes no pairs.
    """

    def __init__(self, bucket: np.ndarray, sets: ShingleSets, similarity: float):
        counts = np.zeros(COUNTERS, np.int32)
        for row in bucket:
            np.add.at(counts, sets[row] % np.uint64(COUNTERS), 1)
        found = []
        for row in bucket:
            shingles = np.asarray(sets[row])
            frequency = counts[shingles % np.uint64(COUNTERS)]
            length = len(shingles) - math.ceil(similarity * len(shingles) - ROUNDING) + 1
            first = np.argsort(frequency, kind="stable")[:length]
            found.append(shingles[first[frequency[first] > 1]])
        places = np.repeat(np.arange(len(bucket)), [len(shingles) for shingles in found])
        shingles = np.concatenate(found)
        order = np.argsort(shingles, kind="stable")
        self._own = found
        self._shingles, self._places = shingles[order], places[order]

    def prune(self, keys: np.ndarray) -> None:
        """Forget the shingles all of whose rows have one key (see `Groups.keys`)."""
        if not len(self._shingles):
            return
        begins = np.flatnonzero(np.concatenate([[True], self._shingles[1:] != self._shingles[:-1]]))
        of_rows = keys[self._places]
        several = np.minimum.reduceat(of_rows, begins) != np.maximum.reduceat(of_rows, begins)
        kept = np.repeat(several, np.diff(np.append(begins, len(self._shingles))))
        self._shingles, self._places = self._shingles[kept], self._places[kept]

    def later(self, place: int) -> np.ndarray:
        """Return the places after this one whose rows share a rare shingle with its row, ascending."""
        own = self._own[place]
        begins, ends = (np.searchsorted(self._shingles, own, side) for side in ("left", "right"))
        chosen = np.zeros(len(self._own), bool)
        for begin, end in zip(begins, ends, strict=True):
            chosen[self._places[begin:end]] = True
        chosen[: place + 1] = False
        return np.flatnonzero(chosen)
