"""download: fetch the dataset's rows, untouched, as parquet, with their digest."""

from __future__ import annotations

import hashlib
from contextlib import closing
from itertools import islice

from include.data.sources import ROWS_PER_GROUP, dataset_label, pin_dataset, read_rows
from include.errors import BadData
from include.pipeline.contracts import DownloadOutput
from include.pipeline.stage import Result, StageContext, stage
from include.recipe import dataset_ref

MAX_NOTES = 50  # the log has all of them


@stage(version=2, recipe_fields=("dataset", "dataset_config", "dataset_split", "dataset_revision", "max_rows"))
def download(context: StageContext) -> Result[DownloadOutput]:
    """Fetch the pinned dataset into `rows.parquet`: `row` (int64, from 0) and `content` (one JSON document, bytes).

    Raises:
        BadData: a file is damaged, or there is no row.
        Conflict: a file has changed since `resolve` looked at it.
        NotFound, NoPermission, Unreachable: see `include.data.sources`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset, notes = dataset_ref(context.recipe), []

    def note(sentence: str) -> None:
        context.progress(sentence)
        notes.append(sentence)

    schema = pa.schema([("row", pa.int64()), ("content", pa.binary())])
    digest, count = hashlib.sha256(), 0
    with (
        pq.ParquetWriter(context.out / DownloadOutput.ROWS, schema, compression="zstd") as writer,
        closing(read_rows(dataset, note)) as source,
    ):
        rows = islice(source, context.recipe.max_rows)
        while group := list(islice(rows, ROWS_PER_GROUP)):
            for content in group:
                digest.update(content + b"\n")
            writer.write_table(pa.table([range(count, count + len(group)), group], schema=schema))
            count += len(group)
    pin_dataset(dataset, context.recipe.dataset_revision)
    if count == 0:
        raise BadData(f"field 'dataset': {dataset_label(dataset.name)} holds no rows", "Check the file, or the split")
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"{len(notes) - MAX_NOTES:,} more notes are in the log of download"]
    return Result(f"{count:,} rows", DownloadOutput(rows=count, sha256=digest.hexdigest(), notes=notes))
