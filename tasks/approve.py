"""approve: decide whether a person must approve the candidate, ask, and record the answer."""

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
    """The question for a person: a headline, the numbers as Markdown, and the hours in which to answer."""

    subject: str
    body: str
    hours: float


@dataclass(frozen=True)
class Answer:
    """A person's answer: whether the candidate may go live, the person (None: no answer in time), the time (UTC)."""

    approved: bool
    by: str | None
    at: datetime


@dataclass
class _Decision:
    """The recipe, the outputs and the record that a decision needs."""

    recipe: Recipe
    train: Output[TrainOutput]
    smoke_test: Output[SmokeTestOutput]
    evaluate: Output[EvaluateOutput]
    record: Record
    store: Store

    @property
    def regressions(self) -> list[str]:
        return regressions(self.smoke_test.metadata, self.evaluate.metadata)

    def why_not_asked(self) -> str | None:
        """Return the reason why nobody is asked; None if a person must be asked."""
        if self.recipe.approve == "never":
            return "the recipe asks for no approval"
        if not self.evaluate.metadata.verdict.publish:
            return "the gate refused the candidate"
        if self.recipe.approve == "on_regression" and not self.regressions:
            return "nothing regressed"
        live = open_registry(str(self.recipe.registry)).live()
        if live and live.content == candidate_content(self.train):
            return f"the candidate is live already, as {live.name}"
        return None


def ask(lineage: Lineage, report_address: str) -> Question | None:
    """Return the question that a person must answer before the candidate goes live; None if nobody needs to be asked.

    Also make the run's report, for the person to read, and record the run as waiting.

    Args:
        report_address: where the report can be seen; goes into the question.

    Raises:
        Conflict: the question differs from the run's first one, which is the one that Airflow shows.
    """
    with _decision(lineage) as case:
        if case.why_not_asked():
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
                "the approval question has changed since this run first asked it; Airflow would show the first one",
                "Start a new run: finished stages are reused",
            )
        case.record.close("waiting")
        log.info("approve: a person is asked, in Airflow under Required Actions, until %s", until)
        return Question(f"May this candidate of {recipe.name} go live? {measured}", body, recipe.approve_within_hours)


def approve(lineage: Lineage, answer: Answer | None = None) -> Lineage:
    """Record who approved the candidate, or why nobody was asked. `publish` copies it into the manifest.

    Args:
        answer: the person's answer; None if `ask` returned no question.

    Raises:
        Rejected: the person said no.
        ApprovalTimeout: nobody answered in time, or an approval is needed and nobody could be asked.
    """
    with _decision(lineage) as case:
        asked, nothing = answer is not None, "Nothing is published; the live version does not change"
        by: str | None = None
        at: str | None = None
        if answer is None:
            because = case.why_not_asked()
            if because is None:
                raise ApprovalTimeout(_cannot_ask(case.recipe), "Run it in Airflow's UI (make up)")
            summary = f"skipped: {because}"
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
    """Return a sentence for each regression of a candidate that passed the gate: a loss above the live adapter's
    (within `gate_margin`), failed checks that the recipe does not require, and the gate's warnings.

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


def refuse_if_approval_needed(recipe: Recipe) -> None:
    """Refuse a recipe that may ask for approval, for runs without Airflow's UI, which cannot ask.

    Raises:
        PermanentError: the recipe may ask for a person's approval.
    """
    if recipe.approve != "never":
        raise PermanentError(
            _cannot_ask(recipe),
            "Run it in Airflow's UI (make up), or here without approval: --set approve=never (make: SET=approve=never)",
        )


def _cannot_ask(recipe: Recipe) -> str:
    return f"{recipe.name} says approve: {recipe.approve}, and a run without Airflow's UI cannot ask a person"


@contextmanager
def _decision(lineage: Lineage) -> Iterator[_Decision]:
    store = Store()
    earlier = store.read_records(lineage["recipe"], lineage["run"]).get("approve", {})
    with recorded(store, lineage["recipe"], lineage["run"], "approve") as record:
        if "question" in earlier:
            record.content["question"] = earlier["question"]
        train, smoke_test, evaluate = (output_of(store, lineage, n) for n in ("train", "smoke_test", "evaluate"))
        yield _Decision(pinned_recipe(store, lineage), train, smoke_test, evaluate, record, store)
