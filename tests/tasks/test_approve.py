"""When a person is asked before a candidate is published, and what becomes of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from include.engine.device_plan import Plan
from include.errors import ApprovalTimeout, Conflict, PermanentError, Rejected
from include.evaluation.gate import judge
from include.pipeline.contracts import ApproveOutput, EvaluateOutput, LiveVersion, SmokeTestOutput, TrainOutput
from include.recipe import validate_recipe
from include.reporting.pages import approval_page
from include.storage.artifacts import Store
from include.storage.files import to_json
from tasks.approve import Answer, approve, ask, refuse_if_approval_needed, regressions
from tasks.report import report
from tests.conftest import unlock

MONDAY = datetime(2026, 11, 23, 9, 30, tzinfo=UTC)
WORSE = [0.012 + 0.001 * i for i in range(12)]


PLAN = Plan(
    device="cpu", device_name="CPU", dtype="float32", engine="transformers", optim="adamw_torch",
    gradient_checkpointing=False, micro_batch=2, accumulation=4,
)  # fmt: skip
TRAINED = TrainOutput(
    plan=PLAN, steps=8, resumed_from=None,
    seconds=1.0, tokens_per_second=100.0, tokens=100, first_losses=2.0, last_losses=1.0, trainable_parameters=10,
    peak_memory_bytes=2**30, out_of_memory=[],
)  # fmt: skip


def answers(required: tuple[str, ...] = (), second: dict[str, str] | None = None, **failures: str) -> SmokeTestOutput:
    answer: dict[str, Any] = {
        "prompt": "Who?", "system": None, "expect": None, "contains": None, "expect_json": None, "answer": "Alma.",
        "base": "Who who", "stopped": True, "checks": {}, "failures": failures,
    }  # fmt: skip
    good = {**answer, "prompt": "Where?", "failures": {}}
    return SmokeTestOutput(answers=[good, answer | (second or {})], required=list(required), failed=[], passed=2)


def measured(
    candidate: list[float] = [0.0] * 12, live: list[float] | None = [0.01] * 12, margin: float = 0.0, **more: Any
) -> EvaluateOutput:
    losses = {"base": [1.0 + 0.01 * i for i in range(12)], "candidate": candidate} | ({"live": live} if live else {})
    verdict = judge(losses, [], 0.95, margin, **more)
    assert verdict.publish, "only what the gate lets through is asked about"
    compared = LiveVersion(name="v1", revision="v1") if live else None
    return EvaluateOutput(verdict=verdict, confidence=0.95, margin=margin, holdout_rows=12, live=compared)


def test_one_that_is_better_in_everything_has_no_regression() -> None:
    assert regressions(answers(), measured()) == []
    assert regressions(answers(), measured(live=None)) == []
    assert regressions(answers(required=("stops",), stops="it goes on"), measured()) == [], "that is the gate's matter"


def test_each_regression_is_a_sentence() -> None:
    (loss,) = regressions(answers(), measured(WORSE, margin=0.1))
    assert loss.startswith("its loss is above that of v1, which is live: 0.0175 against 0.0100 (difference +0.0")
    assert loss.endswith("allowed below +0.1000)")
    assert regressions(answers(stops="no end-of-turn token after 8 tokens"), measured()) == [
        "1 of 2 answers fail stops, which is not required: no end-of-turn token after 8 tokens"
    ]
    noted = measured(prompt_control=([0.1] * 12, [0.1] * 12))
    assert regressions(answers(), noted) == noted.verdict.notes != []


def test_what_models_say_is_text_in_the_question() -> None:
    second = {"answer": "| [click](http://x) <img src=x> {{ 7 * 7 }} `code`\n\n# Head", "base": "b " * 400}
    said = answers(second=second, as_expected="no match for x in '<b>|'")
    recipe = validate_recipe({"name": "small", "registry": "hf://me/adapter"}, "here")
    page = approval_page(
        recipe, said, measured(WORSE, margin=0.1), ["the *loss*"], "/retune/report/small/1", "rows@1, base@2"
    )
    lines = page.splitlines()
    assert "- the \\*loss\\*" in lines
    assert "| **candidate** | **0.0175** | | |" in lines
    assert any(line.startswith("| base model | 1.0550 | -1.0375 | -1.0") for line in lines)
    assert any(line.startswith("| live adapter, v1 | 0.0100 | +0.0075 | +0.0") for line in lines)
    assert "[Open the report](/retune/report/small/1)" in page
    row = next(line for line in lines if "click" in line)
    assert row.count("|") - row.count("\\|") == 5, "four cells"
    assert "\\[click\\](http://x) &lt;img src=x&gt; {{ 7 \\* 7 }} \\`code\\` \\# Head" in row
    assert row.endswith("| as\\_expected |")
    assert len(row) < 400
    assert "to me/adapter and makes it live" in page


@pytest.mark.parametrize("mode", ["always", "on_regression"])
def test_a_run_that_nobody_can_be_asked_in_says_what_to_do(mode: str) -> None:
    refuse_if_approval_needed(validate_recipe({"name": "small"}, "here"))
    with pytest.raises(PermanentError, match=rf"small says approve: {mode}.*make up.* --set approve=never"):
        refuse_if_approval_needed(validate_recipe({"name": "small", "approve": mode}, "here"))


@pytest.fixture
def judged(var: Path, write_recipe: Callable) -> Callable[..., dict[str, str]]:
    """The lineage of a run up to `evaluate`, whose stages left these facts."""

    def leave(evaluate: EvaluateOutput, smoke_test: SmokeTestOutput, **fields: Any) -> dict[str, str]:
        write_recipe(**fields)
        store = Store()
        registry = f"file://{var}/registry/small"
        pinned = validate_recipe({"name": "small", "registry": registry, **fields}, "here").model_dump(mode="json")
        facts = {
            "resolve": {},
            "train": TRAINED.to_json(),
            "smoke_test": smoke_test.to_json(),
            "evaluate": evaluate.to_json(),
        }
        for stage in facts:
            out = var / "work" / stage
            out.mkdir(parents=True)
            (out / "recipe.json").write_bytes(to_json(pinned))
            store.commit(out, "small", stage, stage, summary=stage, metadata=facts[stage], seconds=1.0)
            record = {
                "stage": stage,
                "state": "done",
                "summary": stage,
                "seconds": 1.0,
                "fingerprint": stage,
                "from_recipe_file": True,
            }
            store.write_record("small", "one", stage, {**record, "folder": "here"})
        return {"recipe": "small", "run": "one"} | {stage: stage for stage in facts}

    return leave


def test_the_question_and_the_answers(var: Path, judged: Callable, artifact: Callable) -> None:
    noted = measured(prompt_control=([0.1] * 12, [0.1] * 12))
    lineage = judged(noted, answers(), approve="on_regression", approve_within_hours=2)
    question = ask(lineage, "/retune/report/small/one")
    assert question and (question.subject, question.hours) == ("May this candidate of small go live? evaluate", 2)
    assert "the answers do not depend on the prompt" in question.body
    page = (Store().run_folder("small", "one") / "report.html").read_text()
    assert 'class="verdict waiting"' in page and "A person's approval: waiting for an answer until" in page
    assert not (var / "last_run.json").exists(), "it is for runs that have ended"

    with pytest.raises(ApprovalTimeout, match=r"^small says approve: on_regression, and"):
        approve(lineage)
    with pytest.raises(ApprovalTimeout, match=r"^nobody answered within 2 h\. Nothing is published"):
        approve(lineage, Answer(False, None, MONDAY))
    assert report("small", "one")["verdict"] == "failed"
    with pytest.raises(Rejected, match=r"^rejected by Ada at 2026-11-23 09:30 UTC\."):
        approve(lineage, Answer(False, "Ada", MONDAY))
    assert report("small", "one")["verdict"] == "rejected"
    facts = artifact(approve(lineage, Answer(True, "Ada", MONDAY))).metadata
    assert (facts.asked, facts.by, facts.at) == (True, "Ada", "2026-11-23T09:30:00+00:00")
    assert facts.regressions == noted.verdict.notes


def test_another_question_in_the_same_run_is_refused(var: Path, judged: Callable) -> None:
    lineage = judged(measured(), answers(), approve="always")
    question = ask(lineage, "")
    assert ask(lineage, "") == question, "cleared, the same is asked again"
    with pytest.raises(Rejected):
        approve(lineage, Answer(False, "Ada", MONDAY))
    assert ask(lineage, "") == question
    manifest = var / "store" / "small" / "evaluate" / "evaluate" / "manifest.json"
    unlock(manifest)
    manifest.write_bytes(to_json({**json.loads(manifest.read_text()), "metadata": measured(live=None).to_json()}))
    with pytest.raises(Conflict, match="the approval question has changed .* Start a new run"):
        ask(lineage, "")


def test_a_run_that_was_stopped_while_it_waited_has_failed(judged: Callable) -> None:
    ask(judged(measured(), answers(), approve="always"), "")
    assert report("small", "one")["verdict"] == "failed"


@pytest.mark.parametrize(
    ("mode", "refused", "why"),
    [
        ("never", False, "the recipe asks for no approval"),
        ("always", True, "the gate refused the candidate"),
        ("on_regression", False, "nothing regressed"),
    ],
)
def test_where_nobody_is_asked_the_trail_goes_on(
    mode: str, refused: bool, why: str, judged: Callable, artifact: Callable
) -> None:
    facts = measured()
    facts.verdict.publish = not refused
    lineage = judged(facts, answers(), approve=mode)
    assert ask(lineage, "") is None
    assert artifact(approve(lineage)).metadata == ApproveOutput(asked=False, regressions=[], summary=f"skipped: {why}")
