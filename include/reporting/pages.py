"""The run page and the approval page, and the Jinja environment of all templates."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from include.data.sources import is_hub_id, short_name
from include.paths import PROJECT
from include.pipeline.contracts import Contract, EvaluateOutput, SmokeTestOutput
from include.recipe import Recipe
from include.recipe.model import template_name
from include.reporting.plots import loss_plot

MAX_ANSWERS = 12  # answers on the approval page; answers with failed checks come first


def _cell(text: str, max_chars: int = 400) -> str:
    """Escape and shorten any text for a cell of a Markdown table. Answers of models may look like markup."""
    short = " ".join(text.split())
    short = short if len(short) <= max_chars else short[:max_chars] + " ..."
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(short, quote=False))


def _sentence(text: str) -> str:
    """Return a reason or note as a sentence with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('. ')}."


def page_templates() -> Environment:
    """Return the Jinja environment of `templates/`. It escapes HTML, and an undefined name is an error.

    Filters: `thousands` (1,234), `cell` (any text as a Markdown table cell), `sentence`, `short_name` (of a
    dataset), `template_name` (of a recipe's `chat_template`). Test: `hub_id`.
    """
    environment = Environment(
        loader=FileSystemLoader(PROJECT / "include" / "reporting" / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["cell"] = _cell
    environment.filters["sentence"] = _sentence
    environment.filters["short_name"] = short_name
    environment.filters["template_name"] = template_name
    environment.tests["hub_id"] = is_hub_id
    return environment


def approval_page(
    recipe: Recipe, smoke_test: SmokeTestOutput, evaluate: EvaluateOutput, regressions: list[str], report_address: str,
    training_inputs: str,
) -> str:  # fmt: skip
    """Return the Markdown of Airflow's approval page: what a person must know to approve a candidate.

    Args:
        smoke_test, evaluate: metadata of these stages.
        regressions: sentences of `tasks.approve.regressions`.
        report_address: address of the run page.
        training_inputs: dataset and base with their revisions, in one line.
    """
    answers = sorted(smoke_test.answers, key=lambda answer: not answer.failures)[:MAX_ANSWERS]
    return page_templates().get_template("approval.md").render(
        recipe=recipe, smoke_test=smoke_test, evaluate=evaluate, regressions=regressions, answers=answers,
        report_address=report_address, training_inputs=training_inputs,
    )  # fmt: skip


def report_page(
    summary: dict[str, Any], details: Mapping[str, Contract | None], training_log: bytes | None = None
) -> str:
    """Return one self-contained HTML page about a run.

    Args:
        summary: content of `var/last_run.json`.
        details: the metadata of each stage; None for a stage that did not finish.
        training_log: content of `training_log.jsonl`; None if there was no training.
    """
    picture = base64.b64encode(loss_plot(training_log)).decode() if training_log else None
    return page_templates().get_template("report.html").render(run=summary, details=details, picture=picture)
