"""train: train the adapter (or the whole model) in a process of its own, with checkpoints for retries."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from upath import UPath

from include.base_model import fetch_base
from include.data.sources import is_hub_id
from include.engine import supervise
from include.engine.checkpoints import CHECKPOINTS, TRAINING_LOG, checkpoint_step, newest_checkpoint
from include.engine.device_plan import PLAN
from include.engine.jobs import TrainJob
from include.errors import BadData, BadRecipe, OutOfMemory, TransientError
from include.evaluation.gate import rows_needed
from include.pipeline.contracts import TemplateOutput, TrainOutput
from include.pipeline.stage import Output, Result, StageContext, stage
from include.recipe import Lora, Training
from include.storage.files import MANIFEST, atomic_write, describe_files, remove, to_json
from include.storage.object_store import download, list_dir, read_all, upload

OOM_EVENTS = "out_of_memory.json"
RESUME_FILES = (TRAINING_LOG, OOM_EVENTS)  # needed to resume a training, besides its checkpoint


@stage(
    version=7,
    recipe_fields=(
        "base_model", "base_revision", "load_in_4bit", "load_in_8bit", "max_seq_length", "max_holdout_rows",
        *Lora.model_fields, *(field for field in Training.model_fields if field not in ("hang_timeout", "sweep")),
    ),
    other_fields=("hang_timeout", "gate_confidence"),  # the latter decides only whether the stage fails
    resumable=True,
)  # fmt: skip
def train(context: StageContext, template: Output[TemplateOutput]) -> Result[TrainOutput]:
    """Train on the ids and masks of `template`; write `adapter/` and `training_log.jsonl`.

    Training resumes from the newest complete checkpoint of an earlier try, in the work folder or in the store.

    Raises:
        ProcessLost: the process died or was stopped; a retry resumes.
        BadRecipe, BadData: the settings do not fit the model or the device, too few held-out rows are left for the
            gate, or the loss is not a finite number.
    """
    recipe = context.recipe
    held_out, needed = template.metadata.holdout.conversations, rows_needed(recipe.gate_confidence)
    if held_out < needed:  # `standardize` has refused fewer; since then rows that are too long were left out
        raise BadData(
            f"too few held-out rows: {held_out:,} are left, and the gate needs {needed}",
            "Hold out more rows, or raise max_seq_length if rows were left out as too long",
        )
    prepared = template.local()
    on_hub = is_hub_id(recipe.base_model)
    base = fetch_base(recipe, context.store)
    job = TrainJob(
        recipe=recipe,
        base=base,
        base_name=recipe.base_model if on_hub else str(base),
        base_revision=recipe.base_revision if on_hub else None,
        tokenizer=prepared / TemplateOutput.TOKENIZER,
        rows=template.files(TemplateOutput.TRAIN),
        holdout=template.files(TemplateOutput.HOLDOUT),
        out=context.out,
        run_name=recipe.name,
        new_tokens=list(template.metadata.new_special_tokens.values()),
    )
    output = _train_with_what_fits(context, job)
    resumed = f", resumed from {output.resumed_from}" if output.resumed_from else ""
    summary = (
        f"{output.steps} steps, loss {output.first_losses:.3f} -> {output.last_losses:.3f}, "
        f"{output.tokens_per_second:,.0f} tokens/s on {output.plan.device_name}{resumed}"
    )
    return Result(summary, output)


def _train_with_what_fits(context: StageContext, job: TrainJob) -> TrainOutput:
    """Train. After running out of memory, resume from the last checkpoint with half the micro-batch and twice the
    accumulation; later tries keep the smaller micro-batch. The effective batch stays the recipe's.
    """
    recipe, kept, checkpoints = context.recipe, context.out / OOM_EVENTS, CheckpointCopy(context)
    checkpoints.fetch()
    batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps // recipe.num_processes
    events: list[dict[str, Any]] = orjson.loads(kept.read_bytes()) if kept.exists() else []
    while True:
        job = replace(job, micro_batch=events[-1]["micro_batch"] if events else None)
        try:
            result = supervise.run(job, context.out, context.progress, recipe.hang_timeout, checkpoints.upload)
            checkpoints.drop()
            return TrainOutput.model_validate({**dict(result), "out_of_memory": events})
        except OutOfMemory as error:
            micro = orjson.loads((context.out / PLAN).read_bytes())["micro_batch"]
            smaller = max((n for n in range(1, micro // 2 + 1) if batch % n == 0), default=0)
            if not smaller:
                raise BadRecipe(
                    f"a single conversation does not fit into the device's memory ({error.what})",
                    "Lower max_seq_length or r, or train on a larger device",
                ) from error
            events.append({"what": error.what, "micro_batch": smaller})
            atomic_write(kept, to_json(events))
            context.progress(f"{error.what}: retrying with {smaller} x {batch // smaller}")


class CheckpointCopy:
    """The newest complete checkpoint of an unfinished training, with its log, in a store that is not on this machine.
    A retry on another machine resumes from it.
    """

    def __init__(self, context: StageContext):
        self._context, self._folder = context, context.out / CHECKPOINTS
        self._stored = context.store.path(context.recipe.name, "train", f"{context.out.name}.{CHECKPOINTS}")

    def fetch(self) -> None:
        """Fetch the checkpoint, unless this machine has a newer one.

        Raises:
            NoPermission, TransientError: the store cannot be read, or does not answer.
        """
        if self._context.store.is_local:
            return
        with self._context.store.read_errors():
            paths = [
                self._stored / name / MANIFEST for name in list_dir(self._stored) if name.startswith("checkpoint-")
            ]
            manifests = {path.parent: orjson.loads(content) for path, content in read_all(paths).items()}
            newest = max(manifests, key=checkpoint_step, default=None)
            here = newest_checkpoint(self._folder)
            if newest is None or (here and checkpoint_step(here) >= checkpoint_step(newest)):
                return
            for name, content in read_all(self._stored / name for name in RESUME_FILES).items():
                atomic_write(self._context.out / name.name, content)
            download(newest, [*manifests[newest]["files"], MANIFEST], self._folder / newest.name)
        self._context.progress(f"fetched {newest.name} from the store")

    def upload(self, checkpoint: Path) -> None:
        """Copy a checkpoint to the store, its manifest last, and remove earlier ones.

        If the store does not answer, only log a warning: that must not end hours of training.
        """
        if self._context.store.is_local:
            return
        target, snapshot = (
            self._stored / checkpoint.name,
            self._context.out.with_name(f".{self._context.out.name}.snapshot"),
        )
        shutil.rmtree(snapshot, ignore_errors=True)
        try:  # training continues meanwhile and may remove this checkpoint
            shutil.copytree(checkpoint, snapshot, copy_function=os.link)
            files = orjson.loads((snapshot / MANIFEST).read_bytes())["files"]
        except (FileNotFoundError, shutil.Error):
            return
        try:
            if describe_files(snapshot) == files:
                self._upload(snapshot, files, target)
        except TransientError as error:
            self._context.progress(f"WARNING: {checkpoint.name} is on this machine only: {error}")
        finally:
            shutil.rmtree(snapshot)

    def _upload(self, snapshot: Path, files: dict[str, Any], target: UPath) -> None:
        out = self._context.out
        with self._context.store.write_errors():
            upload(snapshot, files, target)
            upload(out, (name for name in RESUME_FILES if (out / name).exists()), self._stored)
            atomic_write(target / MANIFEST, (snapshot / MANIFEST).read_bytes())
            for older in list_dir(self._stored):
                if older.startswith("checkpoint-") and older != target.name:
                    remove(self._stored / older)

    def drop(self) -> None:
        """Remove the checkpoint from the store when the training is finished."""
        if not self._context.store.is_local:
            with self._context.store.write_errors():
                remove(self._stored)
