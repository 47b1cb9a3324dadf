"""smoke_test: the saved adapter, loaded afresh, answers the recipe's prompts, and every answer is checked."""

from __future__ import annotations

import re
from typing import Any

from include.chat import CONTROL, ChatFormat
from include.engine import supervise
from include.recipe import Prompt, SmokeTest
from include.sharegpt import Message
from include.sources import fetch_base
from include.stage import Job, Result, stage
from include.store import Artifact, to_json
from tasks.template import TOKENIZER
from tasks.train import ADAPTER

ANSWERS = "answers.json"
REPEATED_SHARE = 0.5  # more than half of an answer's 4-grams seen before: it is going round in circles
NGRAM = 4


@stage(
    version=1,
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
    chat = ChatFormat(template.local() / TOKENIZER, recipe)
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
    answers = []
    for prompt, ids, base_ids in zip(recipe.prompts, said["adapter"], said["base"], strict=True):
        stopped = bool(ids) and ids[-1] in stop
        answer = chat.decode(ids[:-1] if stopped else ids)
        by_base = chat.decode(base_ids[:-1] if base_ids and base_ids[-1] in stop else base_ids)
        checks = check(prompt, answer, by_base, stopped)
        answers.append({**prompt.model_dump(), "answer": answer, "base": by_base, "stopped": stopped, "checks": checks})
        job.say(
            f"{prompt.prompt} -> {answer!r}" + "".join(f", fails {c}" for c, good in checks.items() if good is False)
        )
    (job.out / ANSWERS).write_bytes(to_json(answers))
    required = {name: sum(answer["checks"][name] is False for answer in answers) for name in recipe.required_checks}
    passed = sum(all(answer["checks"][name] is not False for name in recipe.required_checks) for answer in answers)
    line = f"{passed} of {len(answers)} answers pass the required checks"
    failed = [
        f"smoke test: {count} of {len(answers)} answers fail '{name}'" for name, count in required.items() if count
    ]
    return Result(line, {"answers": answers, "failed": failed, "passed": passed})


def messages(prompt: Prompt) -> list[Message]:
    """The conversation that the prompt opens."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.prompt}]


def check(prompt: Prompt, answer: str, by_base: str, stopped: bool) -> dict[str, bool | None]:
    """The named checks of one answer: True, False, or None where the recipe asks nothing."""
    text = answer.strip()
    return {
        "not_empty": bool(text),
        "stops": stopped,
        "no_special_tokens": re.search(CONTROL, text) is None,
        "no_repetition": repeated_share(text) <= REPEATED_SHARE,
        "no_echo": not text.casefold().startswith(prompt.prompt.strip().casefold()),
        "differs_from_base": text != by_base.strip(),
        "as_expected": None if prompt.expect is None else re.search(prompt.expect, text, re.IGNORECASE) is not None,
    }


def repeated_share(text: str) -> float:
    """Share of the 4-grams of words that have been said before; 0 for a text of fewer words."""
    words: list[Any] = text.split()
    grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
