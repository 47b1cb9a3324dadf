"""download: fetch the dataset's rows, untouched, as parquet, with their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import closing
from itertools import islice

from include.data.sources import ROWS_PER_GROUP, dataset_label, pin_dataset, read_rows
from include.errors import BadData
from include.pipeline.contracts import DownloadOutput
from include.pipeline.stage import Result, StageContext, stage
from include.recipe import dataset_ref, eval_ref

MAX_NOTES = 50  # the log has all of them


@stage(
    version=3,
    recipe_fields=(
        "dataset", "dataset_config", "dataset_split", "dataset_revision", "max_rows",
        "eval_dataset", "eval_split", "eval_revision",
    ),
)  # fmt: skip
def download(context: StageContext) -> Result[DownloadOutput]:
    """Fetch the pinned dataset into `rows.parquet`: `row` (int64, from 0) and `content` (one JSON document, bytes).

    The rows of an evaluation dataset follow those of the dataset, and their numbers go on.

    Raises:
        BadData: a file is damaged, or there is no row.
        Conflict: a file has changed since `resolve` looked at it.
        NotFound, NoPermission, Unreachable: see `include.data.sources`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    recipe, schema = context.recipe, pa.schema([("row", pa.int64()), ("content", pa.binary())])
    sources = [(dataset_ref(recipe), recipe.max_rows)]
    if evaluation := eval_ref(recipe):
        sources.append((evaluation, None))
    digest, counts, notes = hashlib.sha256(), [0] * len(sources), list[str]()

    def contents() -> Generator[bytes]:
        for index, (source, most) in enumerate(sources):

            def note(sentence: str, field: str = source.field) -> None:
                notes.append(sentence if field == "dataset" else f"{field}: {sentence}")
                context.progress(notes[-1])

            with closing(read_rows(source, note)) as rows:
                for content in islice(rows, most):
                    counts[index] += 1
                    yield content
            pin_dataset(source, source.revision)
            if not counts[index]:
                name = dataset_label(source.name)
                raise BadData(f"field '{source.field}': {name} holds no rows", "Check the file, or the split")

    with (
        pq.ParquetWriter(context.out / DownloadOutput.ROWS, schema, compression="zstd") as writer,
        closing(contents()) as rows,
    ):
        written = 0
        while group := list(islice(rows, ROWS_PER_GROUP)):
            for content in group:
                digest.update(content + b"\n")
            writer.write_table(pa.table([range(written, written + len(group)), group], schema=schema))
            written += len(group)
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"{len(notes) - MAX_NOTES:,} more notes are in the log of download"]
    eval_rows = counts[1] if evaluation else 0
    summary = f"{counts[0]:,} rows" + (f", and {eval_rows:,} to evaluate on" if evaluation else "")
    output = DownloadOutput(rows=written, eval_rows=eval_rows, sha256=digest.hexdigest(), notes=notes)
    return Result(summary, output)
