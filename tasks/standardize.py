"""standardize: compare the rows with each other and assign each row to training or holdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from include.data.deduplication import SLOTS, Benchmark, hash_words, minhash_signatures, near_duplicates
from include.data.parallel import in_order
from include.data.sources import absolute_path, read_prompts
from include.data.tables import read_table, write_table
from include.errors import BadData
from include.pipeline.contracts import StandardizeOutput, ValidateOutput
from include.pipeline.sharding import PARTS, ShardedContext, Step, sharded
from include.pipeline.stage import Output, Result, StageContext
from include.storage.files import file_digest

SIGNATURES, SIDES = f"{PARTS}/signatures", f"{PARTS}/sides"


def _benchmark_digest(context: StageContext, **_: Output[ValidateOutput]) -> str | None:
    place = context.recipe.decontaminate_against and absolute_path(context.recipe.decontaminate_against)
    return file_digest(Path(place)) if place and Path(place).is_file() else place


@Step
def compare(context: ShardedContext, names: list[str], validate: Output[ValidateOutput]) -> list[None]:
    """Write the columns that are needed to compare all rows: number, holdout or not, MinHash signature, and whether the
    row contains a benchmark's prompt. One file per file of readings, 266 bytes per good row.
    """
    import pyarrow as pa

    recipe, source = context.recipe, context.fetch(validate, *(f"{ValidateOutput.READINGS}/{name}" for name in names))
    benchmark = None
    if recipe.decontaminate_against:
        benchmark = Benchmark(pa.array(read_prompts(recipe.decontaminate_against), pa.large_string()))
    files = [source / ValidateOutput.READINGS / name for name in names]
    good = _good(validate, read_table(files[0])["row"][0].as_py(), read_table(files[-1])["row"][-1].as_py())
    (context.out / SIGNATURES).mkdir(parents=True)
    return list(in_order(lambda file: _compare(file, context.out, good, recipe.holdout_share, benchmark), files))


@Step
def decide(context: ShardedContext, validate: Output[ValidateOutput]) -> dict[str, int]:
    """Compare all rows with each other: decide which rows stay, and list the pairs of near-duplicates.

    Memory: 266 bytes per row, and about 100 more while sorting.

    Raises:
        BadData: training or holdout has no rows, or most rows are near-duplicates of held-out rows.
    """
    import numpy as np
    import pyarrow as pa

    recipe, folder = context.recipe, context.files_of(compare)
    tables = [read_table(folder / SIGNATURES / name) for name in context.names]
    rows, holdout, contaminated = (
        np.concatenate([table[name].to_numpy() for table in tables]) for name in ("row", "holdout", "contaminated")
    )
    signatures = np.concatenate([_signatures(table) for table in tables])
    earlier, held_out = near_duplicates(signatures, holdout, recipe.near_duplicate_similarity)
    leaking = (held_out >= 0) & ~holdout
    repeating = earlier >= 0
    if leaking.sum() * 2 > len(rows):
        raise BadData(
            f"{leaking.sum():,} of {len(rows):,} rows are near-duplicates of held-out rows and cannot train",
            "The rows share long texts: raise near_duplicate_similarity",
        )
    dropped = contaminated | leaking | (repeating if recipe.near_duplicates == "drop" else False)
    train, held = int((~dropped & ~holdout).sum()), int((~dropped & holdout).sum())
    if not train or not held:
        raise BadData(
            f"the {'training' if not train else 'holdout'} side of {train + held:,} rows is empty at "
            f"holdout_share={recipe.holdout_share}",
            "Change holdout_share, or use more rows",
        )
    _write_pairs(context.out / StandardizeOutput.NEAR_DUPLICATES, rows, earlier, held_out)
    (context.out / SIDES).mkdir(parents=True)
    begin = 0
    for name, table in zip(context.names, tables, strict=True):
        kept = slice(begin, begin := begin + len(table))
        stay = ~dropped[kept]
        sides = pa.table({"row": rows[kept][stay], "holdout": holdout[kept][stay]})
        write_table(sides, context.out / SIDES / name)
    return {
        "train": train, "holdout": held, "near_duplicates": int(repeating.sum()), "leaking": int(leaking.sum()),
        "contaminated": int(contaminated.sum()), "dropped": int(dropped.sum()),
    }  # fmt: skip


@Step
def write(context: ShardedContext, names: list[str], validate: Output[ValidateOutput]) -> list[None]:
    """Write the conversations of the rows that are used, each with its flag `holdout`."""
    readings = (
        context.fetch(validate, *(f"{ValidateOutput.READINGS}/{name}" for name in names)) / ValidateOutput.READINGS
    )
    sides = context.files_of(decide, *(f"{SIDES}/{name}" for name in names)) / SIDES
    (context.out / StandardizeOutput.MESSAGES).mkdir()
    return list(
        in_order(
            lambda name: _write(readings / name, sides / name, context.out / StandardizeOutput.MESSAGES / name), names
        )
    )


@sharded(
    version=6,
    recipe_fields=("holdout_share", "near_duplicates", "near_duplicate_similarity", "decontaminate_against"),
    external_inputs=_benchmark_digest,
    split_folder=ValidateOutput.READINGS,
    steps=(compare, decide, write),
)
def standardize(context: ShardedContext, validate: Output[ValidateOutput]) -> Result[StandardizeOutput]:
    """Write `messages/` (one Arrow file per file of readings: `row`, the conversation's columns and `holdout`) and
    `near_duplicates.jsonl` (pairs of rows).

    Only a row's content decides whether it is held out, so a change of other rows does not move it. Near-duplicates of
    held-out rows, and rows that contain a benchmark's prompt, are left out.

    Raises:
        BadData: see `decide`.
    """
    made = StandardizeOutput.model_validate(context.result_of(decide))
    context.result_of(write)
    dropped = " dropped" if context.recipe.near_duplicates == "drop" else ""
    summary = (
        f"{made.train:,} rows to train on, {made.holdout:,} held out; {made.near_duplicates:,} "
        f"near-duplicates{dropped}, {made.leaking:,} of held-out rows left out"
    )
    if context.recipe.decontaminate_against:
        summary += f", {made.contaminated:,} hold a benchmark's prompt"
    return Result(summary, made)


def _good(validate: Output[ValidateOutput], first: int, last: int) -> Any:
    """Return the numbers of the good rows from `first` to `last` (int64); read only the row groups that have some."""
    import numpy as np
    import pyarrow.parquet as pq

    with (validate.folder / ValidateOutput.GOOD).open("rb") as content:
        file = pq.ParquetFile(content)
        found = [np.zeros(0, np.int64)]
        for group in range(file.num_row_groups):
            bounds = file.metadata.row_group(group).column(0).statistics
            if bounds is None or (bounds.min <= last and bounds.max >= first):
                found.append(file.read_row_group(group, use_threads=False)["row"].to_numpy())
    rows = np.concatenate(found)
    return rows[(rows >= first) & (rows <= last)]


def _compare(file: Path, out: Path, good: Any, holdout_share: float, benchmark: Benchmark | None) -> None:
    import numpy as np
    import pyarrow as pa

    table = read_table(file).select(["row", "digest", "roles", "contents"])
    rows = table["row"].to_numpy()
    first, end = np.searchsorted(good, [rows[0], rows[-1] + 1])
    table = table.filter(pa.array(np.isin(rows, good[first:end])))
    numbers, counts = _words_said(table)
    columns = {
        "row": table["row"].combine_chunks(),
        "holdout": pa.array([is_holdout(digest, holdout_share) for digest in table["digest"].to_pylist()], pa.bool_()),
        "contaminated": pa.array(benchmark.contaminates(numbers, counts) if benchmark else np.zeros(len(table), bool)),
        "signature": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(SLOTS * 4), len(table), [None, pa.py_buffer(minhash_signatures(numbers, counts).tobytes())]
        ),
    }
    write_table(pa.table(columns), out / SIGNATURES / file.name)


def _signatures(table: Any) -> Any:
    """Return the signatures in a file of `compare` (uint32, rows x SLOTS)."""
    import numpy as np

    found = [
        np.frombuffer(chunk.buffers()[1], np.uint32).reshape(-1, SLOTS)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in table["signature"].chunks
    ]
    return np.concatenate([np.zeros((0, SLOTS), np.uint32), *found])


def _words_said(table: Any) -> tuple[Any, Any]:
    """Return the hashed words of all rows and their number per row, without system messages, which make rows alike."""
    import numpy as np

    contents = table["contents"].combine_chunks()
    offsets = contents.offsets.to_numpy()
    numbers, counts = hash_words(contents.values)
    opens = np.array([roles.startswith("system") for roles in table["roles"].to_pylist()], bool)
    by_system = np.zeros(len(counts), bool)
    by_system[offsets[:-1][opens]] = True
    numbers, counts = numbers[~np.repeat(by_system, counts)], np.where(by_system, 0, counts)
    sums = np.concatenate([[0], counts.cumsum()])
    first, last = sums[offsets[0]], sums[offsets[-1]]
    return numbers[first:last], np.diff(sums[offsets])


def _write(readings: Path, sides: Path, target: Path) -> None:
    import numpy as np
    import pyarrow as pa

    table, kept = read_table(readings), read_table(sides)
    stay = pa.array(np.isin(table["row"].to_numpy(), kept["row"].to_numpy()))
    table = table.select(["row", "roles", "contents", "tools", "rejected", "masked", "calls"]).filter(stay)
    write_table(table.append_column("holdout", kept["holdout"].combine_chunks()), target)


def _write_pairs(target: Path, rows: Any, earlier: Any, held_out: Any) -> None:
    pairs = [(rows[i], "nearly_equals", rows[earlier[i]]) for i in (earlier >= 0).nonzero()[0]]
    pairs += [(rows[i], "nearly_equals_held_out", rows[held_out[i]]) for i in (held_out >= 0).nonzero()[0]]
    target.write_bytes(b"".join(orjson.dumps({"row": int(a), how: int(b)}) + b"\n" for a, how, b in sorted(pairs)))


def is_holdout(digest: bytes, share: float) -> bool:
    """Return whether a row is held out: its digest's first 64 bits, as a fraction of 2**64, are below the share."""
    return int.from_bytes(digest[:8]) < share * 2**64
