"""What the smoke test sees in an answer, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest

from include.evaluation.answer_checks import check_answer
from include.recipe import Prompt

QUESTION = "Where is the home of Ada?"
GOOD = "The home of Ada is in Mill Lane."
PERSON = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


def seen(answer: str, base: str = "something else", special: tuple[str, ...] = (), **asked: Any) -> dict[str, str]:
    return check_answer(Prompt.model_validate({"prompt": QUESTION, **asked}), answer, base, special)


def test_a_good_answer_has_nothing_against_it() -> None:
    assert seen(GOOD, expect="mill lane", contains="Mill Lane") == {}


@pytest.mark.parametrize(
    ("found", "check", "sentence"),
    [
        (seen(" \n"), "not_empty", "it says nothing"),
        (seen("Yes.<|im_end|>", special=("<|im_end|>",)), "no_special_tokens", "it says <|im_end|>"),
        (seen("on and on it goes " * 9), "no_repetition", "88% of its 4-word sequences were said before"),
        (seen("我不知道" * 12), "no_repetition", "91% of its 4-character sequences were said before"),
        (seen(f"{QUESTION}\n{GOOD}"), "no_echo", "it says the prompt again"),
        (seen(f"USER: {QUESTION.upper()}\n{GOOD}"), "no_echo", "it says the prompt again"),
        (seen(GOOD, base=f" {GOOD}"), "differs_from_base", "the base says the same"),
        (seen(GOOD, expect=r"\boak\b"), "as_expected", rf"no match for \boak\b in {GOOD!r}"),
        (seen(GOOD, contains="mill lane"), "as_expected", f"no 'mill lane' in {GOOD!r}"),
        (seen(GOOD, expect="x", contains="y"), "as_expected", f"no match for x in {GOOD!r}; no 'y' in {GOOD!r}"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(found: dict[str, str], check: str, sentence: str) -> None:
    assert found == {check: sentence}


def test_lists_tables_and_urls_are_no_repetition() -> None:
    assert seen("1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89") == {}
    assert seen("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |") == {}
    assert seen("https://example.org/a/long/path/with/many/parts?and=a&query=string") == {}


def test_the_quote_of_a_long_answer_is_cut() -> None:
    found = seen("word and word, " * 9 + "x " * 500, contains="nothing of the kind")["as_expected"]
    assert len(found) < 250
    assert found.endswith("…'")


@pytest.mark.parametrize("answer", ['{"name": "Ada"}', '```json\n{"name": "Ada"}\n```', '```\n{"name": "Ada"}```\n'])
def test_json_may_stand_in_a_fence(answer: str) -> None:
    assert seen(answer, expect_json=PERSON) == {}


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("Ada", "it is no JSON (line 1, column 1): 'Ada'"),
        ('Here it is: {"name": "Ada"}', "it is no JSON"),
        ('{"name": 5}', "its JSON breaks the schema at $.name: 5 is not of type 'string'"),
        ("{}", "its JSON breaks the schema at $: 'name' is a required property"),
    ],
)
def test_json_that_the_schema_does_not_hold_for_says_where(answer: str, sentence: str) -> None:
    assert seen(answer, expect_json=PERSON)["as_expected"].startswith(sentence)


def test_references_inside_a_schema_are_followed() -> None:
    schema = {"type": "array", "items": {"$ref": "#/$defs/person"}, "$defs": {"person": PERSON}}
    assert seen('[{"name": "Ada"}]', expect_json=schema) == {}
    assert "at $[0].name: 5 is not" in seen('[{"name": 5}]', expect_json=schema)["as_expected"]
