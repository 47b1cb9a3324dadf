"""The run page and the merged model's card, made from typed metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from include.evaluation.answer_checks import CHECKS
from include.evaluation.gate import judge
from include.pipeline.contracts import CONTRACTS, Answer, Contract, EvaluateOutput, LiveVersion, SmokeTestOutput
from include.reporting.model_card import also_tested_with, merged_card
from include.reporting.pages import page_templates, report_page
from include.reporting.plots import loss_plot
from tests.services.older_packages import REQUIREMENTS

BASE = [1.0 + 0.01 * i for i in range(12)]
LIVE = [0.5 + 0.01 * i for i in range(12)]


def summary(verdict: str, **fields: Any) -> dict[str, Any]:
    stage = {"state": "done", "seconds": 1.0, "reused": False, "folder": "here", "summary": "a summary"}
    whole = {
        "recipe": "small", "run": "one", "verdict": verdict, "version": None, "revision": None, "place": None,
        "error": None, "report": "here/report.html", "finished_at": "2026-11-23T09:30:00+00:00", "seconds": 2.0,
        "stages": {"smoke_test": stage, "evaluate": stage}, "sweep": [],
    }  # fmt: skip
    return whole | fields


def details(candidate: list[float], answer: str = "Mill Lane.", **failures: str) -> dict[str, Contract | None]:
    verdict = judge({"base": BASE, "candidate": candidate, "live": LIVE}, [], 0.95, 0.0, (candidate, candidate))
    live = LiveVersion(name="v7", revision="v7")
    checks: dict[str, bool | None] = {name: name not in failures for name in CHECKS}
    asked = Answer(
        prompt="Where?", system="Be brief.", expect=None, contains=None, expect_json=None, answer=answer,
        base="Who who", stopped=True, checks=checks, failures=failures,
    )  # fmt: skip
    made = {
        "smoke_test": SmokeTestOutput(answers=[asked], required=["stops"], failed=[], passed=1),
        "evaluate": EvaluateOutput(verdict=verdict, confidence=0.95, margin=0.0, holdout_rows=1200, live=live),
    }
    return {**dict.fromkeys(CONTRACTS), **made}


def test_a_refused_candidate_comes_with_the_reasons_as_sentences() -> None:
    page = report_page(summary("refused"), details([loss + 0.1 for loss in LIVE]))
    assert 'class="verdict refused"' in page
    assert "The live adapter was not replaced. Reasons against this candidate:" in page
    (reason,) = re.findall(r"<li>(.*)</li>", page)
    assert reason.startswith("Not better than the live adapter: loss 0.6550 against 0.5550 nats per token")
    assert reason.endswith("must be below +0.0000).")
    assert "live adapter (v7)" in page and "mean over 1,200 held-out conversations" in page


def test_a_published_candidate_comes_with_the_notes() -> None:
    page = report_page(
        summary("published", version="v8", place="file:///registry/v8"), details([loss - 0.1 for loss in LIVE])
    )
    assert "<b>v8</b> in <code>file:///registry/v8</code>" in page
    assert "The candidate passes the smoke test, and its holdout loss is measurably better." in page
    assert '<p class="note">The answers do not depend on the prompt: ' in page
    assert "Reasons against" not in page


def test_failed_checks_are_shown_by_whether_they_are_required() -> None:
    failures = {"stops": "no end-of-turn token after 8 tokens", "no_echo": "the answer repeats the prompt"}
    page = report_page(summary("refused"), details(BASE, **failures))
    assert '<p class="bad">stops: no end-of-turn token after 8 tokens</p>' in page
    assert '<p class="note">no_echo: the answer repeats the prompt</p>' in page
    assert "passes every check" not in page
    assert "passes every check" in report_page(summary("refused"), details(BASE))


def test_answers_of_models_are_text_in_the_page() -> None:
    page = report_page(summary("refused"), details(BASE, answer="<script>alert(1)</script>{{ 7 * 7 }}"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}" in page
    assert '<p class="soft">System message: Be brief.</p>' in page
    assert '<div class="answer">Who who</div>' in page, "long answers of the base are cut, too"
    assert "<script" not in page


def test_a_run_that_failed_in_its_first_stage_has_a_page() -> None:
    failed = {"state": "failed", "seconds": None, "reused": None, "folder": None, "summary": "there is no file x"}
    error = {"kind": "NotFound", "what": "there is no file x", "do": "Check dataset"}
    page = report_page(summary("failed", stages={"resolve": failed}, error=error), dict.fromkeys(CONTRACTS))
    assert "<b>there is no file x.</b>" in page and "<p>Check dataset.</p>" in page
    assert "May it go live?" not in page


def test_the_training_log_becomes_a_png() -> None:
    log = b"\n".join(orjson.dumps({"step": step, "loss": 2 / step}) for step in range(1, 30))
    assert loss_plot(log).startswith(b"\x89PNG")


def test_any_text_is_one_cell_of_a_markdown_table() -> None:
    cell = page_templates().filters["cell"]
    assert cell("a | <b>\n\n# c `d`") == "a \\| &lt;b&gt; \\# c \\`d\\`"
    assert cell("x" * 500) == "x" * 400 + " ..."


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [
        ("load_in_4bit", "The evaluation used\nthe 4-bit base; this model has the 16-bit base, so answers differ"),
        ("load_in_8bit", "The evaluation used\nthe 8-bit base; this model has the 16-bit base, so answers differ"),
        ("", "The evaluation used\nthe same base."),
    ],
)
def test_a_merged_models_card_says_which_base_was_evaluated(bits: str, sentence: str, tmp_path: Path) -> None:
    recipe = {"name": "small", "description": "", "registry": "hf://me/small", "load_in_4bit": False}
    manifest = {
        "recipe": {**recipe, "load_in_8bit": False} | ({bits: True} if bits else {}),
        "base": {"name": "org/base", "revision": "abc", "license": "mit"},
        "adapter": {"name": "v1", "repository": "me/small", "place": "https://hub/me/small"},
        "dtype": "bfloat16",
        "packages": {"transformers": "5.17.0", "peft": "0.21.2", "torch": "2.13.0"},
        "also_tested_with": also_tested_with(tmp_path),
    }
    card = merged_card(manifest, "0123")
    assert sentence in card
    assert "vllm serve me/small-merged" in card
    assert "Merged with transformers 5.17.0, PEFT 0.21.2 and torch 2.13.0." in card
    assert "load merged models with transformers 4.57.3, too" in card
    assert "[me/small](https://hub/me/small)" in card and "base_model: org/base" in card and "`0123`" in card


def test_a_card_claims_the_packages_that_the_tests_install(tmp_path: Path) -> None:
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    pinned = dict(line.split("==") for line in lines if line)
    claimed = also_tested_with(tmp_path)
    assert claimed and re.fullmatch(r"\d+\.\d+\.\d+", claimed.pop("retune"))
    assert claimed == {name: pinned[name] for name in claimed}
