"""standardize: good rows become role/content messages, and every row gets its side: training or holdout."""

from __future__ import annotations

from include.errors import BadData
from include.sharegpt import read
from include.sources import ROWS_PER_GROUP
from include.stage import Job, Result, stage
from include.store import Artifact
from tasks.download import ROWS
from tasks.validate import GOOD

MESSAGES = "messages.parquet"


@stage(version=1, uses=("holdout_share",))
def standardize(job: Job, download: Artifact, validate: Artifact) -> Result:
    """Write `messages.parquet`: `row`, `messages` (list of role, content) and `holdout` (bool).

    The side of a row follows from its content alone, so that it keeps it when the data around it changes.

    Raises:
        BadData: one of the two sides is empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("row", pa.int64()), ("messages", pa.list_(message)), ("holdout", pa.bool_())])
    good = set(pq.read_table(validate.local() / GOOD)["row"].to_pylist())
    counts = [0, 0]
    with pq.ParquetWriter(job.out / MESSAGES, schema, compression="zstd") as writer:
        for batch in pq.ParquetFile(download.local() / ROWS).iter_batches(ROWS_PER_GROUP):
            kept = []
            for row, content in zip(batch["row"].to_pylist(), batch["content"].to_pylist(), strict=True):
                if row in good:
                    reading = read(content)
                    side = is_holdout(reading.features["digest"], job.recipe.holdout_share)
                    counts[side] += 1
                    kept.append({"row": row, "messages": reading.messages, "holdout": side})
            writer.write_table(pa.Table.from_pylist(kept, schema=schema))
    train, holdout = counts
    if not train or not holdout:
        empty = "training" if not train else "holdout"
        raise BadData(
            f"the {empty} side of {train + holdout:,} rows is empty at holdout_share={job.recipe.holdout_share}",
            "Change holdout_share, or use more rows",
        )
    return Result(f"{train:,} rows to train on, {holdout:,} held out", {"train": train, "holdout": holdout})


def is_holdout(digest: str, share: float) -> bool:
    """The side of a row, from the first 64 bits of its content's sha256 (hex)."""
    return int(digest[:16], 16) < share * 2**64
