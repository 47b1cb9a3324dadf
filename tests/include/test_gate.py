"""The gate's arithmetic and its decisions."""

from __future__ import annotations

import random

from include.gate import compare, judge


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
    assert not judge({"base": base, "candidate": good, "live": good}, [], 0.95, 0.2).publish
    slightly_worse = [x + 0.05 for x in good]
    assert judge({"base": base, "candidate": slightly_worse, "live": good}, [], 0.95, 0.2).publish
    assert not judge({"base": base, "candidate": slightly_worse, "live": good}, [], 0.95, 0.0).publish


def test_a_failed_smoke_test_is_a_reason() -> None:
    base = rows(2.0)
    verdict = judge({"base": base, "candidate": [x - 1 for x in base]}, ["smoke test: 1 of 2 fail"], 0.95, 0.0)
    assert not verdict.publish
    assert verdict.reasons == ["smoke test: 1 of 2 fail"]
