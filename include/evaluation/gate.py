"""The gate: decides from per-row losses whether a candidate may go live."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES, BATCH = 10_000, 1_000
TIE = 1e-3  # nats per token: smaller differences of a row's loss count as equal, also in 16-bit arithmetic
PROMPT_EFFECT = 1e-2  # nats per token by which an answer must be likelier after its own prompt than after another


@dataclass(frozen=True)
class Comparison:
    """The candidate compared with another model on the same rows. Losses in nats per token; lower is better.

    Attributes:
        candidate, other: mean over conversations of each one's mean loss over its trained tokens.
        difference: `candidate` minus `other`; negative if the candidate is better.
        low, high: ends of the confidence interval of `difference`.
    """

    candidate: float
    other: float
    difference: float
    low: float
    high: float


@dataclass
class Verdict:
    """The gate's decision and its reasons.

    Attributes:
        publish: whether the candidate may go live.
        against_base, against_live: the comparisons; `against_live` is None if nothing else is live.
        prompt_control: the candidate on rows with their own prompts (`candidate`) and with shuffled prompts (`other`);
            None if there are too few such rows.
        reasons: the reasons against the candidate; it may go live if there are none.
        notes: observations that do not decide.
    """

    publish: bool
    against_base: Comparison
    against_live: Comparison | None = None
    prompt_control: Comparison | None = None
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON values."""
        return asdict(self)


def by_conversation(row: list[int], tokens: list[int], losses: list[float]) -> list[float]:
    """Return one loss for each conversation: the mean over all trained tokens of its pieces, in nats per token.

    The pieces of a split conversation are not independent, so that an interval over pieces would be too narrow.

    Args:
        row: of each piece the row number of its conversation. The result is in the order in which these first occur.
        tokens: of each piece the number of its trained tokens.
        losses: of each piece the mean loss over these tokens.
    """
    sums: dict[int, tuple[float, int]] = {}
    for number, count, loss in zip(row, tokens, losses, strict=True):
        total, counted = sums.get(number, (0.0, 0))
        sums[number] = total + loss * count, counted + count
    alone = len(sums) == len(losses)  # then nothing is rounded
    return list(losses) if alone else [total / counted for total, counted in sums.values()]


def compare(candidate: list[float], other: list[float], confidence: float) -> Comparison:
    """Compare two models by a paired bootstrap of the mean difference over rows, with percentile intervals.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Rows are resampled, because rows
    were sampled for the holdout. Every row has the same weight, however many tokens it has. A row is a whole
    conversation: see `by_conversation` for those that were split.

    Args:
        candidate, other: mean loss of each row in nats per token; the same rows in the same order.
        confidence: confidence of the two-sided interval, between 0 and 1.
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
    """Return the smallest n for which "all n rows improved" is significant in a two-sided sign test."""
    return math.ceil(math.log2(2 / (1 - confidence)))


def judge(
    losses: dict[str, list[float]],
    failed_checks: list[str],
    confidence: float,
    margin: float,
    prompt_control: tuple[list[float], list[float]] | None = None,
    require_prompt_control: bool = False,
) -> Verdict:
    """Decide whether a candidate may go live. It must meet every condition:

    - The smoke test passed.
    - There are enough holdout rows (`rows_needed`).
    - The candidate is better than the base: the interval of the loss difference is below 0.
    - If an adapter is live: the interval of the difference from its loss is below `margin`, and the two are no tie. A
      tie (no row's loss differs by `TIE` or more) never replaces the live adapter, whatever the margin.
    - If `require_prompt_control`: answers are likelier by `PROMPT_EFFECT` after their own prompts than after shuffled
      prompts. Otherwise a failure of this control is a note.

    Args:
        losses: mean loss of each holdout conversation in nats per token, for `base`, `candidate` and, if there is one,
            `live`.
        failed_checks: failures of the smoke test's required checks, as sentences.
        confidence: confidence of the intervals, between 0 and 1.
        margin: the increase of the live adapter's loss that is accepted; `gate_margin` of the recipe.
        prompt_control: the candidate's losses of rows with their own prompts, and of the same rows with shuffled
            prompts; None if there are too few such rows.
        require_prompt_control: whether a failed prompt control is a reason against the candidate.
    """
    candidate = losses["candidate"]
    base = compare(candidate, losses["base"], confidence)
    verdict = Verdict(False, base, reasons=list(failed_checks))
    if len(candidate) < (needed := rows_needed(confidence)):
        verdict.reasons.append(
            f"too few holdout rows: {len(candidate)}, and confidence {confidence:g} needs {needed} "
            "(raise holdout_share, or add rows)"
        )
    if _is_tie(candidate, losses["base"]):
        verdict.reasons.append(
            f"no effect: no holdout row's loss differs from the base's loss by {TIE} nats per token or more"
        )
    elif base.high >= 0:
        verdict.reasons.append(
            f"not measurably better than the base: loss {base.candidate:.4f} against {base.other:.4f} nats per token "
            f"(difference {base.low:+.4f} to {base.high:+.4f})"
        )
    if "live" in losses:
        live = verdict.against_live = compare(candidate, losses["live"], confidence)
        if _is_tie(candidate, losses["live"]):
            verdict.reasons.append(
                f"a tie with the live adapter: no holdout row's loss differs by {TIE} nats per token or more"
            )
        elif live.high >= margin:
            verdict.reasons.append(
                f"not better than the live adapter: loss {live.candidate:.4f} against {live.other:.4f} nats per token "
                f"(difference {live.low:+.4f} to {live.high:+.4f}, must be below {margin:+.4f})"
            )
    if prompt_control:
        own = verdict.prompt_control = compare(*prompt_control, confidence)
        if own.high > -PROMPT_EFFECT:
            (verdict.reasons if require_prompt_control else verdict.notes).append(
                f"the answers do not depend on the prompt: loss {own.candidate:.4f} with their own prompts against "
                f"{own.other:.4f} nats per token with shuffled prompts (difference {own.low:+.4f} to {own.high:+.4f}, "
                f"must be below {-PROMPT_EFFECT:+.4f}); check that questions and answers of the dataset belong together"
            )
    verdict.publish = not verdict.reasons
    return verdict


def _is_tie(one: list[float], other: list[float]) -> bool:
    return float(np.abs(np.subtract(one, other)).max()) < TIE
