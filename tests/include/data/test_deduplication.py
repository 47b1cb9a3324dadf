"""Near-duplicates among rows: all pairs at the threshold, and no others."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from include.data.deduplication import (
    LARGE,
    RECALL,
    SLOTS,
    SMALL,
    Groups,
    ShingleSets,
    band_width,
    candidate_rows,
    minhash_signatures,
    near_duplicate_groups,
    near_duplicates_of,
)
from include.data.parallel import in_order
from include.data.words import hash_words
from tests.include.data.test_words import TEXTS, words

STORY = "The ship sailed at noon with a cargo of salt, and nobody on the quay saw the captain that day"


def signatures_of(hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the signatures, made in a process of their own as in the product: rensa's threads must not be forked."""
    (found,) = in_order(lambda _: minhash_signatures(hashes, counts), [0])
    return found


def found_groups(texts: list[str], similarity: float) -> Groups:
    hashes, counts = hash_words(pa.array(texts, pa.large_string()))
    signatures = signatures_of(hashes, counts)
    everything = np.arange(len(texts))
    sets = ShingleSets.of(hashes, counts)
    sets.sizes[~candidate_rows(signatures, similarity)] = 0
    return near_duplicate_groups(signatures, sets, everything, similarity)


def jaccard(one: str, other: str) -> float:
    """The similarity of two texts, computed from their words."""
    first, second = (
        {tuple(said[i : i + 3]) for i in range(max(len(said) - 2, 1))}
        for said in (words(t.lower()) for t in (one, other))
    )
    return len(first & second) / len(first | second)


def one_bucket(*shingles: range) -> tuple[np.ndarray, ShingleSets]:
    """Rows that meet in every bucket, because their signatures are equal, with these sets of shingles."""
    signatures = np.tile(np.arange(1, SLOTS + 1, dtype=np.uint32), (len(shingles), 1))
    sizes = np.array([len(one) for one in shingles])
    flat = np.concatenate([np.array(one, np.uint64) for one in shingles])
    return signatures, ShingleSets(flat, sizes.cumsum() - sizes, sizes)


@pytest.mark.parametrize("others", [0, SMALL, LARGE])
def test_a_row_is_compared_with_every_row_of_its_bucket(others: int) -> None:
    """In small buckets, in larger ones, and in those that are searched by their rare shingles."""
    a, b, c = range(100), range(1000, 1100), range(1010, 1110)  # b and c: 90 of 110
    rest = [range(10_000 + 100 * i, 10_100 + 100 * i) for i in range(others)]
    for rows, pair in (
        ([a, b, *rest, c], (1, others + 2)),
        ([b, a, *rest, c], (0, others + 2)),
        ([b, c, a, *rest], (0, 1)),
        ([*rest, a, b, c], (others + 1, others + 2)),
    ):
        for similarity, pairs in ((90 / 110, [(*pair, 90 / 110)]), (91 / 110, [])):
            signatures, sets = one_bucket(*rows)
            groups = near_duplicate_groups(signatures, sets, np.arange(len(rows)), similarity)
            assert groups.pairs == pairs
    signatures, sets = one_bucket(a, b, *rest, c)
    assert near_duplicate_groups(signatures, sets, np.arange(others + 2), 0.8).pairs == [], "c does not count"


@pytest.mark.parametrize("others", [0, SMALL, LARGE])
def test_a_training_row_is_compared_with_every_evaluation_row_of_its_bucket(others: int) -> None:
    a, b, c = range(100), range(1000, 1100), range(1010, 1110)
    rest = [range(10_000 + 100 * i, 10_100 + 100 * i) for i in range(others)]
    for rows, evaluation, match in (
        ([a, b, *rest, c], [0, 1], (others + 2, 1)),
        ([b, a, *rest, c], [0, 1], (others + 2, 0)),
        ([c, *rest, a, b], [others + 1, others + 2], (0, others + 2)),
        ([a, b, *rest, c], [0], None),  # two training rows
        ([a, b, *rest, c], [0, 1, others + 2], None),  # two evaluation rows
    ):
        held = np.isin(np.arange(len(rows)), evaluation)
        signatures, sets = one_bucket(*rows)
        matches = near_duplicates_of(held, signatures, sets, np.arange(len(rows)), 0.8)
        assert matches.pairs == ([(*match, 90 / 110)] if match else [])
        assert (matches.states == -1).nonzero()[0].tolist() == ([match[0]] if match else [])


