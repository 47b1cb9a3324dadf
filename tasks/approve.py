"""approve: whether a person must agree before a candidate goes live, what that person is shown, and the answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from include.errors import ApprovalTimeout, Conflict, PermanentError, Rejected
from include.paths import var
from include.pipeline.contracts import ApproveOutput, EvaluateOutput, SmokeTestOutput, TrainOutput
from include.pipeline.records import Lineage, Record, log, recorded
from include.pipeline.stage import Output, output_of, pinned_recipe
from include.recipe import Recipe
from include.registry import open_registry
from include.reporting.pages import approval_page
from include.storage.artifacts import Store
from include.storage.files import fingerprint
from tasks.evaluate import candidate_content
from tasks.report import report


@dataclass(frozen=True)
class Question:
    """What a person is asked: a headline, the numbers as Markdown, and how many hours there are for an answer."""

    subject: str
    body: str
    hours: float


@dataclass(frozen=True)
class Answer:
    """A person's answer: whether the candidate may go live, who says so (None: nobody did in time) and when (UTC)."""

    approved: bool
    by: str | None
    at: datetime


@dataclass
class _Case:
    """What a decision is about."""

    recipe: Recipe
    train: Output[TrainOutput]
    smoke_test: Output[SmokeTestOutput]
    evaluate: Output[EvaluateOutput]
    record: Record
    store: Store

    @property
    def regressions(self) -> list[str]:
        return regressions(self.smoke_test.metadata, self.evaluate.metadata)

    def why_nobody(self) -> str | None:
        """Why no person is asked; None where one is."""
        if self.recipe.approve == "never":
            return "the recipe asks for no approval"
        if not self.evaluate.metadata.verdict.publish:
            return "the gate refuses the candidate"
        if self.recipe.approve == "on_regression" and not self.regressions:
            return "nothing of it is worse"
        live = open_registry(str(self.recipe.registry)).live()
        if live and live.content == candidate_content(self.train):
            return f"it is live already, as {live.name}"
        return None


def ask(lineage: Lineage, report_address: str) -> Question | None:
    """What a person must be asked before the candidate goes live; None where nobody needs to be.

    The run's report is made, so that it can be looked at, and the run is recorded as waiting.

    Args:
        report_address: where the report can be seen; goes into the question.

    Raises:
        Conflict: the run has asked another question before, which Airflow would show again: it keeps a run's first.
    """
    with _case(lineage) as case:
        if case.why_nobody():
            return None
        recipe, worse = case.recipe, case.regressions
        until = f"{datetime.now(UTC) + timedelta(hours=recipe.approve_within_hours):%Y-%m-%d %H:%M} UTC"
        case.record.close("waiting", summary=f"waiting for an answer until {until}")
        measured = case.evaluate.manifest["summary"].removesuffix(": better")
        summary = report(recipe.name, lineage["run"], waiting=True)
        body = approval_page(
            recipe, case.smoke_test.metadata, case.evaluate.metadata, worse, report_address,
            training_inputs=summary["stages"]["resolve"]["summary"],
        )  # fmt: skip
        asked = case.record.content.setdefault("question", fingerprint(body))
        if asked != fingerprint(body):
            raise Conflict(
                "the numbers are not those that this run has asked about before, which Airflow would show again",
                "Start a new run: finished stages are reused",
            )
        case.record.close("waiting")
        log.info("approve: a person is asked, in Airflow under Required Actions, until %s", until)
        return Question(f"May this candidate of {recipe.name} go live? {measured}", body, recipe.approve_within_hours)


