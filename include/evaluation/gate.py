"""The gate: whether a candidate may take the place of what is live. Numbers in, verdict out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES, BATCH = 10_000, 1_000
TIE = 1e-3  # nats per token: rows whose losses differ by less are the same to the gate, also in 16-bit arithmetic
PROMPT_EFFECT = 1e-2  # nats per token by which an answer must be likelier after its own question


@dataclass(frozen=True)
class Comparison:
    """The candidate against another model, on the same rows: differences in nats per token, negative is better.

    Every number is a mean over rows of each row's mean over its trained tokens.
    """

    candidate: float
    other: float
    difference: float
    low: float
    high: float


@dataclass
class Verdict:
    """The gate's decision and why.

    Attributes:
        publish: whether the candidate may go live.
        against_base, against_live: the comparisons; None where nothing is live.
        questions: the candidate on rows with their own questions (`candidate`) and with others' (`other`); None where
            there are too few such rows.
        reasons: what speaks against it; empty when nothing does.
        notes: what was seen and does not decide.
    """

    publish: bool
    against_base: Comparison
    against_live: Comparison | None = None
    questions: Comparison | None = None
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(candidate: list[float], other: list[float], confidence: float) -> Comparison:
    """Paired bootstrap of the mean difference over rows (Efron and Tibshirani, 1993, chapter 13; percentiles).

    A row counts once, however long it is: rows are what was drawn and held out, so they are what is drawn again, and a
    long conversation does not outvote many short ones. That a row of few trained tokens says less shows in the width.

    Args:
        candidate, other: mean loss per token of the same rows in the same order, nats.
        confidence: of the two-sided interval.
    """
    from scipy.stats import bootstrap

    ours, theirs = np.asarray(candidate), np.asarray(other)
    differences = ours - theirs
    low = high = differences[0]
    if len(differences) > 1:
        low, high = bootstrap(
            (differences,), np.mean, n_resamples=RESAMPLES, batch=BATCH, confidence_level=confidence,
            method="percentile", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return Comparison(*(round(float(x), 6) for x in (ours.mean(), theirs.mean(), differences.mean(), low, high)))


def rows_needed(confidence: float) -> int:
    """So many rows that all of them being better is no luck: a coin does not fall the same way so often."""
    return math.ceil(math.log2(2 / (1 - confidence)))


def judge(
    losses: dict[str, list[float]],
    failed_checks: list[str],
    confidence: float,
    margin: float,
    questions: tuple[list[float], list[float]] | None = None,
    questions_matter: bool = False,
) -> Verdict:
    """Better than the base; measurably better than the live adapter, or by the margin not worse, and no tie; smoke test
    passed; where questions matter, answers likelier after their own questions than after others'.

    A tie is a candidate that does as the live adapter does: no row's loss differs by `TIE`. It brings nothing, so no
    margin lets it through; the margin is what one that does otherwise may cost.

    Args:
        losses: mean loss per token of each holdout row, for `base`, `candidate` and, where there is one, `live`.
        failed_checks: what the smoke test found against the required checks, as sentences.
        margin: see the recipe's `gate_margin`.
        questions: the candidate's losses of rows with their own questions, and of the same rows with others'.
        questions_matter: see the recipe's `gate_questions_matter`.
    """
    candidate = losses["candidate"]
    base = compare(candidate, losses["base"], confidence)
    verdict = Verdict(False, base, reasons=list(failed_checks))
    if len(candidate) < rows_needed(confidence):
        verdict.reasons.append(
            f"{len(candidate)} holdout rows are too few to tell better from lucky: {rows_needed(confidence)} are "
            "needed (raise holdout_share, or add rows)"
        )
    if _tie(candidate, losses["base"]):
        verdict.reasons.append(
            f"it does nothing: no holdout row's loss differs from the base's by {TIE} nats per token"
        )
    elif base.high >= 0:
        verdict.reasons.append(
            f"not measurably better than the base: {base.candidate:.4f} against {base.other:.4f} nats per token "
            f"(difference {base.low:+.4f} to {base.high:+.4f})"
        )
    if "live" in losses:
        live = verdict.against_live = compare(candidate, losses["live"], confidence)
        if _tie(candidate, losses["live"]):
            verdict.reasons.append(
                f"not better than what is live, but a tie: no holdout row's loss differs by {TIE} nats per token"
            )
        elif live.high >= margin:
            verdict.reasons.append(
                f"not better than what is live: {live.candidate:.4f} against {live.other:.4f} nats per token "
                f"(difference {live.low:+.4f} to {live.high:+.4f}, allowed below {margin:+.4f})"
            )
    if questions:
        own = verdict.questions = compare(*questions, confidence)
        if own.high > -PROMPT_EFFECT:
            (verdict.reasons if questions_matter else verdict.notes).append(
                f"it does not heed the question: answers are not {PROMPT_EFFECT} nats per token likelier after their own "
                f"question ({own.candidate:.4f}) than after another row's ({own.other:.4f}; difference {own.low:+.4f} "
                f"to {own.high:+.4f}); look whether the data's questions and answers belong together"
            )
    verdict.publish = not verdict.reasons
    return verdict


def _tie(one: list[float], other: list[float]) -> bool:
    return float(np.abs(np.subtract(one, other)).max()) < TIE
