"""Checks of a single answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from include.recipe import Prompt, json_schema

REPEATED_SHARE = 0.5  # more than half of an answer's 4-grams said before: it is going round in circles
NGRAM = 4
LONGEST_WORD = 15  # mean characters of a "word" from which a text is taken to have no spaces between words
QUOTED = 160  # characters of an answer in a finding


def check_answer(prompt: Prompt, answer: str, base_answer: str, special: Sequence[str]) -> dict[str, str]:
    """What an answer has against it: for each check of its text that it fails, a sentence about what was failures.

    Args:
        answer, base_answer: what the adapter and what the bare base say, without the token that ends it.
        special: the special tokens in the answer.
    """
    text, failures = answer.strip(), {}
    quoted = repr(text if len(text) <= QUOTED else text[:QUOTED] + "…")
    share, unit = repeated_share(text)
    if not text:
        failures["not_empty"] = "it says nothing"
    if special:
        failures["no_special_tokens"] = f"it says {', '.join(special)}"
    if share > REPEATED_SHARE:
        failures["no_repetition"] = f"{share:.0%} of its {NGRAM}-{unit} sequences were said before"
    if echoes(prompt.prompt, text):
        failures["no_echo"] = "it says the prompt again"
    if text == base_answer.strip():
        failures["differs_from_base"] = "the base says the same"
    unexpected = []
    if prompt.expect is not None and not re.search(prompt.expect, text, re.IGNORECASE):
        unexpected.append(f"no match for {prompt.expect} in {quoted}")
    if prompt.contains is not None and prompt.contains not in text:
        unexpected.append(f"no {prompt.contains!r} in {quoted}")
    if prompt.expect_json is not None and (problem := json_schema.problem(prompt.expect_json, text)):
        unexpected.append(f"{problem}: {quoted}")
    if unexpected:
        failures["as_expected"] = "; ".join(unexpected)
    return failures


def repeated_share(text: str) -> tuple[float, str]:
    """Share of the 4-grams that have been said before (0 for a text of fewer words), and of what they are: `word`, or
    `character` in a text that is written without spaces between words.
    """
    words: Sequence[str] = text.split()
    unit = "word"
    if words and sum(map(len, words)) > LONGEST_WORD * len(words):
        words, unit = text, "character"
    grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return (1 - len(set(grams)) / len(grams) if grams else 0.0), unit


def echoes(prompt: str, text: str) -> bool:
    """Whether a text begins with the prompt, or holds it anywhere where it has more than a few words."""
    asked, said = (" ".join(part.casefold().split()) for part in (prompt, text))
    return said.startswith(asked) or (len(asked.split()) >= NGRAM and asked in said)
