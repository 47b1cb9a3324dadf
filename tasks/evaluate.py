"""evaluate: the candidate against the base and against what is live, row by row on the holdout, and the verdict."""

from __future__ import annotations

import shutil
from pathlib import Path

from include.base_model import fetch_base
from include.engine import supervise
from include.evaluation.gate import judge, rows_needed
from include.evaluation.prompt_control import write_with_shuffled_prompts
from include.pipeline.contracts import EvaluateOutput, LiveVersion, SmokeTestOutput, TemplateOutput, TrainOutput
from include.pipeline.stage import Output, Result, StageContext, stage
from include.recipe import Gate
from include.registry import Version, content_digest, open_registry
from include.storage.files import to_json
from tasks.smoke_test import TEMPLATE


def candidate_content(train: Output[TrainOutput]) -> str:
    """The digest that the candidate would have as a published version."""
    prefix = f"{TrainOutput.ADAPTER}/"
    files = {
        name.removeprefix(prefix): file for name, file in train.manifest["files"].items() if name.startswith(prefix)
    }
    return content_digest(files)


def live_version(context: StageContext, train: Output[TrainOutput]) -> Version | None:
    """What is live now, unless it is the candidate itself."""
    live = open_registry(str(context.recipe.registry)).live()
    return None if live is None or live.content == candidate_content(train) else live


@stage(
    version=3,
    recipe_fields=(
        "method", "beta", "base_model", "base_revision", "load_in_4bit", "load_in_8bit", "max_seq_length",
        "max_holdout_rows", *Gate.model_fields,
    ),
    other_fields=(  # the device plan reads them; the numbers do not depend on them
        "engine", "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "optim", "packing",
        "full_finetuning", "registry",
    ),
    external_inputs=lambda context, train, **_: (live := live_version(context, train)) and [live.revision, live.content],
)  # fmt: skip
def evaluate(
    context: StageContext,
    template: Output[TemplateOutput],
    train: Output[TrainOutput],
    smoke_test: Output[SmokeTestOutput],
) -> Result[EvaluateOutput]:
    """Measure the loss of every holdout row for base, candidate and live adapter, and judge; leave `losses.json`."""
    recipe = context.recipe
    registry, live = open_registry(str(recipe.registry)), live_version(context, train)
    adapters = {"candidate": train.local() / TrainOutput.ADAPTER}
    if live:
        adapters["live"] = registry.fetch(live.revision)
    rows, held_out = context.out / "rows", template.local(TemplateOutput.HOLDOUT) / TemplateOutput.HOLDOUT
    count, swapped = write_with_shuffled_prompts(held_out, rows, recipe.max_holdout_rows, recipe.max_seq_length)
    names = ("base", *adapters)
    measured = supervise.run(
        "losses",
        {
            "recipe": recipe.to_json(),
            "base": fetch_base(recipe, context.store),
            "rows": rows,
            "most": count + len(swapped),
            "adapters": adapters,
        },
        context.out,
        context.progress,
    )
    shutil.rmtree(rows)
    losses = {name: measured["losses"][name][:count] for name in names}
    other_question = {name: measured["losses"][name][count:] for name in names}
    (context.out / EvaluateOutput.LOSSES).write_bytes(
        to_json(
            {
                "row": measured["row"][:count],
                "tokens": measured["tokens"][:count],
                "losses": losses,
                "other_question": {"row": measured["row"][count:], "losses": other_question},
                "plan": measured["plan"],
            }
        )
    )
    questions = None
    if len(swapped) >= rows_needed(recipe.gate_confidence):
        questions = [losses["candidate"][place] for place in swapped], other_question["candidate"]
    verdict = judge(
        losses, smoke_test.metadata.failed, recipe.gate_confidence, recipe.gate_margin, questions,
        recipe.gate_questions_matter,
    )  # fmt: skip
    if live and _template_differs(adapters):
        verdict.notes.append(
            f"{live.name} was trained with another chat template; here it is measured with the candidate's, which puts "
            "it at a disadvantage"
        )
    against = verdict.against_base
    summary = f"loss {against.other:.3f} (base) -> {against.candidate:.3f}"
    if live and verdict.against_live:
        summary += f", live {live.name} {verdict.against_live.other:.3f}"
    for reason in verdict.reasons:
        context.progress(f"against it: {reason}")
    for note in verdict.notes:
        context.progress(f"WARNING: {note}")
    summary += f" on {count} holdout rows: "
    summary += (
        "better" if verdict.publish else "refused: " + "; ".join(reason.partition(":")[0] for reason in verdict.reasons)
    )
    return Result(
        summary,
        EvaluateOutput(
            verdict=verdict,
            confidence=recipe.gate_confidence,
            margin=recipe.gate_margin,
            holdout_rows=count,
            live=LiveVersion(name=live.name, revision=live.revision) if live else None,
        ),
    )


def _template_differs(adapters: dict[str, Path]) -> bool:
    """Whether the live adapter names another chat template than the candidate, with whose rows both are measured."""
    files = [folder / TEMPLATE for folder in adapters.values()]
    return all(file.is_file() for file in files) and len({file.read_text("utf-8") for file in files}) > 1
