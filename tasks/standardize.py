"""standardize: good rows become role/content messages, and every row gets its side: training or holdout."""

from __future__ import annotations

from pathlib import Path

import orjson

from include.errors import BadData
from include.parallel import in_order
from include.recipe import Recipe
from include.sharegpt import read
from include.stage import Job, Result, stage
from include.store import Artifact
from tasks.download import ROWS
from tasks.validate import GOOD

MESSAGES = "messages.parquet"


@stage(version=2, uses=("dataset_format", "holdout_share"))
def standardize(job: Job, download: Artifact, validate: Artifact) -> Result:
    """Write `messages.parquet`: `row`, `messages` (JSON: list of role, content) and `holdout` (bool).

    The side of a row follows from its content alone, so that it keeps it when the data around it changes.

    Raises:
        BadData: one of the two sides is empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("row", pa.int64()), ("messages", pa.binary()), ("holdout", pa.bool_())])
    source = download.local() / ROWS
    good = set(pq.read_table(validate.local() / GOOD, use_threads=False)["row"].to_pylist())
    counts = [0, 0]
    groups = range(pq.ParquetFile(source).num_row_groups)
    with pq.ParquetWriter(job.out / MESSAGES, schema, compression="zstd") as writer:
        for columns in in_order(lambda i: _group_messages(source, i, good, job.recipe), groups):
            writer.write_table(pa.table(list(columns), schema=schema))
            for side in (False, True):
                counts[side] += columns[2].count(side)
    train, holdout = counts
    if not train or not holdout:
        empty = "training" if not train else "holdout"
        raise BadData(
            f"the {empty} side of {train + holdout:,} rows is empty at holdout_share={job.recipe.holdout_share}",
            "Change holdout_share, or use more rows",
        )
    return Result(f"{train:,} rows to train on, {holdout:,} held out", {"train": train, "holdout": holdout})


def _group_messages(source: Path, index: int, good: set[int], recipe: Recipe) -> tuple[list, list, list]:
    import pyarrow.parquet as pq

    columns: tuple[list, list, list] = ([], [], [])
    table = pq.ParquetFile(source).read_row_group(index, use_threads=False)
    for row, content in zip(table["row"].to_pylist(), table["content"].to_pylist(), strict=True):
        if row in good:
            reading = read(content, recipe.dataset_format == "alpaca")
            side = is_holdout(reading.features["digest"], recipe.holdout_share)
            for column, value in zip(columns, (row, orjson.dumps(reading.messages), side), strict=True):
                column.append(value)
    return columns


def is_holdout(digest: str, share: float) -> bool:
    """The side of a row, from the first 64 bits of its content's sha256 (hex)."""
    return int(digest[:16], 16) < share * 2**64
