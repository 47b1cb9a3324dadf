"""Data checks, as Great Expectations suites over a table with one row of fault counts per conversation.

Great Expectations gets counts, never texts, so that twenty expectations over 100,000 rows take less than a second.
The message of each rule appears in the log, the quarantine, the Data Docs and the report.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from include.data.parallel import forked, no_collection
from include.data.turns import LONG_TURN

if TYPE_CHECKING:
    import pandas as pd

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True)
class Rule:
    """One expectation: a column of fault counts is zero in every row.

    Attributes:
        column: column of the frame; also the name of the check in the recipe (`check_limits`) and in the report.
        message: what is wrong with a row that fails.
        severity: `critical`: the row is refused and counts against `max_refused_share`; `warning`: the row is dropped
            and does not count; `info`: the row is only counted.
        limit: share of rows that may fail before the run fails. None: no limit.
    """

    column: str
    message: str
    severity: Severity = "critical"
    limit: float | None = None


RAW_ROWS = (
    Rule("unreadable", "the row cannot be read as a conversation"),
    Rule("no_turns", "the conversation is empty"),
    Rule("malformed_turns", "a turn is not an object with a speaker and a text"),
    Rule("unknown_roles", "a turn has an unknown role"),
    Rule("tool_turns", "a turn has a tool role, which the chat template does not render"),
    Rule("tool_lists", "the row lists tools, which the chat template does not render"),
    Rule("bad_tool_lists", "the tools are not one list of objects, or the chat template cannot render them"),
    Rule("tool_calls", "a turn calls tools, which the chat template does not render"),
    Rule("bad_tool_calls", "the chat template cannot render the tool calls of a turn"),
    Rule("media", "the row has an image, audio or video; only texts can be trained on"),
    Rule("labels", "label says whether the answer was liked; set a method that takes it, or remove the column"),
    Rule("row_weights", "the row has a weight of its own, which training does not follow; remove the column"),
    Rule("reasoning", "the row has reasoning that cannot be used, or `reasoning` is refuse"),
    Rule("system_conflicts", "the row has two different system texts"),
    Rule("bad_history", "the history column is not a list of pairs of a question and an answer"),
    Rule("non_text_values", "a turn's value is missing or is not a text"),
    Rule("empty_values", "a turn's text is empty"),
    Rule("bad_train_flags", "a turn's train, training, loss or weight cannot be followed"),
    Rule("all_masked", "every answer is masked (train: false or weight: 0), so that there is nothing to learn"),
    Rule("no_assistant", "no assistant turn to learn from"),
    Rule("first_speaker", "the first turn is neither the system's nor the user's"),
    Rule("last_speaker", "the last turn is not the assistant's"),
    Rule("order_errors", "the turns do not alternate as [system] user assistant user assistant ..."),
    Rule("copy", "an exact copy of another row, which is used", "warning"),
    Rule("special_token_text", "the text looks like a special token (see special_tokens_in_text)", "info"),
    Rule("broken_characters", "the text has replacement characters (U+FFFD), which come from wrong decoding", "info"),
    Rule("control_characters", "the text has control characters", "info"),
    Rule("long_turns", f"a turn has more than {LONG_TURN:,} characters", "info"),
    Rule("masked_turns", "an answer is masked (train: false or weight: 0); it is context only", "info"),
    Rule("reasoning_turns", "an answer has reasoning, which is trained with it", "info"),
    Rule("unknown_keys", "a turn has keys that are not used", "info"),
    Rule("unused_columns", "the row has columns that are not used", "info"),
)
PAIRS = (  # in addition, for preference rows
    Rule("unpaired_answers", "chosen and rejected are not one answer each to the same prompt"),
    Rule("same_answers", "the chosen and the rejected answer are the same"),
)
TOOL_RULES = ("tool_turns", "tool_lists")  # they apply only if the chat template does not render tools
CALL_RULES = ("tool_calls",)  # they apply only if the chat template does not render tool calls

PREPARED_ROWS = (
    Rule("tokens_over", "the conversation is longer than max_seq_length: on_too_long decides", "warning"),
    Rule("untrained", "no token is trained on", limit=0),
    Rule(
        "bos_errors",
        "beginning-of-text tokens are not as the template writes them (one at the start, or none)",
        limit=0,
    ),
    Rule("unended_turns", "an assistant turn does not end with a trained end-of-turn token", limit=0),
    Rule("mask_errors", "the trained spans are not exactly the assistant turns", limit=0),
    Rule("kept_over", "the part of the conversation that is kept is longer than max_seq_length", limit=0),
    Rule("cut", "the conversation is truncated, but on_too_long is not truncate", limit=0),
)
FOR_OTHER_SOURCES = ("sqlalchemy", "boto3", "botocore")  # Great Expectations works without these, too
DATA_CHECKS = tuple(rule.column for rule in (*RAW_ROWS, *PAIRS, *PREPARED_ROWS))


@dataclass
class ValidationResult:
    """The result of a suite.

    Attributes:
        failed_rows: for each rule's column, the row numbers that fail (int64).
        checks: one entry per rule, for the report: `check`, `message`, `severity`, `rows` (number that fail), `limit`,
            `passed`.
        page: path of the results' page, relative to the Data Docs folder.
        errors: one sentence for each rule that more rows fail than its limit allows, or that could not be evaluated.
    """

    failed_rows: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    page: str = ""
    errors: list[str] = field(default_factory=list)


class Suite:
    """A Great Expectations suite in a separate process, so that its import runs while other work is done.

    Args:
        name: name of the suite in the Data Docs.
        rules: the expectations.
        limits: `Rule.limit` by column; overrides the limit of the rule.
        docs: folder for the Data Docs.
    """

    def __init__(self, name: str, rules: Iterable[Rule], limits: Mapping[str, float], docs: Path):
        self._name, self._docs = name, docs
        self._rules = tuple(replace(rule, limit=limits.get(rule.column, rule.limit)) for rule in rules)
        self._process = forked(1)
        self._process.submit(_import_great_expectations)

    def __enter__(self) -> Suite:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(wait=False, cancel_futures=True)

    def validate(self, frame: pd.DataFrame) -> ValidationResult:
        """Evaluate the rules and write the Data Docs.

        Args:
            frame: a column `row` (row number), and for each rule its column of fault counts.
        """
        return self._process.submit(_validate, frame, self._rules, self._name, self._docs).result()


class _Later(ModuleType):
    """A module that is imported when something of it is first used."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _import_great_expectations() -> None:
    """Import Great Expectations without two thirds of what it imports, which expectations on a frame never use."""
    for name in ("scipy.stats", "altair"):
        sys.modules.setdefault(name, _Later(name))
    if not any(name in sys.modules for name in FOR_OTHER_SOURCES):
        sys.modules.update(dict.fromkeys(FOR_OTHER_SOURCES))  # type: ignore[arg-type]  # None: as if not installed
    with no_collection():
        import great_expectations  # noqa: F401

    gc.freeze()