def approve(lineage: Lineage, answer: Answer | None = None) -> Lineage:
    """Record who let the candidate go live, or that nobody had to be asked; `publish` puts it into the manifest.

    Args:
        answer: a person's, where `ask` had a question.

    Raises:
        Rejected: the person said no.
        ApprovalTimeout: nobody answered in time, or nobody was asked who had to be.
    """
    with _case(lineage) as case:
        asked, nothing = answer is not None, "Nothing is published, what was live stays live"
        by: str | None = None
        at: str | None = None
        if answer is None:
            because = case.why_nobody()
            if because is None:
                raise ApprovalTimeout(_where_nobody_asks(case.recipe), "Run it in Airflow's UI (make up)")
            summary = f"nobody was asked: {because}"
        elif answer.by is None:
            hours = case.recipe.approve_within_hours
            raise ApprovalTimeout(f"nobody answered within {hours:g} h", f"{nothing}; clear approve to ask again")
        elif not answer.approved:
            raise Rejected(f"rejected by {answer.by} at {answer.at:%Y-%m-%d %H:%M} UTC", nothing)
        else:
            by, at = answer.by, answer.at.isoformat(timespec="seconds")
            summary = f"approved by {answer.by} at {answer.at:%Y-%m-%d %H:%M} UTC"
        approval = ApproveOutput(asked=asked, regressions=case.regressions, summary=summary, by=by, at=at)
        inputs = {"smoke_test": case.smoke_test.fingerprint, "evaluate": case.evaluate.fingerprint}
        key, name = fingerprint([inputs, approval.to_json()]), case.recipe.name
        artifact = case.store.find(name, "approve", key)
        reused = artifact is not None
        if artifact is None:
            out = var() / "work" / name / "approve" / key
            out.mkdir(parents=True, exist_ok=True)
            artifact = case.store.commit(
                out,
                name,
                "approve",
                key,
                inputs=inputs,
                seconds=0.0,
                summary=summary,
                metadata=approval.to_json(),
            )
        case.record.close("done", reused=reused, summary=summary, fingerprint=key, folder=str(artifact.folder))
        log.info("approve done: %s", summary)
    return {**lineage, "approve": key}


def regressions(smoke_test: SmokeTestOutput, evaluate: EvaluateOutput) -> list[str]:
    """What of a candidate that the gate lets through is worse than it could be, a sentence each.

    A loss above the live adapter's, which `gate_margin` may allow; checks that answers fail and the recipe does not
    require; what the gate has noted.

    Args:
        smoke_test, evaluate: the metadata that these stages recorded.
    """
    found = []
    against = evaluate.verdict.against_live
    if against and evaluate.live and against.difference > 0:
        found.append(
            f"its loss is above that of {evaluate.live.name}, which is live: {against.candidate:.4f} against "
            f"{against.other:.4f} (difference {against.low:+.4f} to {against.high:+.4f}, allowed below "
            f"{evaluate.margin:+.4f})"
        )
    answers = smoke_test.answers
    for name in dict.fromkeys(name for answer in answers for name in answer.failures):
        seen = [answer.failures[name] for answer in answers if name in answer.failures]
        if name not in smoke_test.required:
            found.append(f"{len(seen)} of {len(answers)} answers fail {name}, which is not required: {seen[0]}")
    return found + evaluate.verdict.notes


def refuse_where_nobody_asks(recipe: Recipe) -> None:
    """For runs outside of the scheduler, which would wait for ever, or publish without asking.

    Raises:
        PermanentError: the recipe may ask for a person's approval.
    """
    if recipe.approve != "never":
        raise PermanentError(
            _where_nobody_asks(recipe),
            "Run it in Airflow's UI (make up), or here without approval: --set approve=never (make: SET=approve=never)",
        )


def _where_nobody_asks(recipe: Recipe) -> str:
    return f"{recipe.name} says approve: {recipe.approve}, and a run without Airflow's UI cannot ask a person"


@contextmanager
def _case(lineage: Lineage) -> Iterator[_Case]:
    store = Store()
    earlier = store.records(lineage["recipe"], lineage["run"]).get("approve", {})
    with recorded(store, lineage["recipe"], lineage["run"], "approve") as record:
        if "question" in earlier:
            record.content["question"] = earlier["question"]
        train, smoke_test, evaluate = (output_of(store, lineage, n) for n in ("train", "smoke_test", "evaluate"))
        yield _Case(pinned_recipe(store, lineage), train, smoke_test, evaluate, record, store)
