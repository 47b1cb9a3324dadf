"""Near-duplicates among rows, and benchmark prompts in them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from include.data.deduplication import BAND, SLOTS, Benchmark, hash_words, minhash_signatures, near_duplicates

STORY = "The ship sailed at noon with a cargo of salt, and nobody on the quay saw the captain that day"


def texts(*rows: str) -> pa.Array:
    return pa.array(rows, pa.large_string())


def bucket_of_three() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signatures a, b and c that meet in the same buckets only: c is similar to b (55 of 64 slots), a to neither."""
    a = np.arange(1, SLOTS + 1, dtype=np.uint32)
    b = a + 1000 * (np.arange(SLOTS) >= 7 * BAND).astype(np.uint32)  # 28 equal slots: seven whole bands
    c = b + 1000 * ((np.arange(SLOTS) >= 7 * BAND) & (np.arange(SLOTS) % BAND == 0)).astype(np.uint32)
    return a, b, c


@pytest.mark.parametrize("holdout", [False, True])
def test_a_row_is_compared_with_the_previous_row_of_its_bucket_and_with_the_first(holdout: bool) -> None:
    a, b, c = bucket_of_three()
    sides = np.full(3, holdout)
    earlier, held_out = near_duplicates(np.stack([a, b, c]), sides, 0.85)
    assert earlier.tolist() == [-1, -1, 1], "the third row is similar to the second one only"
    earlier, _ = near_duplicates(np.stack([b, a, c]), sides, 0.85)
    assert earlier.tolist() == [-1, -1, 0], "the third row is similar to the first one only"
    assert held_out.tolist() == [-1, -1, -1]


def test_a_training_row_is_compared_with_every_held_out_row_of_its_bucket() -> None:
    a, b, c = bucket_of_three()
    for order in ([a, b, c], [b, a, c]):
        earlier, held_out = near_duplicates(np.stack(order), np.array([True, True, False]), 0.85)
        assert earlier.tolist() == [-1, -1, -1], "no two rows on one side are similar"
        assert order[held_out[2]] is b
        assert held_out[:2].tolist() == [-1, -1]
    _, held_out = near_duplicates(np.stack([c, a, b]), np.array([False, True, True]), 0.85)
    assert held_out.tolist() == [2, -1, -1], "the order of the rows does not matter"


def test_similarity_is_the_share_of_equal_slots() -> None:
    a, b, c = bucket_of_three()
    for similarity, found in ((55 / 64, 1), (56 / 64, -1)):
        earlier, _ = near_duplicates(np.stack([a, b, c]), np.zeros(3, bool), similarity)
        assert earlier[2] == found


def test_signatures_ignore_case_and_punctuation_and_tell_texts_apart() -> None:
    rows = texts(STORY, STORY.upper().replace(",", " -- "), STORY.replace("noon", "dawn"), "Something else", "?!")
    signatures = minhash_signatures(*hash_words(rows))
    assert signatures.shape == (5, SLOTS)
    share = (signatures == signatures[0]).mean(axis=1)
    assert share[1] == 1
    assert 0.5 < share[2] < 1
    assert share[3] < 0.1
    assert not signatures[4].any(), "a text without words has no signature"
    earlier, _ = near_duplicates(signatures, np.zeros(5, bool), 0.9)
    assert earlier.tolist() == [-1, 0, -1, -1, -1]


@pytest.mark.parametrize(
    ("row", "contaminated"),
    [
        ("Name the capital of France, please.", True),  # a short prompt as a whole
        ("The capital of France", False),
        ("It SAILED at noon with a cargo of wheat", False),  # seven words of the long prompt
        ("It SAILED at noon with a cargo of salt", True),  # eight words of it
        ("France of capital the name", False),
        ("", False),
    ],
)
def test_a_row_with_a_prompt_or_eight_words_of_one_is_contaminated(row: str, contaminated: bool) -> None:
    benchmark = Benchmark(texts("Name the capital of France", STORY, ""))
    assert benchmark.contaminates(*hash_words(texts("Hello.", row, "Bye."))).tolist() == [False, contaminated, False]
