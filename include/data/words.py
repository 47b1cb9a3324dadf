"""Words of texts in every script, as hashes, and sequences of words (shingles).

Words are those of Unicode's word boundaries (UAX 29, default rules); a segment without a letter, a digit or an emoji is
no word. In scripts without spaces between words (Han, Hiragana, Thai, Lao, Khmer, Myanmar) each character is a word.
Case and composed or decomposed forms (NFC) make no difference. The library `regex` has the character properties; the
rules are applied to all characters of a batch at once, some 20 times faster than `regex` finds single words.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

SHINGLE = 3  # words
SEED = 3407
CACHED = 2**17  # bytes of text at a time: the arrays stay in the processor's cache

# classes of characters, from the property Word_Break
_BREAK, _LETTER, _HEBREW, _NUMBER, _KATAKANA, _JOINER, _ALONE = range(7)  # _ALONE: a word of one character
_MID_LETTER, _MID_NUMBER, _MID_BOTH, _MID_HEBREW, _SKIPPED = range(7, 12)
_PROPERTIES = {
    "ALetter": _LETTER, "Hebrew_Letter": _HEBREW, "Numeric": _NUMBER, "Katakana": _KATAKANA, "ExtendNumLet": _JOINER,
    "MidLetter": _MID_LETTER, "MidNum": _MID_NUMBER, "MidNumLet": _MID_BOTH, "Single_Quote": _MID_BOTH,
    "Double_Quote": _MID_HEBREW, "Extend": _SKIPPED, "Format": _SKIPPED, "ZWJ": _SKIPPED,
}  # fmt: skip
_PLANES = 0x20000  # above: ideographs, which are words of one character, and from 0xE0000 on tags, which are skipped
_LETTERS = (_LETTER, _HEBREW)
_IN_WORD = np.isin(np.arange(16), (*_LETTERS, _NUMBER, _KATAKANA, _JOINER, _ALONE))


def _pairs() -> bytes:
    """Return for each pair of classes (16 * first + second) whether there is no boundary between the two."""
    joined = np.zeros((16, 16), bool)
    for one in (*_LETTERS, _NUMBER):
        joined[one, [*_LETTERS, _NUMBER, _JOINER]] = joined[_JOINER, one] = True  # WB5, WB8 to WB10, WB13a, WB13b
    joined[_KATAKANA, [_KATAKANA, _JOINER]] = joined[_JOINER, [_KATAKANA, _JOINER]] = True  # WB13 to WB13b
    return joined.tobytes()


def _triples() -> np.ndarray:
    """Return for three classes whether the middle one, a punctuation mark, joins the other two (WB6, 7, 7b to 12)."""
    joins = np.zeros((16, 16, 16), bool)
    for mark in (_MID_LETTER, _MID_BOTH):
        joins[np.ix_(_LETTERS, [mark], _LETTERS)] = True
    joins[_NUMBER, [_MID_NUMBER, _MID_BOTH], _NUMBER] = True
    joins[_HEBREW, _MID_HEBREW, _HEBREW] = True
    return joins


_JOINED, _JOINS = _pairs(), _triples()
_IS_INSIDE = np.pad(_IN_WORD, (0, 240)).tobytes()
_IS_MARK = np.isin(np.arange(256), (_MID_LETTER, _MID_NUMBER, _MID_BOTH, _MID_HEBREW)).tobytes()
_FACTORS = np.random.default_rng(SEED).integers(1, 2**63, 16, np.uint64) | np.uint64(1)
_FIRST_BYTES = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)  # masks of the first n bytes


@functools.cache
def _class_of() -> np.ndarray:
    """Return the class of each character below `_PLANES` (uint8)."""
    import regex

    surrogates = "\0" * 0x800  # not characters
    characters = "".join(map(chr, range(0xD800))) + surrogates + "".join(map(chr, range(0xE000, _PLANES)))
    classes = np.zeros(_PLANES, np.uint8)

    def assign(pattern: str, of: int) -> None:
        for run in regex.finditer(pattern, characters):
            classes[run.start() : run.end()] = of

    assign(r"[\p{Alphabetic}\p{N}\p{Extended_Pictographic}]+", _ALONE)
    for name, of in _PROPERTIES.items():
        assign(rf"\p{{Word_Break={name}}}+", of)
    return classes


@functools.cache
def _ascii_classes() -> bytes:
    return _class_of()[:128].tobytes() + bytes(128)


def hash_words(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Hash every word of a batch of texts.

    Args:
        texts: an Arrow array of large strings.

    Returns:
        One hash per word of all texts, in order (uint64), and the number of words of each text (int64).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(texts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    plain = pc.string_is_ascii(texts).to_numpy(zero_copy_only=False)
    if plain.all():
        return _hash(texts, ascii_only=True)
    if not plain.any():
        return _hash(texts, ascii_only=False)
    mask = pa.array(plain)
    parts = [(plain, *_hash(texts.filter(mask), True)), (~plain, *_hash(texts.filter(pc.invert(mask)), False))]
    counts = np.zeros(len(texts), np.int64)
    for chosen, _, part_counts in parts:
        counts[chosen] = part_counts
    hashes = np.empty(counts.sum(), np.uint64)
    for chosen, part_hashes, _ in parts:
        hashes[np.repeat(chosen, counts)] = part_hashes
    return hashes, counts


def _hash(texts: Any, ascii_only: bool) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.compute as pc

    if not ascii_only:
        texts = pc.utf8_normalize(pc.utf8_lower(texts), "NFC")
    starts = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    cuts = np.unique([0, *np.searchsorted(starts[:-1], np.arange(starts[0], starts[-1], CACHED))])
    parts = [
        _hash_part(texts, starts[begin : end + 1], ascii_only)
        for begin, end in itertools.pairwise([*cuts.tolist(), len(texts)])
        if begin < end
    ]
    return np.concatenate([hashes for hashes, _ in parts]), np.concatenate([counts for _, counts in parts])


def _hash_part(texts: Any, starts: np.ndarray, ascii_only: bool) -> tuple[np.ndarray, np.ndarray]:
    raw = (texts.buffers()[2] or b"")[starts[0] : starts[-1]]
    raw = raw if isinstance(raw, bytes) else raw.to_pybytes()
    starts = starts - starts[0]
    if ascii_only:
        raw = raw.lower()
        begins, ends = _words(np.frombuffer(raw.translate(_ascii_classes()), np.uint8), starts[:-1])
    else:
        characters = np.frombuffer(raw.decode().encode("utf-32-le"), np.uint32)
        classes = _class_of()[np.minimum(characters, _PLANES - 1)]
        high = characters >= _PLANES
        if high.any():
            classes[high] = np.where(characters[high] >= 0xE0000, _SKIPPED, _ALONE)
        positions = np.flatnonzero((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80)  # the first byte of each character
        kept = np.flatnonzero(classes != _SKIPPED)  # WB4
        positions, classes = np.append(positions[kept], len(raw)), classes[kept]
        begins, ends = (positions[found] for found in _words(classes, np.searchsorted(positions, starts[:-1])))
    first = np.searchsorted(begins, starts)
    last = first[1:][np.diff(first) > 0] - 1  # of each text; it ends with its text, whatever is skipped after it
    ends[last] = np.minimum(ends[last], starts[1:][np.diff(first) > 0])
    return _hash_spans(raw, begins, ends - begins), np.diff(first)


def _words(classes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return begin and end of each word.

    Args:
        classes: the class of each character.
        starts: where a text begins.
    """
    inside = _look_up(_IS_INSIDE, classes)
    boundary = np.ones(len(classes) + 1, bool)  # before each character, and at the end
    boundary[1:-1] = ~_look_up(_JOINED, (classes[:-1] << 4) | classes[1:])
    boundary[starts] = True
    marks = np.flatnonzero(_look_up(_IS_MARK, classes)[1:-1] & inside[:-2] & inside[2:]) + 1
    marks = marks[_JOINS[classes[marks - 1], classes[marks], classes[marks + 1]]]
    if len(marks):
        opens = np.zeros(len(classes) + 1, bool)
        opens[starts] = True
        marks = marks[~opens[marks] & ~opens[marks + 1]]
        boundary[marks] = boundary[marks + 1] = False
    begins, ends = np.flatnonzero(boundary[:-1] & inside), np.flatnonzero(boundary[1:] & inside) + 1
    joiners = np.flatnonzero(classes[begins] == _JOINER)
    alone = [i for i in joiners.tolist() if (classes[begins[i] : ends[i]] == _JOINER).all()]  # as "____": no word
    if alone:
        begins, ends = np.delete(begins, alone), np.delete(ends, alone)
    return begins, ends


