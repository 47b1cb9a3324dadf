"""Checks of a generated answer.

To add a check, write a function here, add it to `CHECKS`, and add its name to `AnswerCheck`
(include/recipe/evaluation.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from include.recipe import AnswerCheck, Prompt, json_schema

MAX_REPEATED_SHARE = 0.5  # an answer with a larger share of repeated n-grams is a loop
NGRAM = 4
MAX_MEAN_WORD_CHARS = 15  # a text with longer "words" is taken to be written without spaces between words
MAX_QUOTE_CHARS = 160  # characters of the answer that a failure quotes


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer of the candidate, and all that a check may need.

    Attributes:
        prompt: the prompt of the recipe, with its expectations.
        text: the answer without its end-of-turn token and without white space around it.
        base_text: the answer of the bare base model, likewise.
        special_tokens: the special tokens inside the answer.
        tokens: length of the answer without its end-of-turn token.
        stopped: whether an end-of-turn token ended the answer.
    """

    prompt: Prompt
    text: str
    base_text: str
    special_tokens: Sequence[str]
    tokens: int
    stopped: bool

    @property
    def quoted(self) -> str:
        """Return the answer in quotation marks, shortened to `MAX_QUOTE_CHARS`."""
        return repr(self.text if len(self.text) <= MAX_QUOTE_CHARS else self.text[:MAX_QUOTE_CHARS] + "…")


Check = Callable[[GeneratedAnswer], str | None]  # returns the failure as a sentence; None if the answer passes


def check_not_empty(answer: GeneratedAnswer) -> str | None:
    """Fail an answer without text."""
    return None if answer.text else "the answer is empty"


def check_stops(answer: GeneratedAnswer) -> str | None:
    """Fail an answer that `max_new_tokens` cut off."""
    return None if answer.stopped else f"no end-of-turn token after {answer.tokens:,} tokens"


def check_no_special_tokens(answer: GeneratedAnswer) -> str | None:
    """Fail an answer that contains special tokens."""
    return f"the answer contains {', '.join(answer.special_tokens)}" if answer.special_tokens else None


def check_no_repetition(answer: GeneratedAnswer) -> str | None:
    """Fail an answer most of whose n-grams are repetitions of earlier n-grams."""
    share, unit = repeated_share(answer.text)
    return f"{share:.0%} of its {NGRAM}-{unit} sequences are repetitions" if share > MAX_REPEATED_SHARE else None


def check_no_echo(answer: GeneratedAnswer) -> str | None:
    """Fail an answer that repeats the prompt."""
    return "the answer repeats the prompt" if echoes(answer.prompt.prompt, answer.text) else None


def check_differs_from_base(answer: GeneratedAnswer) -> str | None:
    """Fail an answer that is the base model's answer."""
    return "the base model gives the same answer" if answer.text == answer.base_text else None


def check_as_expected(answer: GeneratedAnswer) -> str | None:
    """Fail an answer that does not meet the prompt's `expect`, `contains` or `expect_json`."""
    prompt, failures = answer.prompt, []
    if prompt.expect is not None and not re.search(prompt.expect, answer.text, re.IGNORECASE):
        failures.append(f"no match for {prompt.expect} in {answer.quoted}")
    if prompt.contains is not None and prompt.contains not in answer.text:
        failures.append(f"no {prompt.contains!r} in {answer.quoted}")
    if prompt.expect_json is not None and (problem := json_schema.problem(prompt.expect_json, answer.text)):
        failures.append(f"{problem}: {answer.quoted}")
    return "; ".join(failures) or None


CHECKS: dict[AnswerCheck, Check] = {
    "not_empty": check_not_empty,
    "stops": check_stops,
    "no_special_tokens": check_no_special_tokens,
    "no_repetition": check_no_repetition,
    "no_echo": check_no_echo,
    "differs_from_base": check_differs_from_base,
    "as_expected": check_as_expected,
}


def check_answer(answer: GeneratedAnswer) -> dict[str, str]:
    """Return the failed checks of an answer in the order of `CHECKS`: name, and failure as a sentence."""
    return {name: failure for name, check in CHECKS.items() if (failure := check(answer))}


def check_results(prompt: Prompt, failures: dict[str, str]) -> dict[str, bool | None]:
    """Return for each check whether the answer passed it; None for `as_expected` if the prompt has no expectation.

    Args:
        failures: what `check_answer` returned for the answer to this prompt.
    """
    results: dict[str, bool | None] = {name: name not in failures for name in CHECKS}
    if prompt.expect is None and prompt.contains is None and prompt.expect_json is None:
        results["as_expected"] = None
    return results


def repeated_share(text: str) -> tuple[float, str]:
    """Return the share of a text's 4-grams that repeat an earlier 4-gram, and the unit of the n-grams.

    The unit is `word`, or `character` for a text that is written without spaces between words. The share is 0 for a
    text of fewer than four units.
    """
    units: Sequence[str] = text.split()
    unit = "word"
    if units and sum(map(len, units)) > MAX_MEAN_WORD_CHARS * len(units):
        units, unit = text, "character"
    ngrams = [tuple(units[i : i + NGRAM]) for i in range(len(units) - NGRAM + 1)]
    return (1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0), unit


def echoes(prompt: str, text: str) -> bool:
    """Return whether a text begins with the prompt, or contains a prompt of four words or more anywhere.

    Case and white space are ignored.
    """
    prompt, text = (" ".join(part.casefold().split()) for part in (prompt, text))
    return text.startswith(prompt) or (len(prompt.split()) >= NGRAM and prompt in text)
