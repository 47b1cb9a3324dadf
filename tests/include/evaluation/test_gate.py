"""The gate: its intervals, and each reason for and against a candidate."""

from __future__ import annotations

import random

from include.evaluation.gate import PROMPT_EFFECT, TIE, Verdict, by_conversation, compare, judge, rows_needed

NO_EFFECT = "no effect: no holdout row's loss differs from the base's loss by 0.001 nats per token or more"
A_TIE = "a tie with the live adapter: no holdout row's loss differs by 0.001 nats per token or more"


def rows(mean: float, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [mean + generator.gauss(0, 0.3) for _ in range(100)]


def lower(losses: list[float], by: float) -> list[float]:
    return [loss - by for loss in losses]


def mostly(losses: list[float], by: float, other: float) -> list[float]:
    """Losses that are lower by `by` in nine of ten rows and higher by `other` in the tenth."""
    return [loss + (other if i % 10 == 0 else -by) for i, loss in enumerate(losses)]


def headlines(verdict: Verdict) -> list[str]:
    return [reason.partition(":")[0] for reason in verdict.reasons]


def test_the_interval_contains_the_difference_and_is_paired() -> None:
    base = rows(2.0)
    found = compare(lower(base, 0.01), base, 0.95)
    assert found.low <= -0.01 <= found.high < 0, "a constant difference is certain although the rows vary by 0.3"


def test_the_interval_agrees_with_the_normal_approximation() -> None:
    ours, theirs = rows(1.9, 1), rows(2.0, 2)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / 100
    error = (sum((d - mean) ** 2 for d in differences) / 99 / 100) ** 0.5
    found = compare(ours, theirs, 0.95)
    assert abs(found.low - (mean - 1.96 * error)) < 0.15 * error
    assert abs(found.high - (mean + 1.96 * error)) < 0.15 * error


def test_if_nothing_is_live_the_candidate_only_has_to_beat_the_base() -> None:
    base = rows(2.0)
    verdict = judge({"base": base, "candidate": lower(base, 0.1)}, [], 0.95, 0.0)
    assert (verdict.publish, verdict.reasons, verdict.against_live) == (True, [], None)


def test_a_candidate_that_is_worse_than_the_base_or_equal_is_refused() -> None:
    base = rows(2.0)
    assert headlines(judge({"base": base, "candidate": lower(base, -0.1)}, [], 0.95, 0.0)) == [
        "not measurably better than the base"
    ]
    assert headlines(judge({"base": base, "candidate": base}, [], 0.95, 0.0)) == ["no effect"]


def test_the_interval_and_not_the_mean_difference_decides_against_the_base() -> None:
    base = rows(2.0)
    uncertain = mostly(base, 0.1, 0.7)
    verdict = judge({"base": base, "candidate": uncertain}, [], 0.95, 0.0)
    assert verdict.against_base.difference < -0.01, "on average it is better"
    assert verdict.against_base.high > 0, "but that may be luck"
    assert headlines(verdict) == ["not measurably better than the base"]
    assert not verdict.publish


def test_the_interval_and_not_the_mean_difference_decides_against_the_live_adapter() -> None:
    base = rows(2.0)
    live = lower(base, 0.5)
    losses = {"base": base, "candidate": mostly(live, 0.1, 0.7), "live": live}
    verdict = judge(losses, [], 0.95, 0.0)
    assert verdict.against_live and verdict.against_live.difference < -0.01 and verdict.against_live.high > 0
    assert headlines(verdict) == ["not better than the live adapter"]
    assert judge(losses, [], 0.95, 0.1).publish, "the margin covers the whole interval"
    assert not judge(losses, [], 0.95, verdict.against_live.high).publish, "its end must lie below the margin"


def test_a_tie_with_the_live_adapter_does_not_replace_it_whatever_the_margin() -> None:
    base = rows(2.0)
    live = lower(base, 0.5)
    for nearly in (live, lower(live, 0.9 * TIE)):  # so steady a difference would be measurable
        for margin in (0.0, 0.2):
            verdict = judge({"base": base, "candidate": nearly, "live": live}, [], 0.95, margin)
            assert verdict.reasons == [A_TIE]


def test_a_tie_is_decided_row_by_row() -> None:
    base = rows(2.0)
    live = lower(base, 0.5)
    opposite = [loss + (0.2 if i % 2 else -0.2) for i, loss in enumerate(live)]  # differences cancel on average
    verdict = judge({"base": base, "candidate": opposite, "live": live}, [], 0.95, 0.2)
    assert verdict.against_live and abs(verdict.against_live.difference) < TIE
    assert verdict.publish, "each row differs, and the loss stays within the margin"
    one_row = [live[0] - 1.1 * TIE, *live[1:]]  # the mean of absolute differences is far below a tie
    assert judge({"base": base, "candidate": one_row, "live": live}, [], 0.95, 0.2).publish
    opposite_of_base = [loss + (0.2 if i % 2 else -0.2) for i, loss in enumerate(base)]
    verdict = judge({"base": base, "candidate": opposite_of_base}, [], 0.95, 0.0)
    assert headlines(verdict) == ["not measurably better than the base"], "it has an effect"


def test_the_margin_is_the_accepted_increase_of_the_live_adapters_loss() -> None:
    base = rows(2.0)
    live = lower(base, 0.5)
    losses = {"base": base, "candidate": lower(live, -0.05), "live": live}
    assert judge(losses, [], 0.95, 0.2).publish
    assert not judge(losses, [], 0.95, 0.04).publish
    assert not judge(losses, [], 0.95, 0.0).publish


def test_a_candidate_without_effect_is_refused_although_its_difference_is_measurable() -> None:
    base = rows(2.0)
    verdict = judge({"base": base, "candidate": lower(base, 2e-5)}, [], 0.95, 0.0)
    assert verdict.against_base.high < 0
    assert verdict.reasons == [NO_EFFECT]


def test_every_row_has_the_same_weight() -> None:
    assert compare([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], 0.95).difference == 0


def test_pieces_of_a_conversation_are_one_unit_with_the_mean_over_their_tokens() -> None:
    assert by_conversation([7, 3, 7], [1, 5, 3], [4.0, 1.0, 0.0]) == [1.0, 1.0]
    assert by_conversation([1, 2], [3, 7], [0.1, 0.7]) == [0.1, 0.7]
    # ten conversations in twenty equal pieces each: the interval is that of ten rows, not of two hundred
    base, ours = rows(2.0)[:10], rows(1.9, 1)[:10]
    pieces = [i for i in range(10) for _ in range(20)]
    joined = [by_conversation(pieces, [9] * 200, [losses[i] for i in pieces]) for losses in (ours, base)]
    assert compare(*joined, 0.95) == compare(ours, base, 0.95)
    wrong = compare([ours[i] for i in pieces], [base[i] for i in pieces], 0.95)
    assert wrong.high - wrong.low < (compare(*joined, 0.95).high - compare(*joined, 0.95).low) / 3
    few = [by_conversation([0] * 50 + [1], [1] * 51, [loss] * 51) for loss in (1.0, 2.0)]
    (reason,) = judge({"candidate": few[0], "base": few[1]}, [], 0.95, 0.0).reasons
    assert reason.startswith("too few holdout rows: 2")


def test_too_few_rows_are_a_reason() -> None:
    assert (rows_needed(0.95), rows_needed(0.99)) == (6, 8)
    for count in (1, 2, 5):
        losses = {"base": [2.0] * count, "candidate": [1.0] * count}
        (reason,) = judge(losses, [], 0.95, 0.0).reasons
        assert reason.startswith(f"too few holdout rows: {count}, and confidence 0.95 needs 6")
    assert judge({"base": [2.0] * 6, "candidate": [1.0] * 6}, [], 0.95, 0.0).publish


def test_the_prompt_control_fires_if_shuffled_prompts_change_nothing() -> None:
    base = rows(2.0)
    own = lower(base, 1)
    losses = {"base": base, "candidate": own}
    uncertain = mostly(own, -0.1, -0.7)  # the mean rises by 0.02, but the interval does not exclude luck
    for shuffled in (own, lower(own, 0.1), lower(own, -0.9 * PROMPT_EFFECT), rows(1.0, 7), uncertain):
        required = judge(losses, [], 0.95, 0.0, (own, shuffled), require_prompt_control=True)
        assert headlines(required) == ["the answers do not depend on the prompt"]
        assert (required.publish, required.notes) == (False, [])
        reported = judge(losses, [], 0.95, 0.0, (own, shuffled))
        assert (reported.publish, reported.notes) == (True, required.reasons)


def test_the_prompt_control_passes_if_answers_are_likelier_after_their_own_prompts() -> None:
    base = rows(2.0)
    own = lower(base, 1)
    verdict = judge({"base": base, "candidate": own}, [], 0.95, 0.0, (own, lower(own, -0.1)), True)
    assert (verdict.publish, verdict.reasons, verdict.notes) == (True, [], [])
    assert verdict.prompt_control and round(verdict.prompt_control.difference, 6) == -0.1


def test_without_enough_rows_with_shuffled_prompts_the_prompt_control_says_nothing() -> None:
    base = rows(2.0)
    verdict = judge({"base": base, "candidate": lower(base, 1)}, [], 0.95, 0.0, None, require_prompt_control=True)
    assert (verdict.publish, verdict.prompt_control) == (True, None)


def test_a_failed_smoke_test_is_a_reason() -> None:
    base = rows(2.0)
    verdict = judge({"base": base, "candidate": lower(base, 1)}, ["smoke test: 1 of 2 fail"], 0.95, 0.0)
    assert not verdict.publish
    assert verdict.reasons == ["smoke test: 1 of 2 fail"]
