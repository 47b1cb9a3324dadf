"""The gate: whether a candidate may take the place of what is live. Numbers in, verdict out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """The candidate against another model, on the same rows: differences in nats per token, negative is better."""

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
        reasons: what speaks against it; empty when nothing does.
    """

    publish: bool
    against_base: Comparison
    against_live: Comparison | None = None
    reasons: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(candidate: list[float], other: list[float], confidence: float) -> Comparison:
    """Paired bootstrap of the mean difference over rows (Efron and Tibshirani, 1993, chapter 13; percentiles).

    Args:
        candidate, other: mean loss per token of the same rows in the same order, nats.
        confidence: of the two-sided interval.
    """
    ours, theirs = np.asarray(candidate), np.asarray(other)
    differences = ours - theirs
    picks = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(differences[picks].mean(1), [tail, 100 - tail])
    return Comparison(*(round(float(x), 6) for x in (ours.mean(), theirs.mean(), differences.mean(), low, high)))


def judge(losses: dict[str, list[float]], failed_checks: list[str], confidence: float, margin: float) -> Verdict:
    """Better than the base; against the live adapter measurably better, or by the margin not worse; smoke test passed.

    Args:
        losses: mean loss per token of each holdout row, for `base`, `candidate` and, where there is one, `live`.
        failed_checks: what the smoke test found against the required checks, as sentences.
        margin: see the recipe's `gate_margin`.
    """
    base = compare(losses["candidate"], losses["base"], confidence)
    verdict = Verdict(False, base, reasons=list(failed_checks))
    if base.high >= 0:
        verdict.reasons.append(
            f"not measurably better than the base: {base.candidate:.4f} against {base.other:.4f} nats per token "
            f"(difference {base.low:+.4f} to {base.high:+.4f})"
        )
    if "live" in losses:
        live = verdict.against_live = compare(losses["candidate"], losses["live"], confidence)
        tie = losses["candidate"] == losses["live"]
        if live.high >= margin or tie:
            verdict.reasons.append(
                f"not better than what is live: {live.candidate:.4f} against {live.other:.4f} nats per token "
                f"(difference {live.low:+.4f} to {live.high:+.4f}, allowed below {margin:+.4f})"
            )
    verdict.publish = not verdict.reasons
    return verdict
