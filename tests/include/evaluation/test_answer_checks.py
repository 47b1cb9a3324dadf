"""Checks of answers: each is seen to fail an answer and to pass one."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from include.evaluation.answer_checks import CHECKS, GeneratedAnswer, check_answer, check_results
from include.recipe import AnswerCheck, Prompt

QUESTION = "Where is the home of Ada?"
GOOD = "The home of Ada is in Mill Lane."
PERSON = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


def failures(
    text: str, base: str = "something else", special: tuple[str, ...] = (), stopped: bool = True, **prompt: Any
) -> dict[str, str]:
    asked = Prompt.model_validate({"prompt": QUESTION, **prompt})
    return check_answer(GeneratedAnswer(asked, text.strip(), base.strip(), special, 1280, stopped))


def test_every_check_of_the_recipe_is_in_the_table() -> None:
    assert list(CHECKS) == list(get_args(AnswerCheck))


def test_a_good_answer_passes_every_check() -> None:
    assert failures(GOOD, expect="mill lane", contains="Mill Lane") == {}


@pytest.mark.parametrize(
    ("found", "check", "sentence"),
    [
        (failures(" \n"), "not_empty", "the answer is empty"),
        (failures(GOOD, stopped=False), "stops", "no end-of-turn token after 1,280 tokens"),
        (
            failures("Yes.<|im_end|>", special=("<|im_end|>",)),
            "no_special_tokens",
            "the answer contains <|im_end|>",
        ),
        (failures("on and on it goes " * 9), "no_repetition", "88% of its 4-word sequences are repetitions"),
        (failures("我不知道" * 12), "no_repetition", "91% of its 4-character sequences are repetitions"),
        (failures(f"{QUESTION}\n{GOOD}"), "no_echo", "the answer repeats the prompt"),
        (failures(f"USER: {QUESTION.upper()}\n{GOOD}"), "no_echo", "the answer repeats the prompt"),
        (failures(GOOD, base=f" {GOOD}"), "differs_from_base", "the base model gives the same answer"),
        (failures(GOOD, expect=r"\boak\b"), "as_expected", rf"no match for \boak\b in {GOOD!r}"),
        (failures(GOOD, contains="mill lane"), "as_expected", f"no 'mill lane' in {GOOD!r}"),
        (failures(GOOD, expect="x", contains="y"), "as_expected", f"no match for x in {GOOD!r}; no 'y' in {GOOD!r}"),
    ],
)
def test_a_failed_check_is_a_sentence(found: dict[str, str], check: str, sentence: str) -> None:
    assert found == {check: sentence}


def test_results_tell_passed_failed_and_not_applicable_apart() -> None:
    plain, expecting = (Prompt.model_validate({"prompt": QUESTION, **more}) for more in ({}, {"contains": "Lane"}))
    passed = dict.fromkeys(CHECKS, True)
    assert check_results(expecting, {}) == passed
    assert check_results(expecting, {"as_expected": "no 'Lane'"}) == {**passed, "as_expected": False}
    assert check_results(plain, {"stops": "no end"}) == {**passed, "stops": False, "as_expected": None}


def test_lists_tables_and_urls_are_no_repetition() -> None:
    assert failures("1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89") == {}
    assert failures("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |") == {}
    assert failures("https://example.org/a/long/path/with/many/parts?and=a&query=string") == {}


def test_half_of_an_answer_may_be_repeated_and_not_more() -> None:
    assert failures("a a a a a") == {}, "1 of 2 sequences"
    assert list(failures("a a a a a a")) == ["no_repetition"], "2 of 3 sequences"


def test_a_short_prompt_may_stand_inside_an_answer_and_not_open_it() -> None:
    assert failures("She is Ada, the smith.", prompt="Ada") == {}
    assert list(failures("Ada, the smith.", prompt="Ada")) == ["no_echo"]


def test_the_quote_of_a_long_answer_is_cut() -> None:
    found = failures("word and word, " * 9 + "x " * 500, contains="nothing of the kind")["as_expected"]
    assert len(found) < 250
    assert found.endswith("…'")


@pytest.mark.parametrize("answer", ['{"name": "Ada"}', '```json\n{"name": "Ada"}\n```', '```\n{"name": "Ada"}```\n'])
def test_json_may_stand_in_a_fence(answer: str) -> None:
    assert failures(answer, expect_json=PERSON) == {}


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ("Ada", "line 1, column 1"),
        ('Here it is: {"name": "Ada"}', "line 1, column 1"),
        ('{"name": 5}', "$.name: 5 is not of type 'string'"),
        ("{}", "$: 'name' is a required property"),
    ],
)
def test_json_that_breaks_the_schema_is_reported_with_its_place_and_a_quote(answer: str, place: str) -> None:
    failure = failures(answer, expect_json=PERSON)["as_expected"]
    assert place in failure
    assert failure.endswith(f": {answer!r}")


def test_references_inside_a_schema_are_followed() -> None:
    schema = {"type": "array", "items": {"$ref": "#/$defs/person"}, "$defs": {"person": PERSON}}
    assert failures('[{"name": "Ada"}]', expect_json=schema) == {}
    assert "at $[0].name: 5 is not" in failures('[{"name": 5}]', expect_json=schema)["as_expected"]
