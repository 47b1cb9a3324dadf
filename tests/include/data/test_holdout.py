"""The draw of the holdout: by content, in whole groups, as stable as it can be."""

from __future__ import annotations

import hashlib

import numpy as np

from include.data.holdout import Draw, draws

DIGESTS = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(20_000)]


def held(group: np.ndarray, share: float, rows: slice = slice(None)) -> np.ndarray:
    draw, rank = draws(DIGESTS)
    return Draw.of(draw[rows], rank[rows], group).held_out(share)


def test_a_row_alone_is_drawn_by_its_own_digest() -> None:
    for share in (0.0, 0.05, 0.5):
        wanted = [int.from_bytes(digest[:8]) < share * 2**64 for digest in DIGESTS]
        assert held(np.arange(20_000), share).tolist() == wanted


def test_a_group_is_on_one_side_as_often_as_a_row() -> None:
    group = np.arange(20_000) // 4 * 4
    sides = held(group, 0.2)
    assert (sides.reshape(-1, 4) == sides[::4, None]).all()
    assert abs(sides.mean() - 0.2) < 0.02, "not more often because it has more rows"
    assert np.mean(sides != held(np.arange(20_000), 0.2)) > 0.001, "groups do move rows"


def test_a_side_changes_only_with_the_row_that_decides() -> None:
    group = np.arange(20_000) // 4 * 4
    draw, rank = draws(DIGESTS)
    before = Draw.of(draw, rank, group).held_out(0.2)
    deciding = np.array([begin + rank[begin : begin + 4].argmin() for begin in range(0, 20_000, 4)])
    others = np.setdiff1d(np.arange(20_000), deciding)
    gone = np.isin(np.arange(20_000), others[::7])  # rows that do not decide
    left = np.flatnonzero(~gone)
    first = {g: i for i, g in reversed(list(enumerate(group[left].tolist())))}
    after = Draw.of(draw[left], rank[left], np.array([first[g] for g in group[left].tolist()])).held_out(0.2)
    assert (after == before[left]).all()


def test_a_group_larger_than_the_holdout_trains() -> None:
    group = np.arange(1000)
    group[:150] = 0
    group[150:240] = 150
    for begin in range(40):  # whatever the draw
        rows = slice(begin, begin + 1000)
        assert not held(group, 0.1, rows)[:150].any()
    assert any(held(group, 0.1, slice(begin, begin + 1000))[150:240].all() for begin in range(100))


def test_the_least_share_holds_out_enough_rows() -> None:
    draw, rank = draws(DIGESTS[:60])
    used = np.ones(60, bool)
    used[:10] = False
    drawn = Draw.of(draw, rank, np.arange(60))
    share = drawn.least_share(6, used)
    assert share is not None
    assert drawn.held_out(share)[used].sum() >= 6 > drawn.held_out(share - 0.01)[used].sum()
    assert drawn.least_share(51, used) is None
    assert Draw.of(draw, rank, np.zeros(60, int)).least_share(6, used) is None, "one group cannot be split"