def _look_up(table: bytes, codes: np.ndarray) -> np.ndarray:
    """Return `table[code]` for each code (bool). `bytes.translate` is several times faster than an index of numpy."""
    return np.frombuffer(codes.tobytes().translate(table), bool)


def _hash_spans(raw: bytes, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hash spans of bytes, eight bytes at a time (uint64)."""
    padded = raw + bytes(8)
    eight = np.lib.stride_tricks.as_strided(np.frombuffer(padded, np.uint64, 1), (len(padded) - 7,), (1,))
    hashes = (eight[begins] & _FIRST_BYTES[np.minimum(lengths, 8)]) + lengths.astype(np.uint64) * _FACTORS[1]
    hashes *= _FACTORS[0]
    hashes ^= hashes >> np.uint64(32)
    longer, offset = np.flatnonzero(lengths > 8), 8
    while len(longer):
        left = np.minimum(lengths[longer] - offset, 8)
        more = hashes[longer] ^ (eight[begins[longer] + offset] & _FIRST_BYTES[left])
        more *= _FACTORS[0]
        hashes[longer] = more ^ (more >> np.uint64(32))
        offset += 8
        longer = longer[lengths[longer] > offset]
    return hashes


def hash_shingles(hashes: np.ndarray, counts: np.ndarray, length: int = SHINGLE) -> tuple[np.ndarray, np.ndarray]:
    """Hash every sequence of `length` words within a text.

    Args:
        hashes, counts: words, see `hash_words`.
        length: words per shingle. A text with fewer words, but at least one, has one shingle.

    Returns:
        One hash per shingle (uint64), and the number of shingles of each text (int64).
    """
    factors = np.random.default_rng(length).integers(1, 2**63, length, np.uint64) | np.uint64(1)
    sums = hashes * factors[0]
    for position in range(1, length):
        sums[:-position] += hashes[position:] * factors[position]
    ends = counts.cumsum()
    begins = ends - counts
    for text in np.flatnonzero((counts > 0) & (counts < length)):  # its sum must not run into the next text
        words = slice(begins[text], ends[text])
        sums[begins[text]] = (hashes[words] * factors[: counts[text]]).sum(dtype=np.uint64)
    number = np.where(counts > 0, np.maximum(counts - length + 1, 1), 0)
    kept = np.arange(len(hashes)) - np.repeat(begins, counts) < np.repeat(number, counts)
    mixed = sums[kept]
    mixed ^= mixed >> np.uint64(29)
    return mixed, number
