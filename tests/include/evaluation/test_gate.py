"""The gate's arithmetic and its decisions."""

from __future__ import annotations

import random

from include.evaluation.gate import compare, judge, rows_needed


def rows(mean: float, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [mean + generator.gauss(0, 0.3) for _ in range(100)]


def test_the_interval_holds_the_difference_and_is_paired() -> None:
    base = rows(2.0)
    better = [loss - 0.01 for loss in base]
    found = compare(better, base, 0.95)
    assert found.low <= -0.01 <= found.high < 0, "a constant difference is certain although the rows vary by 0.3"


def test_the_interval_agrees_with_the_normal_one() -> None:
    ours, theirs = rows(1.9, 1), rows(2.0, 2)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / 100
    error = (sum((d - mean) ** 2 for d in differences) / 99 / 100) ** 0.5
    found = compare(ours, theirs, 0.95)
    assert abs(found.low - (mean - 1.96 * error)) < 0.15 * error
    assert abs(found.high - (mean + 1.96 * error)) < 0.15 * error


def test_better_goes_live_and_the_first_has_only_the_base_to_beat() -> None:
    base = rows(2.0)
    assert judge({"base": base, "candidate": [x - 0.1 for x in base]}, [], 0.95, 0.0).publish


def test_worse_equal_or_uncertain_does_not() -> None:
    base = rows(2.0)
    for candidate in ([x + 0.1 for x in base], base, rows(1.99, 5)):
        verdict = judge({"base": base, "candidate": candidate}, [], 0.95, 0.0)
        assert not verdict.publish
        assert "base" in verdict.reasons[0]


def test_a_tie_with_what_is_live_does_not_replace_it_even_with_a_margin() -> None:
    base = rows(2.0)
    good = [x - 0.5 for x in base]
    for nearly in (good, [x - 0.0005 for x in good]):  # so steady a difference would be measurable
        for margin in (0.0, 0.2):
            verdict = judge({"base": base, "candidate": nearly, "live": good}, [], 0.95, margin)
            assert verdict.reasons == [
                "not better than what is live, but a tie: no holdout row's loss differs by 0.001 nats per token"
            ]


def test_the_margin_is_what_another_adapter_may_cost() -> None:
    base = rows(2.0)
    good = [x - 0.5 for x in base]
    slightly_worse = [x + 0.05 for x in good]
    assert judge({"base": base, "candidate": slightly_worse, "live": good}, [], 0.95, 0.2).publish
    assert not judge({"base": base, "candidate": slightly_worse, "live": good}, [], 0.95, 0.04).publish
    assert not judge({"base": base, "candidate": slightly_worse, "live": good}, [], 0.95, 0.0).publish
    uncertain = [
        x + d for x, d in zip(good, rows(0.0, 5), strict=True)
    ]  # no better on the whole, otherwise on each row
    assert judge({"base": base, "candidate": uncertain, "live": good}, [], 0.95, 0.2).publish
    assert not judge({"base": base, "candidate": uncertain, "live": good}, [], 0.95, 0.0).publish


def test_one_that_does_nothing_is_named_so_although_its_difference_is_measurable() -> None:
    base = rows(2.0)
    verdict = judge({"base": base, "candidate": [x - 2e-5 for x in base]}, [], 0.95, 0.0)
    assert verdict.against_base.high < 0
    assert verdict.reasons == ["it does nothing: no holdout row's loss differs from the base's by 0.001 nats per token"]


def test_a_row_counts_once_however_long_it_is() -> None:
    assert compare([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], 0.95).difference == 0


def test_few_rows_prove_nothing() -> None:
    assert (rows_needed(0.95), rows_needed(0.99)) == (6, 8)
    for count in (1, 2, 5):
        losses = {"base": [2.0] * count, "candidate": [1.0] * count}
        (reason,) = judge(losses, [], 0.95, 0.0).reasons
        assert reason.startswith(f"{count} holdout rows are too few to tell better from lucky: 6 are needed")
    assert judge({"base": [2.0] * 6, "candidate": [1.0] * 6}, [], 0.95, 0.0).publish


def test_answers_must_be_likelier_after_their_own_questions_where_the_recipe_says_so() -> None:
    base = rows(2.0)
    own = [x - 1 for x in base]
    losses = {"base": base, "candidate": own}
    heeds = judge(losses, [], 0.95, 0.0, (own, [x + 0.1 for x in own]), questions_matter=True)
    assert heeds.publish and not heeds.notes
    for other in (own, [x - 0.1 for x in own], [x + 0.001 for x in own], rows(1.0, 7)):
        verdict = judge(losses, [], 0.95, 0.0, (own, other), questions_matter=True)
        assert not verdict.publish
        assert [reason.partition(":")[0] for reason in verdict.reasons] == ["it does not heed the question"]
        only_said = judge(losses, [], 0.95, 0.0, (own, other))
        assert only_said.publish
        assert only_said.notes == verdict.reasons


def test_a_failed_smoke_test_is_a_reason() -> None:
    base = rows(2.0)
    verdict = judge({"base": base, "candidate": [x - 1 for x in base]}, ["smoke test: 1 of 2 fail"], 0.95, 0.0)
    assert not verdict.publish
    assert verdict.reasons == ["smoke test: 1 of 2 fail"]