def test_a_group_is_linked_by_way_of_other_rows() -> None:
    chain = [range(i * 5, i * 5 + 100) for i in range(12)]  # neighbours: 95 of 105
    for order in (chain, chain[::-1], random.Random(0).sample(chain, len(chain))):
        signatures, sets = one_bucket(range(5000, 5100), *order)
        groups = near_duplicate_groups(signatures, sets, np.arange(13), 0.9)
        assert groups.keys(np.arange(13)).tolist() == [0] + [1] * 12
        assert len(groups.pairs) == 11, "one fewer than rows"
        assert {similarity for *_, similarity in groups.pairs} == {95 / 105}


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.85, 0.95])
def test_pairs_at_the_threshold_are_found_and_none_below_it(similarity: float) -> None:
    assert 1 - (1 - similarity ** band_width(similarity)) ** (SLOTS // band_width(similarity)) >= RECALL
    chooser = random.Random(3)
    vocabulary = [f"word{i}" for i in range(3000)]
    texts = []
    for i in range(600):
        text = chooser.choices(vocabulary, k=120)
        kept = round(118 * 2 * similarity / (1 + similarity)) + 2 + i % 3 - 1  # common words, near the threshold
        texts += [" ".join(text), " ".join(text[:kept] + chooser.choices(vocabulary, k=120 - kept))]
    exact = {(i, i + 1): jaccard(texts[i], texts[i + 1]) for i in range(0, len(texts), 2)}
    wanted = {pair for pair, value in exact.items() if value >= similarity}
    assert 150 < len(wanted) < 550
    found = found_groups(texts, similarity).pairs
    assert {(a, b) for a, b, _ in found} <= wanted, "no pair below the threshold"
    assert len(found) >= 0.99 * len(wanted)
    assert all(value == exact[a, b] for a, b, value in found)


@pytest.mark.parametrize("script", TEXTS)
def test_near_duplicates_of_every_script(script: str) -> None:
    text = " ".join(TEXTS[script] for _ in range(2)) + " " + TEXTS["Emoji"] * (script != "Emoji")
    others = [" ".join(TEXTS[other] for other in TEXTS if other != script)]
    changed = text.replace(words(text)[-1], "🍋")
    texts = [text, *others, text.upper(), changed]
    assert {(a, b) for a, b, _ in found_groups(texts, 0.99).pairs} == {(0, 2)}
    exact = jaccard(text, changed)
    assert 0.3 < exact < 1
    if exact >= 0.5:
        assert {(a, b) for a, b, _ in found_groups(texts, max(exact - 0.01, 0.5)).pairs} == {(0, 2), (0, 3)}


def test_different_rows_of_one_manner_are_no_near_duplicates(material: Path) -> None:
    for name, highest in (("korean.jsonl", 0.8), ("english_same.jsonl", 0.8421)):
        rows: list[Any] = (material / "cases" / "40-near-duplicates-outside-latin" / name).read_text().splitlines()
        texts = [" ".join(turn["value"] for turn in json.loads(row)["conversations"]) for row in rows]
        assert len(texts) == 225
        assert found_groups(texts, 0.85).pairs == []
        similar = found_groups(texts, highest - 0.001).pairs
        assert similar and max(value for *_, value in similar) == pytest.approx(highest, abs=1e-4)


def test_a_long_template_in_many_rows_makes_no_pairs_and_hides_none() -> None:
    chooser = random.Random(1)
    vocabulary = [f"word{i}" for i in range(5000)]
    template = " ".join(chooser.choices(vocabulary, k=120))
    texts = [f"{template} {' '.join(chooser.choices(vocabulary, k=60))}" for _ in range(2 * LARGE)]
    texts[-5:] = [text + " again" for text in texts[:5]]
    found = found_groups(texts, 0.85).pairs
    assert {(a, b) for a, b, _ in found} == {(i, len(texts) - 5 + i) for i in range(5)}


def test_signatures_ignore_case_and_punctuation_and_tell_texts_apart() -> None:
    rows = [STORY, STORY.upper().replace(",", " -- "), STORY.replace("noon", "dawn"), "Something else", "?!", "?!"]
    signatures = signatures_of(*hash_words(pa.array(rows, pa.large_string())))
    assert signatures.shape == (6, SLOTS)
    share = (signatures == signatures[0]).mean(axis=1)
    assert share[1] == 1
    assert 0.5 < share[2] < 1
    assert share[3] < 0.1
    assert not signatures[4].any(), "a text without words has no signature"
    assert found_groups(rows, 0.9).pairs == [(0, 1, 1.0)], "and no near-duplicates"
