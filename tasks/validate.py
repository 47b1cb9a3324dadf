"""validate: every row is judged before anything is spent on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from include.errors import BadData
from include.expectations import RAW_ROWS, Findings, Rule
from include.expectations import validate as run_suite
from include.parallel import in_order
from include.sharegpt import read
from include.stage import Job, Result, stage
from include.store import Artifact
from tasks.download import ROWS

QUARANTINE, GOOD, DOCS = "quarantine.jsonl", "good.parquet", "data_docs"


@stage(version=1, uses=("dataset_format", "max_refused_share"))
def validate(job: Job, download: Artifact) -> Result:
    """Judge the raw rows with Great Expectations.

    Leaves `good.parquet` (the `row` numbers that may be trained on), `quarantine.jsonl` (every refused row: its
    number, the reasons and its content) and `data_docs/` (the suite's results as pages).

    Raises:
        BadData: no row is usable, or more than `max_refused_share` of the rows are refused.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = download.local() / ROWS
    frame, repairs = _features(source, job.recipe.dataset_format == "alpaca")
    budget = job.recipe.max_refused_share
    findings = run_suite(
        pd.DataFrame(frame), RAW_ROWS, "sharegpt_rows", lambda rule: 1 - budget if rule.severity == "critical" else 0.0,
        job.out / DOCS,
    )  # fmt: skip
    reasons = {row: refusing for row, rules in findings.failed.items() if (refusing := _refusing(rules))}
    refused = [row for row, rules in reasons.items() if any(r.severity == "critical" for r in rules)]
    copies = len(reasons) - len(refused)
    good = [row for row in frame["row"] if row not in reasons]
    pq.write_table(pa.table({"row": pa.array(good, pa.int64())}), job.out / GOOD)
    _write_quarantine(source, reasons, frame["problem"], job.out / QUARANTINE)
    _judge(job, findings, reasons, frame, refused, good)
    repaired = sum(repairs.values())
    line = f"{len(good):,} good, {len(refused):,} refused, {copies:,} dropped as copies, {repaired:,} repaired"
    facts = {
        "rows": len(frame["row"]), "good": len(good), "refused": len(refused), "copies": copies, "repairs": repairs,
        "reasons": _count(reasons), "checks": findings.table,
    }  # fmt: skip
    return Result(line, facts)


def _features(source: Path, alpaca: bool) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """The features of all rows as columns, and how often each repair was made."""
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {}
    repairs: Counter[str] = Counter()
    groups = range(pq.ParquetFile(source).num_row_groups)
    for part, made in in_order(lambda index: _group_features(source, index, alpaca), groups):
        repairs += made
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    first_with: dict[str, int] = {}
    firsts = [
        first_with.setdefault(digest, row) if digest else row
        for row, digest in zip(columns["row"], columns["digest"], strict=True)
    ]
    columns["copy_of"] = [None if first == row else first for row, first in zip(columns["row"], firsts, strict=True)]
    return columns, dict(repairs)


def _group_features(source: Path, index: int, alpaca: bool) -> tuple[dict[str, list[Any]], Counter[str]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(source).read_row_group(index, use_threads=False)
    readings = [read(content, alpaca) for content in table["content"].to_pylist()]
    columns = {name: [reading.features[name] for reading in readings] for name in readings[0].features}
    return {"row": table["row"].to_pylist(), **columns}, Counter(r for reading in readings for r in reading.repairs)


def _refusing(rules: list[Rule]) -> list[Rule]:
    return [rule for rule in rules if rule.severity != "info"]


def _count(reasons: dict[int, list[Rule]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for rules in reasons.values():
        counts[rules[0].says] = counts.get(rules[0].says, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _write_quarantine(source: Path, reasons: dict[int, list[Rule]], problems: list[Any], target: Path) -> None:
    import pyarrow.parquet as pq

    with target.open("wb") as file:
        for batch in pq.ParquetFile(source).iter_batches():
            for row, content in zip(batch["row"].to_pylist(), batch["content"].to_pylist(), strict=True):
                if row in reasons:
                    says = [rule.says for rule in reasons[row]] + ([problems[row]] if problems[row] else [])
                    entry = {"row": row, "reasons": says, "content": content.decode("utf-8", "backslashreplace")}
                    file.write(orjson.dumps(entry) + b"\n")


def _judge(
    job: Job, findings: Findings, reasons: dict[int, list[Rule]], frame: dict[str, list[Any]], refused: list[int],
    good: list[int],
) -> None:  # fmt: skip
    """Raises BadData when the rows must not be trained on; the quarantine stays in the work folder."""
    rows, budget = len(frame["row"]), job.recipe.max_refused_share
    where = f"every refused row and its reason: {job.out / QUARANTINE}"
    uncheckable = [problem for problem in findings.broken if "could not be checked" in problem]
    if uncheckable:
        raise BadData(f"the dataset could not be checked: {uncheckable[0]}", "See the log")
    if good and len(refused) <= budget * rows:
        return
    often, count = next(iter(_count(reasons).items()))
    known = {frame["columns"][row] for row in refused[:100]} - {None}
    hint = ""
    if job.recipe.dataset_format != "alpaca" and any(
        {"instruction", "output"} <= set(columns.split(", ")) for columns in known
    ):
        hint = "; the rows look like Alpaca's: set dataset_format: alpaca"
    if not good:
        raise BadData(f"none of the {rows:,} rows is usable: most often {often} ({count:,}){hint}", where)
    raise BadData(
        f"{len(refused):,} of {rows:,} rows are refused ({len(refused) / rows:.1%}, allowed {budget:.1%}): most often "
        f"{often} ({count:,}){hint}",
        f"Correct the data or raise max_refused_share; {where}",
    )
