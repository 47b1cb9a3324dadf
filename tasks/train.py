"""train: the adapter, by QLoRA, in a process of its own that survives retries."""

from __future__ import annotations

from typing import Any

import orjson

from include.engine import supervise
from include.engine.plan import PLAN
from include.errors import BadRecipe, OutOfMemory
from include.recipe import Lora, Training
from include.sources import fetch_base, is_hub_id
from include.stage import Job, Result, stage
from include.store import Artifact, to_json, write_aside
from tasks.template import HOLDOUT, TOKENIZER, TRAIN

ADAPTER, SMALLER = "adapter", "out_of_memory.json"


@stage(
    version=2,
    uses=(
        "base_model", "base_revision", "load_in_4bit", "load_in_8bit", "max_seq_length", "max_holdout_rows",
        *Lora.model_fields, *(field for field in Training.model_fields if field != "hang_timeout"),
    ),
    resumable=True,
)  # fmt: skip
def train(job: Job, template: Artifact) -> Result:
    """Train on the ids and masks of `template`; leave `adapter/` and `training_log.jsonl`.

    An earlier try's whole checkpoints are in the work folder, and training goes on from the newest of them.

    Raises:
        ProcessLost: the process died or was stopped; a retry goes on.
        BadRecipe, BadData: the settings do not fit the model or the device, or the loss is not a number any more.
    """
    recipe, prepared = job.recipe, template.local()
    on_hub = is_hub_id(recipe.base_model)
    base = fetch_base(recipe, job.store)
    work = {
        "recipe": recipe.model_dump(mode="json"),
        "base": base,
        "base_name": recipe.base_model if on_hub else str(base),
        "base_revision": recipe.base_revision if on_hub else None,
        "tokenizer": prepared / TOKENIZER,
        "rows": prepared / TRAIN,
        "holdout": prepared / HOLDOUT,
        "out": job.out,
    }
    done = _train_in_memory(job, work)
    resumed = f", went on from {done['resumed_from']}" if done["resumed_from"] else ""
    line = (
        f"{done['steps']} steps, loss {done['first_losses']:.3f} -> {done['last_losses']:.3f}, "
        f"{done['tokens_per_second']:,.0f} tokens/s on {done['plan']['device_name']}{resumed}"
    )
    return Result(line, done)


def _train_in_memory(job: Job, work: dict[str, Any]) -> dict[str, Any]:
    """Train; after running out of memory go on from the last checkpoint with half the micro-batch, which the next tries
    keep. The effective batch stays the recipe's.
    """
    recipe, kept = job.recipe, job.out / SMALLER
    batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    events: list[dict[str, Any]] = orjson.loads(kept.read_bytes()) if kept.exists() else []
    while True:
        most = {"micro_batch": events[-1]["micro_batch"]} if events else {}
        try:
            done = supervise.run("train", {**work, **most}, job.out, job.say, recipe.hang_timeout)
            return {**done, "out_of_memory": events}
        except OutOfMemory as error:
            micro = orjson.loads((job.out / PLAN).read_bytes())["micro_batch"]
            smaller = max((n for n in range(1, micro // 2 + 1) if batch % n == 0), default=0)
            if not smaller:
                raise BadRecipe(
                    f"a single conversation does not fit into the device's memory ({error.what})",
                    "Lower max_seq_length or r, or train on a larger device",
                ) from error
            events.append({"what": error.what, "micro_batch": smaller})
            write_aside(kept, to_json(events))
            job.say(f"{error.what}: going on with {smaller} x {batch // smaller}")
