"""What people read about a run: the loss picture, the model card and the run's page, all made from recorded facts."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from include.data.sources import is_hub_id
from include.paths import PROJECT
from include.pipeline.contracts import Contract, EvaluateOutput, SmokeTestOutput
from include.recipe import Recipe
from include.reporting.plots import loss_plot

ANSWERS_SHOWN = 12  # in the question whether a candidate may go live; those with something against them first


def _cell(text: str, most: int = 400) -> str:
    """Any text as the plain text of a cell of a Markdown table: what a model says may look like markup."""
    short = " ".join(text.split())
    short = short if len(short) <= most else short[:most] + " ..."
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(short, quote=False))


def page_templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PROJECT / "include" / "reporting" / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["cell"] = _cell
    environment.tests["hub_id"] = is_hub_id
    return environment


def approval_page(
    recipe: Recipe, smoke_test: SmokeTestOutput, evaluate: EvaluateOutput, regressions: list[str], report_address: str,
    training_inputs: str,
) -> str:  # fmt: skip
    """What a person must know to approve a candidate, as Markdown.

    Args:
        smoke_test, evaluate: the facts of these stages.
        regressions: see `tasks.approve`.
        training_inputs: the candidate's data and base, in a line.
    """
    answers = sorted(smoke_test.answers, key=lambda answer: not answer.failures)[:ANSWERS_SHOWN]
    return page_templates().get_template("approval.md").render(
        recipe=recipe, smoke_test=smoke_test, evaluate=evaluate, regressions=regressions, answers=answers,
        report_address=report_address, training_inputs=training_inputs,
    )  # fmt: skip


def run_page(summary: dict[str, Any], details: Mapping[str, Contract | None], training_log: bytes | None = None) -> str:
    """One self-contained HTML page about a run.

    Args:
        summary: what `var/last_run.json` holds.
        details: the metadata of each stage; None for a stage that did not finish.
        training_log: the content of the training's log.
    """
    picture = base64.b64encode(loss_plot(training_log)).decode() if training_log else None
    return page_templates().get_template("run.html").render(run=summary, details=details, picture=picture)
