"""The data profile of the report: turns, roles, lengths, scripts, and the rows with most exact copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from include.data.conversation import Conversation

TOP = 10  # duplicated rows to list
# one Unicode block per script other than Latin: a cheap estimate of the languages in the data
SCRIPTS = {
    "Cyrillic": (0x400, 0x52F), "Greek": (0x370, 0x3FF), "Arabic": (0x600, 0x6FF), "Hebrew": (0x590, 0x5FF),
    "Devanagari": (0x900, 0x97F), "Thai": (0xE00, 0xE7F), "Hangul": (0xAC00, 0xD7AF), "Kana": (0x3040, 0x30FF),
    "Han": (0x4E00, 0x9FFF),
}  # fmt: skip
_SCRIPT_OF = np.full(0xD7B0 + 1, len(SCRIPTS), np.uint8)
for _number, (_low, _high) in enumerate(SCRIPTS.values()):
    _SCRIPT_OF[_low : _high + 1] = _number


@dataclass
class RowStatistics:
    """Statistics of a group of rows, one entry per row.

    Attributes:
        turns, characters: counts (int32, int64).
        roles: index into `role_orders` (int32).
        role_orders: the distinct orders of roles in the group.
        script: index into `SCRIPTS` of the main script, if more than a quarter of the characters of the non-ASCII turns
            belongs to it; -1 otherwise, which counts as Latin (int8).
    """

    turns: Any
    characters: Any
    roles: Any
    role_orders: list[tuple[str, ...]]
    script: Any

    @classmethod
    def of(cls, conversations: list[Conversation]) -> RowStatistics:
        """Compute the statistics of conversations."""
        role_orders: dict[tuple[str, ...], int] = {}
        return cls(
            np.array([len(c.roles) for c in conversations], np.int32),
            np.array([sum(map(len, c.contents)) for c in conversations], np.int64),
            np.array([role_orders.setdefault(c.roles, len(role_orders)) for c in conversations], np.int32),
            list(role_orders),
            _scripts(conversations),
        )


def _scripts(conversations: list[Conversation]) -> Any:
    non_ascii = ["".join([text for text in c.contents if not text.isascii()]) for c in conversations]
    points = np.frombuffer("".join(non_ascii).encode("utf-32-le"), np.uint32)
    lengths = np.array([len(text) for text in non_ascii])
    width = len(SCRIPTS) + 1  # the last column is for all other characters
    cells = np.repeat(np.arange(len(non_ascii)) * width, lengths) + _SCRIPT_OF[np.minimum(points, len(_SCRIPT_OF) - 1)]
    counts = np.bincount(cells, minlength=len(non_ascii) * width).reshape(len(non_ascii), width)[:, :-1]
    return np.where(counts.max(axis=1) * 4 > lengths, counts.argmax(axis=1), -1).astype(np.int8)


def histogram(values: Any, bins: int = 20) -> list[dict[str, int]]:
    """Return a histogram with bars of equal width up to the 99th percentile, and one bar for all larger values.

    Args:
        values: array of lengths.
        bins: most bars of equal width.

    Returns:
        For each bar `upto` (largest value in it) and `rows` (number of values).
    """
    if not len(values):
        return []
    top = max(int(np.percentile(values, 99, method="higher")), 1)
    width = max(-(-top // bins), 1)
    edges = np.arange(0, top + width, width)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    bars = [{"upto": int(edge), "rows": int(count)} for edge, count in zip(edges[1:], counts, strict=True)]
    longer = int((values > edges[-1]).sum())
    bars[-1]["rows"] -= longer
    return [*bars, {"upto": int(values.max()), "rows": longer}] if longer else bars


def profile(parts: list[RowStatistics], good: Any, originals: Any, opening: Callable[[int], str]) -> dict[str, Any]:
    """Return the profile of the whole dataset.

    Args:
        parts: statistics of all rows, in order.
        good: which rows may be trained on (bool); turns, roles, characters and scripts count only these.
        originals: for each row the number of the first row with the same content, or -1.
        opening: returns the first characters of a row, given its number.

    Returns:
        `turns` and `roles` (counts), `characters` (a histogram), `scripts` (rows by script), `top_duplicates`.
    """
    turns, characters, script = (
        np.concatenate([getattr(part, name) for part in parts])[good] for name in ("turns", "characters", "script")
    )
    roles: Counter[str] = Counter()
    begin = 0
    for part in parts:
        kept = good[begin : begin + len(part.turns)]
        begin += len(part.turns)
        counts = np.bincount(part.roles[kept], minlength=len(part.role_orders))
        for order, count in zip(part.role_orders, counts, strict=True):
            for role in order:
                roles[role] += int(count)
    scripts = Counter({name: int((script == i).sum()) for i, name in enumerate(["Latin", *SCRIPTS], -1)})
    copied, times = np.unique(originals[originals >= 0], return_counts=True)
    most = np.argsort(-times, kind="stable")[:TOP]
    return {
        "turns": {str(n): int(count) for n, count in enumerate(np.bincount(turns)) if count},
        "roles": dict(roles.most_common()),
        "characters": histogram(characters),
        "scripts": {name: count for name, count in scripts.most_common() if count},
        "top_duplicates": [
            {"row": int(copied[i]), "copies": int(times[i]), "begins": opening(int(copied[i]))} for i in most
        ],
    }
