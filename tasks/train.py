"""train: the adapter, by QLoRA, in a process of its own that survives retries."""

from __future__ import annotations

from include.engine import supervise
from include.recipe import Lora, Training
from include.sources import fetch_base, is_hub_id
from include.stage import Job, Result, stage
from include.store import Artifact
from tasks.template import TOKENIZER, TRAIN

ADAPTER = "adapter"


@stage(
    version=1,
    uses=("base_model", "base_revision", "load_in_4bit", "max_seq_length", *Lora.model_fields, *Training.model_fields),
    resumable=True,
)
def train(job: Job, template: Artifact) -> Result:
    """Train on the ids and masks of `template`; leave `adapter/` and `training_log.jsonl`.

    An earlier try's whole checkpoints are in the work folder, and training goes on from the newest of them.

    Raises:
        ProcessLost: the process died or was stopped; a retry goes on.
        BadRecipe, BadData: the settings do not fit the model, or the loss is not a number any more.
    """
    recipe, prepared = job.recipe, template.local()
    on_hub = is_hub_id(recipe.base_model)
    base = fetch_base(recipe, job.store)
    done = supervise.run(
        "train",
        {
            "recipe": recipe.model_dump(mode="json"),
            "base": base,
            "base_name": recipe.base_model if on_hub else str(base),
            "base_revision": recipe.base_revision if on_hub else None,
            "tokenizer": prepared / TOKENIZER,
            "rows": prepared / TRAIN,
            "out": job.out,
        },
        job.out,
        job.say,
    )
    resumed = f", went on from {done['resumed_from']}" if done["resumed_from"] else ""
    line = (
        f"{done['steps']} steps, loss {done['first_losses']:.3f} -> {done['last_losses']:.3f}, "
        f"{done['tokens_per_second']:,.0f} tokens/s on {done['plan']['device_name']}{resumed}"
    )
    return Result(line, done)
