"""smoke_test: the saved adapter, loaded afresh, answers the recipe's prompts, and every answer is checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from include import json_schema
from include.chat import ChatFormat
from include.engine import supervise
from include.recipe import Check, Prompt, SmokeTest
from include.sharegpt import Message
from include.sources import fetch_base
from include.stage import Job, Result, stage
from include.store import Artifact, to_json
from tasks.template import TOKENIZER
from tasks.train import ADAPTER

ANSWERS, TEMPLATE = "answers.json", "chat_template.jinja"
REPEATED_SHARE = 0.5  # more than half of an answer's 4-grams said before: it is going round in circles
NGRAM = 4
LONGEST_WORD = 15  # mean characters of a "word" from which a text is taken to have no spaces between words
QUOTED = 160  # characters of an answer in a finding


@stage(
    version=2,
    uses=(
        "base_model", "base_revision", "chat_template", "missing_special_tokens", "load_in_4bit", "load_in_8bit",
        "max_seq_length", "seed", *SmokeTest.model_fields,
    ),
)  # fmt: skip
def smoke_test(job: Job, template: Artifact, train: Artifact) -> Result:
    """Generate with the adapter and with the bare base, and leave `answers.json`: answers and checks.

    A failed check does not fail the stage; the gate in `evaluate` decides with the recipe's `required_checks`.
    """
    recipe = job.recipe
    base = fetch_base(recipe, job.store)
    chat = ChatFormat(template.local(TOKENIZER) / TOKENIZER, recipe)
    stop = template.facts["stop_tokens"]
    said = supervise.run(
        "generate",
        {
            "recipe": recipe.model_dump(mode="json"),
            "base": base,
            "adapter": train.local() / ADAPTER,
            "prompts": [chat.prompt(messages(prompt)) for prompt in recipe.prompts],
            "stop": stop,
            "pad": chat.id_of("pad_token"),
        },
        job.out,
        job.say,
    )
    answers: list[dict[str, Any]] = []
    for prompt, ids, base_ids in zip(recipe.prompts, said["adapter"], said["base"], strict=True):
        stopped = bool(ids) and ids[-1] in stop
        ids = ids[:-1] if stopped else ids
        answer = chat.decode(ids)
        by_base = chat.decode(base_ids[:-1] if base_ids and base_ids[-1] in stop else base_ids)
        seen = look(prompt, answer, by_base, chat.special_in(ids))
        if not stopped:
            seen["stops"] = f"it is not at its end after {len(ids):,} tokens"
        checks: dict[str, bool | None] = {name: name not in seen for name in get_args(Check)}
        if prompt.expect is None and prompt.contains is None and prompt.expect_json is None:
            checks["as_expected"] = None
        said_and_seen = {"answer": answer, "base": by_base, "stopped": stopped, "checks": checks, "seen": seen}
        answers.append({**prompt.model_dump(), **said_and_seen})
        job.say(f"{prompt.prompt} -> {answer!r}" + "".join(f"; fails {name}: {what}" for name, what in seen.items()))
    (job.out / ANSWERS).write_bytes(to_json(answers))
    failed = _failed(answers, recipe.required_checks)
    if (train.local() / ADAPTER / TEMPLATE).read_text("utf-8") != chat.template:
        failed.append(
            f"wrong template: the adapter was trained with another chat template than {recipe.chat_template} as it is "
            "now, with which it was tested"
        )
    passed = sum(not any(name in answer["seen"] for name in recipe.required_checks) for answer in answers)
    line = f"{passed} of {len(answers)} answers pass the required checks"
    required = list(recipe.required_checks)
    return Result(line, {"answers": answers, "required": required, "failed": failed, "passed": passed})


def _failed(answers: list[dict[str, Any]], required: Sequence[str]) -> list[str]:
    """A sentence for each required check that answers fail: how many do, and what was seen in the first of them."""
    sentences = []
    for name in required:
        seen = [answer["seen"][name] for answer in answers if name in answer["seen"]]
        if seen:
            sentences.append(f"smoke test: {len(seen)} of {len(answers)} answers fail {name}: {seen[0]}")
    return sentences


def messages(prompt: Prompt) -> list[Message]:
    """The conversation that the prompt opens."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.prompt}]


def look(prompt: Prompt, answer: str, by_base: str, special: Sequence[str]) -> dict[str, str]:
    """What an answer has against it: for each check of its text that it fails, a sentence about what was seen.

    Args:
        answer, by_base: what the adapter and what the bare base say, without the token that ends it.
        special: the special tokens in the answer.
    """
    text, seen = answer.strip(), {}
    quoted = repr(text if len(text) <= QUOTED else text[:QUOTED] + "…")
    share, unit = repeated_share(text)
    if not text:
        seen["not_empty"] = "it says nothing"
    if special:
        seen["no_special_tokens"] = f"it says {', '.join(special)}"
    if share > REPEATED_SHARE:
        seen["no_repetition"] = f"{share:.0%} of its {NGRAM}-{unit} sequences were said before"
    if echoes(prompt.prompt, text):
        seen["no_echo"] = "it says the prompt again"
    if text == by_base.strip():
        seen["differs_from_base"] = "the base says the same"
    unexpected = []
    if prompt.expect is not None and not re.search(prompt.expect, text, re.IGNORECASE):
        unexpected.append(f"no match for {prompt.expect} in {quoted}")
    if prompt.contains is not None and prompt.contains not in text:
        unexpected.append(f"no {prompt.contains!r} in {quoted}")
    if prompt.expect_json is not None and (problem := json_schema.problem(prompt.expect_json, text)):
        unexpected.append(f"{problem}: {quoted}")
    if unexpected:
        seen["as_expected"] = "; ".join(unexpected)
    return seen


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
