"""Which rows are held out: drawn by the content of rows, whole groups of near-duplicates at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def draws(digests: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return two independent numbers per digest of 16 bytes (uint64): what decides a side, and the rank in a group."""
    numbers = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    return numbers[:, 0], numbers[:, 1]


@dataclass(frozen=True)
class Draw:
    """A draw of the holdout.

    The row with the lowest rank of its group decides for the whole group: it is held out if its draw, as a fraction of
    2**64, is below the share. A row without near-duplicates depends on nothing but its own content; a group changes
    its side only if another row becomes the one that decides. A group with more rows than the share of all rows is
    used for training, so that one large group cannot take the place of the holdout.

    Attributes:
        draw: what decides each row's side (uint64).
        size: rows of each row's group (int64).
    """

    draw: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, draw: np.ndarray, rank: np.ndarray, group: np.ndarray) -> Draw:
        """Return the draw of grouped rows.

        Args:
            draw, rank: see `draws`.
            group: for each row the index of its group's first row.
        """
        order = np.lexsort((rank, group))
        first = np.ones(len(group), bool)
        first[1:] = group[order][1:] != group[order][:-1]
        deciding = np.zeros(len(group), np.int64)
        deciding[group[order][first]] = order[first]
        return cls(draw[deciding[group]], np.bincount(group, minlength=len(group))[group])

    def held_out(self, share: float) -> np.ndarray:
        """Return which rows are held out (bool)."""
        limit = np.uint64(min(math.ceil(share * 2**64), 2**64 - 1))
        return (self.draw < limit) & (self.size <= max(1.0, share * len(self.draw)))

    def least_share(self, rows: int, used: np.ndarray) -> float | None:
        """Return the lowest share, in hundredths, at which so many used rows are held out and others are not.

        Args:
            rows: rows to hold out.
            used: which rows are used (bool).
        """
        for hundredths in range(1, 100):
            held = self.held_out(hundredths / 100)[used]
            if held.sum() >= rows and not held.all():
                return hundredths / 100
        return None
