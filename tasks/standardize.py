"""standardize: rows are compared with each other, and every row gets its side: training or holdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from include.duplicates import Benchmark, near_duplicates, signatures, words
from include.errors import BadData
from include.parallel import in_order
from include.rows import read_table, write_table
from include.sources import absolute, read_prompts
from include.stage import Job, Result, stage
from include.store import Artifact, file_digest
from tasks.validate import GOOD, READINGS

MESSAGES, NEAR = "messages", "near_duplicates.jsonl"


def _benchmark_digest(job: Job, **_: Artifact) -> str | None:
    place = job.recipe.decontaminate_against and absolute(job.recipe.decontaminate_against)
    return file_digest(Path(place)) if place and Path(place).is_file() else place


@stage(
    version=4,
    uses=("holdout_share", "near_duplicates", "near_duplicate_similarity", "decontaminate_against"),
    facts=_benchmark_digest,
)
def standardize(job: Job, validate: Artifact) -> Result:
    """Write `messages/` (an Arrow file for each of the readings: `row`, the conversation's columns and `holdout`) and
    `near_duplicates.jsonl` (pairs of rows).

    The side of a row follows from its content alone, so that it keeps it when the data around it changes. Rows that
    nearly equal a held-out one, and rows that hold a benchmark's prompt, are left out.

    Raises:
        BadData: one of the two sides is empty, or most rows nearly equal a held-out one.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    recipe, source = job.recipe, validate.local()
    files = sorted((source / READINGS).iterdir())
    good = pq.read_table(source / GOOD, use_threads=False)["row"].to_numpy()
    benchmark = None
    if recipe.decontaminate_against:
        benchmark = Benchmark(pa.array(read_prompts(recipe.decontaminate_against), pa.large_string()))
    parts = list(in_order(lambda index: _compare_group(files[index], good, recipe.holdout_share, benchmark),
                          range(len(files))))  # fmt: skip
    rows, holdout, marks, contaminated = (np.concatenate(column) for column in zip(*parts, strict=True))
    earlier, held_out = near_duplicates(marks, holdout, recipe.near_duplicate_similarity)
    leaking = (held_out >= 0) & ~holdout
    repeating = earlier >= 0
    if leaking.sum() * 2 > len(rows):
        raise BadData(
            f"{leaking.sum():,} of {len(rows):,} rows nearly equal a held-out row and could not train",
            "The rows share long texts: raise near_duplicate_similarity",
        )
    dropped = contaminated | leaking | (repeating if recipe.near_duplicates == "drop" else False)
    _write_pairs(job.out / NEAR, rows, earlier, held_out)
    (job.out / MESSAGES).mkdir(exist_ok=True)
    kept, sides = rows[~dropped], holdout[~dropped]
    for _ in in_order(lambda index: _write_group(files[index], job.out, kept, sides), range(len(files))):
        pass
    train, held = int((~sides).sum()), int(sides.sum())
    if not train or not held:
        raise BadData(
            f"the {'training' if not train else 'holdout'} side of {train + held:,} rows is empty at "
            f"holdout_share={recipe.holdout_share}",
            "Change holdout_share, or use more rows",
        )
    facts = {
        "train": train, "holdout": held, "near_duplicates": int(repeating.sum()), "leaking": int(leaking.sum()),
        "contaminated": int(contaminated.sum()), "dropped": int(dropped.sum()),
    }  # fmt: skip
    line = (
        f"{train:,} rows to train on, {held:,} held out; {facts['near_duplicates']:,} near-duplicates"
        f"{' dropped' if recipe.near_duplicates == 'drop' else ''}, {facts['leaking']:,} of held-out rows left out"
    )
    return Result(line + (f", {facts['contaminated']:,} hold a benchmark's prompt" if benchmark else ""), facts)


def _good_rows(file: Path, good: Any, columns: list[str]) -> tuple[Any, Any]:
    """The good rows of a file of readings, and where they stand among all good rows."""
    import numpy as np
    import pyarrow as pa

    table = read_table(file).select(columns)
    rows = table["row"].to_numpy()
    first, last = np.searchsorted(good, [rows[0], rows[-1] + 1])
    return table.filter(pa.array(np.isin(rows, good[first:last]))), slice(first, last)


def _compare_group(file: Path, good: Any, holdout_share: float, benchmark: Benchmark | None) -> tuple[Any, ...]:
    import numpy as np

    table, _ = _good_rows(file, good, ["row", "digest", "roles", "contents"])
    holdout = np.array([is_holdout(digest, holdout_share) for digest in table["digest"].to_pylist()], bool)
    numbers, counts = _words_said(table)
    contaminated = benchmark.within(numbers, counts) if benchmark else np.zeros(len(table), bool)
    return table["row"].to_numpy(), holdout, signatures(numbers, counts), contaminated


def _words_said(table: Any) -> tuple[Any, Any]:
    """The words of each row; without the system's, which many rows share and which would make them alike."""
    import numpy as np

    contents = table["contents"].combine_chunks()
    offsets = contents.offsets.to_numpy()
    numbers, counts = words(contents.values)
    opens = np.array([roles.startswith("system") for roles in table["roles"].to_pylist()], bool)
    by_system = np.zeros(len(counts), bool)
    by_system[offsets[:-1][opens]] = True
    numbers, counts = numbers[~np.repeat(by_system, counts)], np.where(by_system, 0, counts)
    sums = np.concatenate([[0], counts.cumsum()])
    first, last = sums[offsets[0]], sums[offsets[-1]]
    return numbers[first:last], np.diff(sums[offsets])


def _write_group(file: Path, out: Path, kept: Any, sides: Any) -> None:
    import pyarrow as pa

    table, place = _good_rows(file, kept, ["row", "roles", "contents", "tools", "rejected"])
    table = table.append_column("holdout", pa.array(sides[place]))
    write_table(table, out / MESSAGES / file.name)


def _write_pairs(target: Path, rows: Any, earlier: Any, held_out: Any) -> None:
    pairs = [(rows[i], "nearly_equals", rows[earlier[i]]) for i in (earlier >= 0).nonzero()[0]]
    pairs += [(rows[i], "nearly_equals_held_out", rows[held_out[i]]) for i in (held_out >= 0).nonzero()[0]]
    target.write_bytes(b"".join(orjson.dumps({"row": int(a), how: int(b)}) + b"\n" for a, how, b in sorted(pairs)))


def is_holdout(digest: bytes, share: float) -> bool:
    """The side of a row, from the first 64 bits of its content's sha256."""
    return int.from_bytes(digest[:8]) < share * 2**64
