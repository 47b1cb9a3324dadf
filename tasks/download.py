"""download: fetch the dataset's rows, untouched, as parquet, with their digest."""

from __future__ import annotations

import hashlib
from itertools import islice

from include.data.sources import ROWS_PER_GROUP, pin_dataset, read_rows
from include.errors import BadData
from include.pipeline.contracts import DownloadOutput
from include.pipeline.stage import Result, StageContext, stage


@stage(version=1, recipe_fields=("dataset", "dataset_config", "dataset_split", "dataset_revision", "max_rows"))
def download(context: StageContext) -> Result[DownloadOutput]:
    """Fetch the pinned dataset into `rows.parquet`: `row` (int64, from 0) and `content` (one JSON document, bytes).

    Raises:
        BadData: the file is damaged, or holds no row.
        Conflict: the file has changed since `resolve` looked at it.
        NotFound, NoPermission, Unreachable: see `include.data.sources`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("row", pa.int64()), ("content", pa.binary())])
    digest, count = hashlib.sha256(), 0
    with pq.ParquetWriter(context.out / DownloadOutput.ROWS, schema, compression="zstd") as writer:
        rows = islice(read_rows(context.recipe), context.recipe.max_rows)
        while group := list(islice(rows, ROWS_PER_GROUP)):
            for content in group:
                digest.update(content + b"\n")
            writer.write_table(pa.table([range(count, count + len(group)), group], schema=schema))
            count += len(group)
    pin_dataset(context.recipe, context.recipe.dataset_revision)
    if count == 0:
        raise BadData(f"field 'dataset': {context.recipe.dataset} holds no rows", "Check the file, or the split")
    return Result(f"{count:,} rows", DownloadOutput(rows=count, sha256=digest.hexdigest()))
