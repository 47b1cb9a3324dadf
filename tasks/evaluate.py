"""evaluate: compare the candidate with the base and with the live adapter, row by row on the holdout."""

from __future__ import annotations

from pathlib import Path

from include.base_model import fetch_base
from include.engine import supervise
from include.engine.jobs import LossesJob
from include.evaluation.gate import by_conversation, judge, rows_needed
from include.evaluation.prompt_control import write_with_shuffled_prompts
from include.pipeline.contracts import EvaluateOutput, LiveVersion, SmokeTestOutput, TemplateOutput, TrainOutput
from include.pipeline.stage import Output, Result, StageContext, stage
from include.recipe import Gate
from include.registry import Version, content_digest, open_registry
from include.storage.files import to_json
from tasks.smoke_test import TEMPLATE


def candidate_content(train: Output[TrainOutput]) -> str:
    """Return the content digest that the candidate would have as a published version."""
    prefix = f"{TrainOutput.ADAPTER}/"
    files = {
        name.removeprefix(prefix): file for name, file in train.manifest["files"].items() if name.startswith(prefix)
    }
    return content_digest(files)


def live_version(context: StageContext, train: Output[TrainOutput]) -> Version | None:
    """Return the live version; None if nothing is live, or if the candidate itself is the live version."""
    live = open_registry(str(context.recipe.registry)).live()
    return None if live is None or live.content == candidate_content(train) else live


@stage(
    version=7,
    recipe_fields=(
        "method", "beta", "base_model", "base_revision", "load_in_4bit", "load_in_8bit", "max_seq_length",
        "max_holdout_rows", *Gate.model_fields,
    ),
    other_fields=("registry",),
    external_inputs=lambda context, train, **_: [
        [live.revision, live.content] for live in [live_version(context, train)] if live
    ],
)  # fmt: skip
def evaluate(
    context: StageContext,
    template: Output[TemplateOutput],
    train: Output[TrainOutput],
    smoke_test: Output[SmokeTestOutput],
) -> Result[EvaluateOutput]:
    """Measure every holdout row's loss for base, candidate and live adapter; write `losses.json` and the verdict.

    The verdict compares whole conversations: the pieces of one that was split count as one.
    """
    recipe = context.recipe
    registry, live = open_registry(str(recipe.registry)), live_version(context, train)
    adapters = {"candidate": train.local() / TrainOutput.ADAPTER}
    if live:
        adapters["live"] = registry.fetch(live.revision)
    arrow, held_out = context.out / "rows.arrow", template.files(TemplateOutput.HOLDOUT)
    count, shuffled = write_with_shuffled_prompts(held_out, arrow, recipe.max_holdout_rows, recipe.max_seq_length)
    names = ("base", *adapters)
    job = LossesJob(
        recipe=recipe,
        base=fetch_base(recipe, context.store),
        rows=[arrow],
        max_rows=count + len(shuffled),
        adapters=adapters,
        new_tokens=list(template.metadata.new_special_tokens.values()),
    )
    measured = supervise.run(job, context.out, context.progress)
    arrow.unlink()
    losses = {name: measured.losses[name][:count] for name in names}
    shuffled_prompts = {name: measured.losses[name][count:] for name in names}
    (context.out / EvaluateOutput.LOSSES).write_bytes(
        to_json(
            {
                "row": measured.row[:count],
                "tokens": measured.tokens[:count],
                "losses": losses,
                "shuffled_prompts": {"row": measured.row[count:], "losses": shuffled_prompts},
                "device": measured.device.as_dict(),
            }
        )
    )
    rows, tokens = measured.row[:count], measured.tokens[:count]
    whole = {name: by_conversation(rows, tokens, losses[name]) for name in names}
    conversations = len(whole["base"])
    prompt_control = None
    numbers, lengths = [rows[place] for place in shuffled], [tokens[place] for place in shuffled]
    if len(set(numbers)) >= rows_needed(recipe.gate_confidence):
        own = by_conversation(numbers, lengths, [losses["candidate"][place] for place in shuffled])
        prompt_control = own, by_conversation(numbers, lengths, shuffled_prompts["candidate"])
    verdict = judge(
        whole, smoke_test.metadata.failed, recipe.gate_confidence, recipe.gate_margin, prompt_control,
        recipe.gate_prompt_control,
    )  # fmt: skip
    if live and _template_differs(adapters):
        verdict.notes.append(
            f"{live.name} was trained with another chat template. Both are measured with the candidate's template, "
            f"which puts {live.name} at a disadvantage"
        )
    against = verdict.against_base
    summary = f"loss {against.other:.3f} (base) -> {against.candidate:.3f}"
    if live and verdict.against_live:
        summary += f", live {live.name} {verdict.against_live.other:.3f}"
    for reason in verdict.reasons:
        context.progress(f"reason against this candidate: {reason}")
    for note in verdict.notes:
        context.progress(f"WARNING: {note}")
    pieces = f" in {count} pieces" if count > conversations else ""
    summary += f" on {conversations} holdout rows{pieces}: "
    summary += (
        "better" if verdict.publish else "refused: " + "; ".join(reason.partition(":")[0] for reason in verdict.reasons)
    )
    return Result(
        summary,
        EvaluateOutput(
            verdict=verdict,
            confidence=recipe.gate_confidence,
            margin=recipe.gate_margin,
            holdout_rows=conversations,
            live=LiveVersion(name=live.name, revision=live.revision) if live else None,
        ),
    )


def _template_differs(adapters: dict[str, Path]) -> bool:
    """Return whether the live adapter was trained with another chat template than the candidate."""
    files = [folder / TEMPLATE for folder in adapters.values()]
    return all(file.is_file() for file in files) and len({file.read_text("utf-8") for file in files}) > 1
