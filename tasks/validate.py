"""validate: read and check every row before any GPU time is spent."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from include.base_model import fetch_base
from include.chat.template import ChatTemplate, renders_calls, renders_tools, template_source
from include.chat.tool_calls import call_fault, calls_template, tools_fault
from include.data.conversation import FAULTS, ParsedRow
from include.data.expectations import CALL_RULES, PAIRS, RAW_ROWS, TOOL_RULES, Suite, ValidationResult
from include.data.parallel import in_order
from include.data.profile import RowStatistics, profile
from include.data.sharegpt import parse_row, parse_rows
from include.data.tables import write_table
from include.errors import BadData
from include.pipeline.contracts import DownloadOutput, ValidateOutput
from include.pipeline.stage import Output, Result, StageContext, stage
from include.recipe import Recipe
from include.recipe.model import SHIPPED_TEMPLATES

SHOWN_UNUSED, KEPT_UNUSED = 10, 100  # names of columns and keys in the log, and in the metadata


def _template(context: StageContext) -> ChatTemplate:
    """Return the chat template, a shipped one without the tokenizer; it is used only to see what it can write."""
    recipe = context.recipe
    shipped = recipe.chat_template in SHIPPED_TEMPLATES
    folder = None if shipped else fetch_base(recipe, context.store, tokenizer_only=True)
    source = template_source(folder or Path(), recipe.chat_template, recipe.base_model)
    return calls_template(recipe.chat_template, source, folder, recipe.chat_template_kwargs)


def _tools_rendered(context: StageContext, **_: Output[DownloadOutput]) -> bool | str:
    """Return whether the template writes tools; its digest if it writes tool calls, which each row is tried on."""
    source = _template(context).source
    return hashlib.sha256(source.encode()).hexdigest() if renders_calls(source) else renders_tools(source)


@stage(
    version=12,
    recipe_fields=("method", "dataset_format", "merge_turns", "reasoning", "max_refused_share", "check_limits"),
    other_fields=(
        "chat_template",
        "chat_template_kwargs",
        "base_model",
        "base_revision",
    ),  # covered by `_tools_rendered`
    external_inputs=_tools_rendered,
)
def validate(context: StageContext, download: Output[DownloadOutput]) -> Result[ValidateOutput]:
    """Read the raw rows and check them with Great Expectations.

    Write `readings/` (one Arrow file per row group: `row`, `digest`, and the conversation's columns, see
    `include.data.sharegpt`), `good.parquet` (the numbers of the usable rows), `quarantine.jsonl` and `repaired.jsonl`
    (every refused and every repaired row with its number, the reasons and its content) and `data_docs/` (the suite's
    results as pages).

    Raises:
        BadData: no row is usable, or more rows are refused than `max_refused_share` or `check_limits` allow.
    """
    template = _template(context)
    tools, calls = renders_tools(template.source), renders_calls(template.source)
    pairs = context.recipe.method == "dpo"
    skipped = {*(TOOL_RULES if tools else ()), *(CALL_RULES if calls else ())}
    rules = [rule for rule in (*RAW_ROWS, *(PAIRS if pairs else ())) if rule.column not in skipped]
    source = download.local() / DownloadOutput.ROWS
    (context.out / ValidateOutput.READINGS).mkdir(exist_ok=True)
    with Suite(
        "preference_rows" if pairs else "sharegpt_rows",
        rules,
        context.recipe.check_limits,
        context.out / ValidateOutput.DOCS,
    ) as suite:
        import numpy as np
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        groups = range(pq.ParquetFile(source).num_row_groups)
        tried = template if calls else None
        parts = list(in_order(lambda index: _read_group(source, index, context.out, context.recipe, tried), groups))
        counts = {name: np.concatenate([part.counts[name] for part in parts]) for name in parts[0].counts}
        critical = [rule.column for rule in rules if rule.severity == "critical"]
        faulty = np.logical_or.reduce([counts[name] > 0 for name in critical])
        digests = np.where(faulty, 0, np.concatenate([part.digests for part in parts]))
        originals = _originals(digests, download.metadata.eval_rows)
        counts["copy"] = (originals >= 0).astype(np.int32)
        findings = suite.validate(pd.DataFrame(counts))
    refused = np.zeros(len(originals), bool)
    for name in critical:
        refused[findings.failed_rows[name]] = True
    good = ~refused & (originals < 0)
    pq.write_table(pa.table({"row": np.flatnonzero(good)}), context.out / ValidateOutput.GOOD)
    unused = _unused(context, parts)
    verdicts = _RowReports(source, findings, parts, originals, refused, good)
    reasons = verdicts.write(context.out)
    verdicts.judge(context, reasons)
    repairs: Counter[str] = Counter(repair for part in parts for made in part.repairs.values() for repair in made)
    copies = int((originals >= 0).sum())
    summary = (
        f"{good.sum():,} good, {refused.sum():,} refused, {copies:,} dropped as copies, "
        f"{sum(len(part.repairs) for part in parts):,} repaired"
    )
    metadata = ValidateOutput.model_validate({
        "rows": len(good), "good": int(good.sum()), "refused": int(refused.sum()), "copies": copies,
        "repairs": dict(repairs), "reasons": reasons, "unused": unused, "checks": findings.checks,
        "docs": f"{ValidateOutput.DOCS}/{findings.page}", "tools_rendered": tools,
        "profile": profile([part.facts for part in parts], good, originals, verdicts.opening),
    })  # fmt: skip
    return Result(summary, metadata)


def _unused(context: StageContext, parts: list[_Part]) -> dict[str, int]:
    """Log which columns and keys are not used, and return how often each occurs, most frequent first."""
    counts = sum((part.unused for part in parts), Counter())
    names = sorted(counts, key=lambda name: (-counts[name], name))
    if names:
        shown = ", ".join(f"{name} ({counts[name]:,})" for name in names[:SHOWN_UNUSED])
        more = f", and {len(names) - SHOWN_UNUSED:,} more" if len(names) > SHOWN_UNUSED else ""
        context.progress(f"not used: {shown}{more}")
    rest = sum(counts[name] for name in names[KEPT_UNUSED:])
    return {name: counts[name] for name in names[:KEPT_UNUSED]} | ({"all others": rest} if rest else {})


@dataclass
class _Part:
    """One row group as it was read.

    Attributes:
        counts: `row`, and for each of `FAULTS` its count in each row (int32, one per row).
        digests: the first 8 bytes of each conversation's digest (uint64); 0 where there is none.
        repairs, problems: by row, of those that have some (see `sharegpt.ParsedRow`).
        columns: column names of the first unreadable rows, for hints.
        facts: numbers for the profile.
        unused: how often each column and key occurs that is not used.
    """

    counts: dict[str, Any]
    digests: Any
    repairs: dict[int, list[str]]
    problems: dict[int, str]
    columns: list[tuple[str, ...]]
    facts: RowStatistics
    unused: Counter[str]


def _read_group(source: Path, index: int, out: Path, recipe: Recipe, template: ChatTemplate | None) -> _Part:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(source).read_row_group(index, use_threads=False)
    rows = table["row"].to_pylist()
    alpaca, pairs = recipe.dataset_format == "alpaca", recipe.method == "dpo"
    readings, columns = parse_rows(table["content"].to_pylist(), alpaca, recipe.merge_turns, pairs, recipe.reasoning)
    if template:
        _try_calls(template, readings)
    digests = [b"" if reading.faults["unreadable"] else reading.conversation.digest for reading in readings]
    write_table(
        pa.table({"row": table["row"], "digest": pa.array(digests, pa.binary()), **columns}),
        out / ValidateOutput.READINGS / f"{index:05d}.arrow",
    )
    counts = np.array([[*reading.faults.values()] for reading in readings], np.int32).reshape(-1, len(FAULTS))
    return _Part(
        {"row": table["row"].to_numpy(), **{name: counts[:, i] for i, name in enumerate(FAULTS)}},
        np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64),
        {row: reading.repairs for row, reading in zip(rows, readings, strict=True) if reading.repairs},
        {row: reading.detail for row, reading in zip(rows, readings, strict=True) if reading.detail},
        [reading.columns for reading in readings if reading.columns][:100],
        RowStatistics.of([reading.conversation for reading in readings]),
        Counter(name for reading in readings for name in reading.unused),
    )


def _try_calls(template: ChatTemplate, readings: list[ParsedRow]) -> None:
    """Count the rows whose tools or tool calls the chat template cannot write."""
    for reading in readings:
        if fault := tools_fault(template, reading.conversation):
            reading.add_fault("bad_tool_lists", fault)
        sound = reading.conversation.calls and not (reading.faults["order_errors"] or reading.faults["unknown_roles"])
        if sound and (fault := call_fault(template, reading.conversation)):
            reading.add_fault("bad_tool_calls", fault)


def _originals(digests: Any, eval_rows: int) -> Any:
    """Return for each row the first row with the same digest (int64); -1 for the first row itself and for digest 0.

    The last rows, which are evaluated on, count as first: a training row that equals one of them is its copy.
    """
    import numpy as np

    order = np.roll(np.arange(len(digests)), eval_rows)
    _, first, inverse = np.unique(digests[order], return_index=True, return_inverse=True)
    found = np.empty(len(digests), np.int64)
    found[order] = order[first[inverse]]
    return np.where((found == np.arange(len(digests))) | (digests == 0), -1, found)


class _RowReports:
    """Reports for people: which rows are refused or repaired, and why."""

    def __init__(
        self, source: Path, findings: ValidationResult, parts: list[_Part], originals: Any, refused: Any, good: Any
    ):
        self._source, self._findings, self._parts = source, findings, parts
        self._originals, self._refused, self._good = originals, refused, good
        self._problems = {row: problem for part in parts for row, problem in part.problems.items()}

    def write(self, out: Path) -> dict[str, int]:
        """Write the quarantine and the list of repaired rows; return the number of rows by their first reason."""
        import numpy as np
        import pyarrow.parquet as pq

        repairs = {row: made for part in self._parts for row, made in part.repairs.items()}
        reasons_by_row: dict[int, list[str]] = {}
        for entry in self._findings.checks:
            if entry["severity"] != "info":
                for row in self._findings.failed_rows[entry["check"]].tolist():
                    reasons_by_row.setdefault(row, []).append(entry["message"])
        counts = Counter(reasons[0] for reasons in reasons_by_row.values())
        file, begin = pq.ParquetFile(self._source), 0
        wanted = np.zeros(len(self._good), bool)
        wanted[[*reasons_by_row, *repairs]] = True
        with (
            (out / ValidateOutput.QUARANTINE).open("wb") as refused,
            (out / ValidateOutput.REPAIRED).open("wb") as repaired,
        ):
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if wanted[begin:end].any():
                    content = file.read_row_group(group, ["content"], use_threads=False)["content"]
                    for row in (begin + np.flatnonzero(wanted[begin:end])).tolist():
                        text = content[row - begin].as_py().decode("utf-8", "backslashreplace")
                        if row in reasons_by_row:
                            why = [*reasons_by_row[row], *([self._problems[row]] if row in self._problems else [])]
                            copy_of = {"copy_of": int(self._originals[row])} if self._originals[row] >= 0 else {}
                            entry = {"row": row, "reasons": why, **copy_of, "content": text}
                            refused.write(orjson.dumps(entry) + b"\n")
                        elif row in repairs:
                            entry = {"row": row, "repairs": repairs[row], "content": text}
                            repaired.write(orjson.dumps(entry) + b"\n")
                begin = end
        return dict(counts.most_common())

    def judge(self, context: StageContext, reasons: dict[str, int]) -> None:
        """Raise BadData if too many rows are refused. The quarantine stays in the work folder."""
        rows, refused, budget = len(self._good), int(self._refused.sum()), context.recipe.max_refused_share
        where = f"every refused row and its reason: {context.out / ValidateOutput.QUARANTINE}"
        hint = ""
        columns = [set(names) for part in self._parts for names in part.columns]
        if context.recipe.dataset_format != "alpaca" and any({"instruction", "output"} <= names for names in columns):
            hint = "; the rows look like Alpaca's: set dataset_format: alpaca"
        if any({"chosen", "rejected"} <= names for names in columns):
            hint = "; the rows look like preference pairs: set method: dpo"
        often, count = next(iter(reasons.items()), ("", 0))
        if not self._good.any():
            raise BadData(f"none of the {rows:,} rows is usable: most often {often} ({count:,}){hint}", where)
        if self._findings.errors:
            raise BadData(self._findings.errors[0], f"Correct the data, or change check_limits in the recipe; {where}")
        if refused > budget * rows:
            raise BadData(
                f"{refused:,} of {rows:,} rows are refused ({refused / rows:.1%}, allowed {budget:.1%}): most often "
                f"{often} ({count:,}){hint}",
                f"Correct the data or raise max_refused_share; {where}",
            )

    def opening(self, row: int) -> str:
        """Return the first 120 characters of a row's first turn, for the profile."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self._source)
        for group in range(file.num_row_groups):
            if row < (size := file.metadata.row_group(group).num_rows):
                content = file.read_row_group(group, ["content"], use_threads=False)["content"][row].as_py()
                found = parse_row(content).conversation.contents
                return (found[0] if found else content.decode("utf-8", "replace"))[:120]
            row -= size
        return ""
