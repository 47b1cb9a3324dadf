"""smoke_test: load the saved adapter anew, generate answers to the recipe's prompts, and check every answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from include.base_model import fetch_base
from include.chat.chat_format import ChatFormat
from include.data.conversation import Message
from include.engine import supervise
from include.engine.jobs import GenerateJob
from include.evaluation.answer_checks import GeneratedAnswer, check_answer, check_results
from include.pipeline.contracts import SmokeTestOutput, TemplateOutput, TrainOutput
from include.pipeline.stage import Output, Result, StageContext, stage
from include.recipe import Prompt, SmokeTest
from include.storage.files import to_json

TEMPLATE = "chat_template.jinja"


@stage(
    version=4,
    recipe_fields=(
        "base_model", "base_revision", "chat_template", "chat_template_kwargs", "missing_special_tokens",
        "special_tokens_in_text",
        "load_in_4bit", "load_in_8bit",
        "max_seq_length", "seed", *SmokeTest.model_fields,
    ),
)  # fmt: skip
def smoke_test(
    context: StageContext, template: Output[TemplateOutput], train: Output[TrainOutput]
) -> Result[SmokeTestOutput]:
    """Generate answers with the adapter and with the base model; write `answers.json`: answers and checks.

    A failed check does not fail the stage; the gate in `evaluate` decides with the recipe's `required_checks`.
    """
    recipe = context.recipe
    base = fetch_base(recipe, context.store)
    chat = ChatFormat.from_recipe(template.local(TemplateOutput.TOKENIZER) / TemplateOutput.TOKENIZER, recipe)
    stop = template.metadata.stop_tokens
    job = GenerateJob(
        recipe=recipe,
        base=base,
        adapter=train.local() / TrainOutput.ADAPTER,
        prompts=[chat.prompt(messages(prompt)) for prompt in recipe.prompts],
        stop=stop,
        pad=chat.id_of("pad_token"),
        new_tokens=list(template.metadata.new_special_tokens.values()),
    )
    generated = supervise.run(job, context.out, context.progress)
    answers: list[dict[str, Any]] = []
    for prompt, ids, base_ids in zip(recipe.prompts, generated.adapter, generated.base, strict=True):
        stopped = bool(ids) and ids[-1] in stop
        ids = ids[:-1] if stopped else ids
        answer = chat.decode(ids)
        base_answer = chat.decode(base_ids[:-1] if base_ids and base_ids[-1] in stop else base_ids)
        failures = check_answer(
            GeneratedAnswer(prompt, answer.strip(), base_answer.strip(), chat.special_in(ids), len(ids), stopped)
        )
        checks = check_results(prompt, failures)
        result = {"answer": answer, "base": base_answer, "stopped": stopped, "checks": checks, "failures": failures}
        answers.append({**prompt.model_dump(), **result})
        context.progress(
            f"{prompt.prompt} -> {answer!r}" + "".join(f"; fails {name}: {what}" for name, what in failures.items())
        )
    (context.out / SmokeTestOutput.ANSWERS).write_bytes(to_json(answers))
    failed = _failed(answers, recipe.required_checks)
    if (train.local() / TrainOutput.ADAPTER / TEMPLATE).read_bytes() != chat.template.source.encode():
        failed.append(
            f"wrong template: the adapter was trained with another chat template than the current "
            f"{chat.template.name}, with which it was tested"
        )
    passed = sum(not any(name in answer["failures"] for name in recipe.required_checks) for answer in answers)
    summary = f"{passed} of {len(answers)} answers pass the required checks"
    required = list(recipe.required_checks)
    return Result(
        summary,
        SmokeTestOutput.model_validate({"answers": answers, "required": required, "failed": failed, "passed": passed}),
    )


def _failed(answers: list[dict[str, Any]], required: Sequence[str]) -> list[str]:
    """Return a sentence per failed required check: how many answers fail it, and how the first of them fails."""
    sentences = []
    for name in required:
        seen = [answer["failures"][name] for answer in answers if name in answer["failures"]]
        if seen:
            sentences.append(f"smoke test: {len(seen)} of {len(answers)} answers fail {name}: {seen[0]}")
    return sentences


def messages(prompt: Prompt) -> list[Message]:
    """Return the conversation that a prompt starts: the system message, if any, and the user's turn."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.prompt}]
