"""Shuffled-prompt control: holdout rows with the prompts of other rows.

If an answer is as likely after another row's prompt as after its own prompt, the adapter ignores the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from include.chat.tokenized import IGNORED, load_table, sample, write_rows

SHUFFLED_ROWS = 100  # enough for a narrow interval, in a fifth of the time that 500 rows take


def write_with_shuffled_prompts(
    holdout: Iterable[Path], out: Path, max_rows: int, max_tokens: int
) -> tuple[int, list[int]]:
    """Write holdout rows to the file `out`, and after them copies of some of them with shuffled prompts.

    A copy has the prompt (all tokens before the first answer) of another row: the row with the nearest prompt length
    whose prompt and answer both differ. A row without such another row has no copy. Preference pairs have no copies:
    their loss already compares an answer with another answer.

    Args:
        holdout: Arrow streams (`row`, `input_ids`, `labels`).
        max_rows: write this many holdout rows at most, and copies of `SHUFFLED_ROWS` of them at most. Of more rows a
            random sample is taken (see `sample`).
        max_tokens: maximum length of a copy in tokens.

    Returns:
        The number of holdout rows written, and for each copy the position of its original among these rows.
    """
    import pyarrow as pa

    table = load_table(holdout)
    table = table.take(sample(table, max_rows))
    rows, chosen = table.to_pylist(), sample(table, SHUFFLED_ROWS).tolist()
    shuffled = list(_with_shuffled_prompts(rows, chosen, max_tokens)) if "labels" in table.column_names else []
    copies = pa.Table.from_pylist([copy for _, copy in shuffled], table.schema)
    write_rows(out, [*table.to_batches(), *copies.to_batches()])
    return len(rows), [position for position, _ in shuffled]


def _with_shuffled_prompts(
    rows: list[dict[str, Any]], chosen: list[int], max_tokens: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield position and copy of each of the chosen rows for which another row has a suitable prompt."""
    halves = []  # prompt, and the rest from the first answer on
    for row in rows:
        begin = next((i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
        halves.append((row["input_ids"][:begin], row["input_ids"][begin:]))
    by_length = sorted(range(len(rows)), key=lambda position: (len(halves[position][0]), position))
    rank = {position: place for place, position in enumerate(by_length)}
    for position in chosen:
        row = rows[position]
        prompt, rest = halves[position]
        for other in sorted(by_length, key=lambda other: abs(rank[other] - rank[position])):
            other_prompt, other_rest = halves[other]
            if other_prompt != prompt and other_rest != rest and len(other_prompt) + len(rest) <= max_tokens:
                labels = [IGNORED] * len(other_prompt) + row["labels"][len(prompt) :]
                yield position, {"row": row["row"], "input_ids": other_prompt + rest, "labels": labels}
                break
