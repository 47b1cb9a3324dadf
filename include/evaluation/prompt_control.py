"""Holdout rows with other rows' questions: what tells an adapter that heeds the question from one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from include.chat.tokenized import IGNORED, write_rows

SHUFFLED_ROWS = 100  # as many give a narrow enough interval, and take a fifth of the time of 500


def write_with_shuffled_prompts(holdout: Path, out: Path, most: int, longest: int) -> tuple[int, list[int]]:
    """Write the first `most` holdout rows to `out`, and after them copies of the first of them in which all that comes
    before the first answer is another row's: of the nearest in length whose question and answer are other ones.

    Args:
        holdout: folder of Arrow streams (`row`, `input_ids`, `labels`); of pairs no copies are made.
        longest: no copy gets longer than so many tokens.

    Returns:
        How many rows there are, and for each copy the place of its row among them.
    """
    import pyarrow as pa

    tables = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in sorted(holdout.iterdir())]
    table = pa.concat_tables(tables).slice(0, most)
    rows = table.to_pylist()
    # of a pair, an answer is weighed against another answer already
    swapped = list(_swapped(rows, longest)) if "labels" in table.column_names else []
    copies = pa.Table.from_pylist([copy for _, copy in swapped], table.schema)
    out.mkdir(exist_ok=True)
    write_rows(out / "00000.arrow", [*table.to_batches(), *copies.to_batches()])
    return len(rows), [place for place, _ in swapped]


def _swapped(rows: list[dict[str, Any]], longest: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place and copy of each of the first rows for which there is another question."""
    halves = []
    for row in rows:
        begins = next((i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
        halves.append((row["input_ids"][:begins], row["input_ids"][begins:]))
    order = sorted(range(len(rows)), key=lambda place: (len(halves[place][0]), place))
    rank = {place: at for at, place in enumerate(order)}
    for place, row in enumerate(rows[:SHUFFLED_ROWS]):
        question, rest = halves[place]
        around = sorted(order, key=lambda other: abs(rank[other] - rank[place]))
        for other in around:
            theirs, their_rest = halves[other]
            if theirs != question and their_rest != rest and len(theirs) + len(rest) <= longest:
                labels = [IGNORED] * len(theirs) + row["labels"][len(question) :]
                yield place, {"row": row["row"], "input_ids": theirs + rest, "labels": labels}
                break