def _validate(frame: pd.DataFrame, rules: tuple[Rule, ...], name: str, docs: Path) -> ValidationResult:
    import great_expectations as gx
    from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    site = {
        "class_name": "SiteBuilder",
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    context = gx.get_context(  # type: ignore[call-overload]
        mode="ephemeral",
        project_config=DataContextConfig(
            data_docs_sites={"local": site},
            progress_bars={"globally": False, "metric_calculations": False},  # type: ignore[arg-type]
            store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        ),
    )
    suite = gx.ExpectationSuite(name=name)
    for rule in rules:
        suite.add_expectation(
            gx.expectations.ExpectColumnValuesToBeBetween(
                column=rule.column,
                max_value=0,
                mostly=1 - (1 if rule.limit is None else rule.limit),
                severity=rule.severity,  # type: ignore[arg-type]
                description=f"In no row: {rule.message} ({rule.severity}).",
            )
        )
    batch = (
        context.data_sources.add_pandas("rows").add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
    )
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=name, data=batch, suite=context.suites.add(suite))
    )
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=name,
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["local"])],
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": ["row"],
                "exclude_unexpected_values": True,
                "partial_unexpected_count": 10,
            },
        )
    )
    checkpoint_result = checkpoint.run(batch_parameters={"dataframe": frame})
    (suite_result,) = checkpoint_result.run_results.values()
    result = _summarize(rules, suite_result.results)
    (page,) = (docs / "validations").rglob("*.html")
    result.page = page.relative_to(docs).as_posix()
    return result


def _summarize(rules: tuple[Rule, ...], results: list[Any]) -> ValidationResult:
    import numpy as np

    summary = ValidationResult()
    by_column = {result.expectation_config.kwargs["column"]: result for result in results}
    for rule in rules:
        result = by_column[rule.column]
        entries = [np.atleast_1d(entry["row"]) for entry in result.result.get("unexpected_index_list") or ()]
        rows = summary.failed_rows[rule.column] = np.concatenate([np.zeros(0, np.int64), *entries]).astype(np.int64)
        exceptions = [e["exception_message"] for e in _exceptions(result.exception_info) if e.get("raised_exception")]
        summary.checks.append(
            {"check": rule.column, "message": rule.message, "severity": rule.severity, "rows": len(rows),
             "limit": rule.limit, "passed": bool(result.success)}
        )  # fmt: skip
        if exceptions:
            summary.errors.append(f"the check '{rule.column}' could not be evaluated: {exceptions[0]}")
        elif not result.success:
            summary.errors.append(
                f"{rule.message} ({len(rows):,} rows, the first is row {rows[0]}; check_limits allows '{rule.column}' "
                f"{rule.limit:.1%})"
            )
    return summary


def _exceptions(info: dict[str, Any]) -> list[dict[str, Any]]:
    return [info] if "raised_exception" in info else list(info.values())
