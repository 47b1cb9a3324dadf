"""standardize: compare the rows with each other and assign each row to training or holdout."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from include.data.decontamination import Benchmark, describe_prompts, read_prompts
from include.data.deduplication import (
    SLOTS,
    Groups,
    Matches,
    ShingleSets,
    candidate_rows,
    minhash_signatures,
    near_duplicate_groups,
    near_duplicates_of,
    shingle_sets,
)
from include.data.holdout import Draw, draws
from include.data.parallel import in_order
from include.data.row_texts import RowTexts
from include.data.sources import ROWS_PER_GROUP, DatasetRef, absolute_path, pin_dataset
from include.data.tables import read_table, write_table
from include.errors import BadData
from include.evaluation.gate import rows_needed
from include.pipeline.contracts import DownloadOutput, StandardizeOutput, ValidateOutput
from include.pipeline.sharding import PARTS, ShardedContext, Step, sharded
from include.pipeline.stage import Output, Result, StageContext
from include.recipe import Recipe, corrected_confidence
from include.storage.files import file_digest

SIGNATURES, SIDES, SHINGLES = f"{PARTS}/signatures", f"{PARTS}/sides", f"{PARTS}/shingles"


def _benchmark_digest(context: StageContext, **_: Output[Any]) -> str | None:
    place = context.recipe.decontaminate_against and absolute_path(context.recipe.decontaminate_against)
    if not place or "://" in place:
        return place
    if Path(place).is_file():
        return file_digest(Path(place))
    return pin_dataset(DatasetRef(place, field="decontaminate_against"))  # a folder or pattern


@Step
def compare(
    context: ShardedContext, names: list[str], validate: Output[ValidateOutput], download: Output[DownloadOutput]
) -> list[None]:
    """Write the columns that are needed to compare all rows: number, the two numbers of the draw, the benchmark prompt
    that the row contains (-1: none), and MinHash signature. One file per file of readings, 284 bytes per good row.
    """
    recipe, source = context.recipe, context.fetch(validate, *(f"{ValidateOutput.READINGS}/{name}" for name in names))
    benchmark = None
    if recipe.decontaminate_against:
        found, prompts = read_prompts(
            recipe.decontaminate_against,
            recipe.decontaminate_column,
            lambda sentence: context.progress(f"decontaminate_against: {sentence}"),
        )
        context.progress(describe_prompts(recipe.decontaminate_against, found, prompts))
        benchmark = Benchmark(prompts)
    files = [source / ValidateOutput.READINGS / name for name in names]
    good = _good(validate, read_table(files[0])["row"][0].as_py(), read_table(files[-1])["row"][-1].as_py())
    (context.out / SIGNATURES).mkdir(parents=True)
    return list(in_order(lambda file: _compare(file, context.out, good, benchmark), files))


@Step
def decide(
    context: ShardedContext, validate: Output[ValidateOutput], download: Output[DownloadOutput]
) -> dict[str, Any]:
    """Compare all rows with each other: decide which rows stay and on which side, list the pairs of near-duplicates and
    the rows that are left out.

    Memory: 284 bytes per row, and about 150 more while comparing. The shingles of rows that may have near-duplicates,
    8 bytes per word, are in a file on this machine's disk.

    Raises:
        BadData: a side has no rows, too few rows are held out for the gate, or most rows are near-duplicates of rows
            of the evaluation dataset.
    """
    import numpy as np
    import pyarrow as pa

    recipe, folder = context.recipe, context.files_of(compare)
    tables = [read_table(folder / SIGNATURES / name) for name in context.names]
    rows, draw, rank, prompts = (
        np.concatenate([table[name].to_numpy() for table in tables]) for name in ("row", "draw", "rank", "prompt")
    )
    evaluation = rows >= download.metadata.rows - download.metadata.eval_rows
    contaminated = (prompts >= 0) & ~evaluation
    groups, matches = _near_duplicates(context, validate, tables, rows, evaluation, contaminated)
    first = groups.keys(np.arange(len(rows)))
    repeating = first != np.arange(len(rows))
    leaking = matches.states == -1
    dropped = contaminated | leaking
    if recipe.near_duplicates == "drop":  # all but the first row of each group that can be used
        usable, stays = np.flatnonzero(~dropped), np.full(len(rows), len(rows))
        np.minimum.at(stays, first[usable], usable)
        dropped[usable[stays[first[usable]] != usable]] = True
    if download.metadata.eval_rows:  # even if all of them were refused
        holdout = evaluation
        if leaking.sum() * 2 > (~evaluation).sum():
            raise BadData(
                f"{leaking.sum():,} of {(~evaluation).sum():,} rows are near-duplicates of rows of the evaluation "
                "dataset and cannot train",
                "Evaluate on other rows; if the rows only share long texts, raise near_duplicate_similarity",
            )
        _check_sides(recipe, holdout, ~dropped, None)
    else:
        drawn = Draw.of(draw, rank, first)
        holdout = drawn.held_out(recipe.holdout_share)
        _check_sides(recipe, holdout, ~dropped, drawn)
    _write_pairs(context.out / StandardizeOutput.NEAR_DUPLICATES, rows, groups, matches)
    reasons = _write_left_out(context, rows, prompts, contaminated, matches, groups, dropped)
    (context.out / SIDES).mkdir(parents=True)
    begin = 0
    for name, table in zip(context.names, tables, strict=True):
        kept = slice(begin, begin := begin + len(table))
        stay = ~dropped[kept]
        sides = pa.table({"row": rows[kept][stay], "holdout": holdout[kept][stay]})
        write_table(sides, context.out / SIDES / name)
    return {
        "train": int((~dropped & ~holdout).sum()), "holdout": int((~dropped & holdout).sum()),
        "near_duplicates": int(repeating.sum()), "leaking": int(leaking.sum()),
        "contaminated": int(contaminated.sum()), "dropped": int(dropped.sum()), "left_out_reasons": reasons,
    }  # fmt: skip


@Step
def write(
    context: ShardedContext, names: list[str], validate: Output[ValidateOutput], download: Output[DownloadOutput]
) -> list[None]:
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
    version=8,
    recipe_fields=(
        "holdout_share", "near_duplicates", "near_duplicate_similarity", "decontaminate_against",
        "decontaminate_column",
    ),
    other_fields=("gate_confidence", "sweep", "max_holdout_rows"),  # they decide only whether the stage fails
    external_inputs=_benchmark_digest,
    split_folder=ValidateOutput.READINGS,
    steps=(compare, decide, write),
)  # fmt: skip
def standardize(
    context: ShardedContext, validate: Output[ValidateOutput], download: Output[DownloadOutput]
) -> Result[StandardizeOutput]:
    """Write `messages/` (one Arrow file per file of readings: `row`, the conversation's columns and `holdout`),
    `near_duplicates.jsonl` (pairs of rows with their similarity) and `left_out.jsonl` (the rows that are used neither
    for training nor for evaluation, with their reasons).

    The holdout are the rows of the evaluation dataset, or a share of the rows drawn by their content, in whole groups
    of near-duplicates (see `include.data.holdout`). Near-duplicates of the evaluation dataset's rows, and rows that
    contain a benchmark's prompt, are left out.

    Raises:
        BadData: see `decide`.
    """
    made = StandardizeOutput.model_validate(context.result_of(decide))
    context.result_of(write)
    summary = f"{made.train:,} rows to train on, {made.holdout:,} held out; {made.near_duplicates:,} near-duplicates"
    if made.left_out_reasons:
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in made.left_out_reasons.items())
        summary += f"; {made.dropped:,} left out: {reasons}"
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


def _compare(file: Path, out: Path, good: Any, benchmark: Benchmark | None) -> None:
    import pyarrow as pa

    table = _rows_of(file, good)
    texts = RowTexts(table)
    draw, rank = draws(table["digest"].to_pylist())
    words = texts.words_of_rows()
    columns = {
        "row": table["row"].combine_chunks(),
        "draw": pa.array(draw),
        "rank": pa.array(rank),
        "prompt": pa.array(texts.prompts(benchmark)),
        "signature": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(SLOTS * 4), len(table), [None, pa.py_buffer(minhash_signatures(*words).tobytes())]
        ),
    }
    write_table(pa.table(columns), out / SIGNATURES / file.name)


def _rows_of(file: Path, wanted: Any) -> Any:
    """Return the wanted rows of a file of readings. `wanted` are row numbers, ascending."""
    import numpy as np
    import pyarrow as pa

    table = read_table(file)
    rows = table["row"].to_numpy()
    first, end = np.searchsorted(wanted, [rows[0], rows[-1] + 1])
    return table.filter(pa.array(np.isin(rows, wanted[first:end])))


def _near_duplicates(
    context: ShardedContext, validate: Output[ValidateOutput], tables: list[Any], rows: Any, evaluation: Any,
    contaminated: Any,
) -> tuple[Groups, Matches]:  # fmt: skip
    """Return the groups of near-duplicates, and the matches of training rows with rows of the evaluation dataset."""
    import numpy as np

    similarity, signatures = context.recipe.near_duplicate_similarity, np.concatenate([_signatures(t) for t in tables])
    signatures[contaminated] = 0  # they are left out anyway
    try:
        sets = _sets(context, validate, rows, candidate_rows(signatures, similarity))
        groups = near_duplicate_groups(signatures, sets, np.flatnonzero(~evaluation), similarity)
        matches = Matches(evaluation.astype(np.int8))
        if evaluation.any():
            matches = near_duplicates_of(evaluation, signatures, sets, np.arange(len(rows)), similarity)
    finally:
        shutil.rmtree(context.out / SHINGLES, ignore_errors=True)
    return groups, matches


def _sets(context: ShardedContext, validate: Output[ValidateOutput], rows: Any, chosen: Any) -> ShingleSets:
    """Return the sets of shingles of the chosen rows, in a file that is mapped into memory."""
    import numpy as np

    folder, wanted, exact = context.out / SHINGLES, rows[chosen], context.recipe.near_duplicate_similarity == 1
    folder.mkdir(parents=True)
    sizes = np.zeros(len(rows), np.int64)
    if not len(wanted):
        return ShingleSets(np.zeros(0, np.uint64), sizes, sizes)
    names = sorted({context.names[i] for i in np.unique(wanted // ROWS_PER_GROUP)})
    readings = context.fetch(validate, *(f"{ValidateOutput.READINGS}/{name}" for name in names))

    def of_file(name: str) -> Any:
        texts = RowTexts(_rows_of(readings / ValidateOutput.READINGS / name, wanted))
        if exact:
            shingles = texts.digests_of_rows()
            counts = np.ones(len(shingles), np.int64)
        else:
            shingles, counts = shingle_sets(*texts.words_of_rows())
        shingles.tofile(folder / name)
        return counts

    found = []
    with (folder / "all").open("wb") as target:
        for name, counts in zip(names, in_order(of_file, names), strict=True):
            found.append(counts)
            with (folder / name).open("rb") as file:
                shutil.copyfileobj(file, target)
            (folder / name).unlink()
    sizes[chosen] = np.concatenate(found)
    return ShingleSets(np.memmap(folder / "all", np.uint64, "r"), sizes.cumsum() - sizes, sizes)


def _signatures(table: Any) -> Any:
    """Return the signatures in a file of `compare` (uint32, rows x SLOTS)."""
    import numpy as np

    found = [
        np.frombuffer(chunk.buffers()[1], np.uint32).reshape(-1, SLOTS)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in table["signature"].chunks
    ]
    return np.concatenate([np.zeros((0, SLOTS), np.uint32), *found])


def _check_sides(recipe: Recipe, holdout: Any, used: Any, drawn: Draw | None) -> None:
    """Raise BadData if a side has no rows, or if too few rows are held out for the gate.

    Args:
        holdout, used: which rows are held out, and which are used (bool).
        drawn: the draw; None if an evaluation dataset is the holdout.
    """
    candidates = 1
    for values in recipe.sweep.values():
        candidates *= len(values)
    confidence = corrected_confidence(recipe.gate_confidence, candidates)
    held, rows, needed = int((holdout & used).sum()), int(used.sum()), rows_needed(confidence)
    at = f"at gate_confidence={recipe.gate_confidence:g}"
    if candidates > 1:
        at += f" for each of {candidates} candidates"
    if recipe.max_holdout_rows < needed:
        raise BadData(f"the gate needs {needed} held-out rows {at}", f"Raise max_holdout_rows to at least {needed}")
    if held >= needed and held < rows:
        return
    if drawn is None:
        do = "Use other rows to train on"
        if held < needed:
            do = "Use a larger evaluation dataset, or correct its rows in quarantine.jsonl of validate"
    elif share := drawn.least_share(needed, used):
        do = f"Set holdout_share to at least {share:g}, or use more rows"
    else:
        do = "Use more rows; if the rows only share long texts, raise near_duplicate_similarity"
    if held == rows:
        raise BadData(f"all {rows:,} rows are held out, and none is left to train on", do)
    of = f"{rows:,} at holdout_share={recipe.holdout_share:g}" if drawn else f"{rows:,}"
    raise BadData(f"too few held-out rows: {held:,} of {of}, and the gate needs {needed} {at}", do)


def _write(readings: Path, sides: Path, target: Path) -> None:
    import numpy as np
    import pyarrow as pa

    table, kept = read_table(readings), read_table(sides)
    stay = pa.array(np.isin(table["row"].to_numpy(), kept["row"].to_numpy()))
    table = table.select(["row", "roles", "contents", "tools", "rejected", "masked", "calls", "thoughts"]).filter(stay)
    write_table(table.append_column("holdout", kept["holdout"].combine_chunks()), target)


def _write_pairs(target: Path, rows: Any, groups: Groups, matches: Matches) -> None:
    pairs = [(rows[b], "nearly_equals", rows[a], similarity) for a, b, similarity in groups.pairs]
    pairs += [(rows[a], "nearly_equals_held_out", rows[b], similarity) for a, b, similarity in matches.pairs]
    entries = [{"row": int(a), how: int(b), "similarity": round(s, 4)} for a, how, b, s in sorted(pairs)]
    target.write_bytes(b"".join(orjson.dumps(entry) + b"\n" for entry in entries))


def _write_left_out(
    context: ShardedContext, rows: Any, prompts: Any, contaminated: Any, matches: Matches, groups: Groups, dropped: Any
) -> dict[str, int]:
    """List the rows that are left out with their reasons; return the number of rows by their first reason."""
    import numpy as np

    reasons: dict[int, list[str]] = {int(i): [] for i in np.flatnonzero(dropped)}
    counts: Counter[str] = Counter()

    def add(row: int, kind: str, detail: str) -> None:
        if not reasons[row]:
            counts[kind] += 1
        reasons[row].append(detail)

    name = Path(str(context.recipe.decontaminate_against)).name
    for i in np.flatnonzero(contaminated).tolist():
        add(i, "contains a benchmark's prompt", f"contains the prompt {prompts[i]} of {name}")
    for i, other, similarity in sorted(matches.pairs):
        detail = f"near-duplicate of the held-out row {_pair(rows[other], similarity)}"
        add(i, "near-duplicate of a held-out row", detail)
    if context.recipe.near_duplicates == "drop":
        nearest = {i: (other, similarity) for other, i, similarity in groups.pairs}
        nearest |= {i: (other, similarity) for i, other, similarity in groups.pairs if i not in nearest}
        for i, (other, similarity) in sorted(nearest.items()):
            if i in reasons and groups.parents[i] != i:
                add(i, "near-duplicate of another row", f"near-duplicate of the row {_pair(rows[other], similarity)}")
    with (context.out / StandardizeOutput.LEFT_OUT).open("wb") as file:
        for i, why in sorted(reasons.items()):
            file.write(orjson.dumps({"row": int(rows[i]), "reasons": why}) + b"\n")
    return dict(counts.most_common())


def _pair(row: int, similarity: float) -> str:
    return f"{row}, similarity {int(similarity * 100) / 100:.2f}"
