"""The train job: a LoRA adapter, or a whole model, from token ids, with checkpoints that a later try resumes from."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from include.chat.tokenized import load_rows, sample
from include.chat.tokenizer import copy_tokenizer
from include.engine.arguments import training_config
from include.engine.attention import check_packing, join_rows
from include.engine.checkpoints import ADAPTER, CHECKPOINTS, newest_checkpoint
from include.engine.device_plan import PLAN, Plan, fit, free_memory, make_plan, plain_kernels
from include.engine.distributed import RANK, init_process_group
from include.engine.jobs import Progress, TrainJob, TrainResult
from include.engine.model import load_trainable
from include.engine.save import save_model
from include.errors import BadData, BadRecipe, OutOfMemory, ProcessLost, RetuneError
from include.storage.files import atomic_write, to_json


def train(job: TrainJob, progress: Progress) -> TrainResult:
    """Train, from the newest whole checkpoint if there is one. Several processes may do it together (torchrun); all of
    them return the result, and the first one writes the files.

    Raises:
        ProcessLost: SIGTERM came; a checkpoint of the last finished step has been saved.
        OutOfMemory: a micro-batch did not fit into the device's memory.
        BadRecipe, NotFound: the recipe does not fit the base or the device.
        BadData: the loss is not finite, or far too high.
    """
    recipe = job.recipe
    # imports unsloth, if the plan uses it, before transformers
    plan = make_plan(recipe, job.base, job.micro_batch, job.new_tokens)
    import torch
    from transformers import AutoTokenizer, set_seed

    from include.engine.callback import TrainingCallback, peak_memory

    init_process_group(plan.device)
    rows = load_rows(job.rows)
    plan = fit(plan, recipe, job.base, _lengths(rows), free_memory(plan.device))
    if recipe.device_memory_gib and plan.device == "cuda":
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, recipe.device_memory_gib * 2**30 / total))
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    if plan.engine == "transformers":
        set_seed(recipe.seed)  # for the adapter's first weights; Unsloth sets the seed itself
    longest = int(max(_lengths(rows).max(), _lengths(load_rows(job.holdout)).max()))
    model, plan = _load(job, plan, rows, longest)
    config = training_config(recipe, plan, job.out, job.run_name)
    if RANK == 0:
        atomic_write(job.out / PLAN, to_json(plan.as_dict()))
        for note in plan.notes:
            progress(note)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    callback = TrainingCallback(job.out, recipe, progress, plan.device)
    trainer = _trainer(job, plan, config, model, rows, longest, tokenizer, callback, progress)
    trained: Any = trainer.model
    for name, parameter in trained.named_parameters():
        # TRL casts the adapter of a quantized base to bfloat16, in which small updates are lost.
        if parameter.requires_grad and name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
    checkpoint = newest_checkpoint(job.out / CHECKPOINTS)
    if checkpoint:
        callback.resume(checkpoint)
    callback.handle_sigterm()
    callback.watch(model, plan.accumulation)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        problem = str(error).split(". ")[0]
        raise OutOfMemory(
            f"a micro-batch of {plan.micro_batch} did not fit into memory after step {trainer.state.global_step} "
            f"({problem})",
            "A smaller one is tried",
        ) from error
    except BadData as error:
        raise BadData(f"{error.what}; {callback.describe_last_rows(rows)}", error.do) from error
    if callback.stopped:
        raise ProcessLost(
            f"training was asked to stop and saved step {trainer.state.global_step}",
            "Run again: it resumes from that step",
        )
    if RANK == 0:
        _save(trained, job, plan)
        shutil.rmtree(job.out / CHECKPOINTS, ignore_errors=True)
    first, last = callback.log.first_and_last()
    return TrainResult(
        plan=plan,
        steps=trainer.state.global_step,
        resumed_from=checkpoint.name if checkpoint else None,
        seconds=round(callback.log.seconds(), 2),
        tokens_per_second=round(callback.log.tokens_per_second(), 1),
        tokens=int(trainer.state.num_input_tokens_seen),
        first_losses=first,
        last_losses=last,
        trainable_parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
        peak_memory_bytes=peak_memory(),
    )


def _lengths(rows: Any) -> Any:
    """Return the tokens of each row; of a pair, of its prompt with the longer of its answers."""
    import numpy as np
    import pyarrow.compute as pc

    lengths = {
        name: pc.list_value_length(rows.data.column(name)).to_numpy() for name in rows.column_names if "ids" in name
    }
    if "input_ids" in lengths:
        return lengths["input_ids"]
    return lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])


def _load(job: TrainJob, plan: Plan, rows: Any, longest: int) -> tuple[Any, Plan]:
    """Return the model to train and the plan: with plain kernels, if the fast ones cannot be used with this base.

    Args:
        rows: the training set.
        longest: tokens that no row exceeds.

    Raises:
        BadRecipe: packed rows would see each other.
    """
    import torch
    from transformers import set_seed

    recipe = job.recipe
    model = load_trainable(job.base, recipe, plan)
    if plan.kernels == "fast":
        from include.engine.kernels import use_kernels

        mixed = torch.autocast(plan.device, torch.bfloat16, enabled=plan.dtype == "bfloat16")
        try:
            with mixed:
                done = use_kernels(model, rows, longest, {} if plan.device == "cuda" else None)
            return model, replace(plan, notes=[*plan.notes, f"fast kernels: {', '.join(done)}"])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any class: it depends on the base and on many libraries
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        del model
        gc.collect()
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        plan = fit(plain_kernels(plan, recipe, reason), recipe, job.base, _lengths(rows), free_memory(plan.device))
        set_seed(recipe.seed)
        model = load_trainable(job.base, recipe, plan)
    plain = model if recipe.full_finetuning else model.get_base_model()
    if plan.attention == "rows":
        join_rows(plain)
    if recipe.packing and plan.engine == "transformers":  # Unsloth has another way to say where rows begin
        check_packing(plain)
    return model, plan


def _trainer(
    job: TrainJob, plan: Plan, config: Any, model: Any, rows: Any, longest: int, tokenizer: Any, callback: Any,
    progress: Progress,
) -> Any:  # fmt: skip
    """Return TRL's trainer of the recipe's method, on rows that are token ids already.

    Raises:
        BadRecipe: a package that `report_to` names is not installed, or the settings exclude each other.
    """
    import datasets
    from transformers import EarlyStoppingCallback
    from trl import DPOTrainer, SFTTrainer, pack_dataset

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:  # DPOConfig has no `skip_prepare_dataset`
            return dataset

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if not recipe.full_finetuning:
                # transformers 5.17 loads the adapters in subfolders alone, here TRL's frozen copy `ref`
                trained: Any = self.model
                trained.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
                trained.set_adapter("default")

    datasets.disable_caching()  # the rows are in no file of the dataset's, and nothing may be written beside them
    recipe, callbacks, holdout = job.recipe, [callback], None
    if config.eval_strategy != "no":
        holdout = load_rows(job.holdout)
        holdout = holdout.select(sample(holdout.data, recipe.max_holdout_rows))
    if recipe.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    if recipe.packing:
        rows = pack_dataset(rows.select_columns(["input_ids", "labels"]), recipe.max_seq_length)
    if config.n_gpu > 1:  # transformers would wrap the model in DataParallel and multiply the batch
        raise RetuneError(f"this process sees {config.n_gpu} GPUs and may use one", "Set CUDA_VISIBLE_DEVICES to it")
    kind: Any = PairTrainer if recipe.method == "dpo" else SFTTrainer
    if plan.kernels == "fast":
        from include.engine.joined_trainer import JoinedTrainer

        kind = partial(JoinedTrainer, longest=longest, progress=progress)
    try:
        return kind(
            model=model, args=config, train_dataset=rows, eval_dataset=holdout, processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip
    except RuntimeError as error:
        if recipe.report_to and "requires" in str(error):
            problem = " ".join(str(error).split())
            raise BadRecipe(f"field 'report_to': {problem}", "Install it, or leave it out") from error
        raise
    except ValueError as error:
        problem = " ".join(str(error).split())[:300]
        field = "field 'training_arguments': " if recipe.training_arguments else ""
        raise BadRecipe(f"{field}the trainer refuses the recipe: {problem}", "Correct it and run again") from error


def _save(trained: Any, job: TrainJob, plan: Plan) -> None:
    """Write the adapter, or the whole model, with its tokenizer. Its config names the pinned base, and no folder of
    this machine.
    """
    import torch

    folder: Path = job.out / ADAPTER
    if job.recipe.full_finetuning:
        trained.config._name_or_path = job.base_name
        save_model(trained.to(getattr(torch, plan.dtype)), job.base, folder)
    else:
        config = trained.peft_config["default"]
        config.base_model_name_or_path, config.revision = job.base_name, job.base_revision
        # of the base's embeddings nothing is saved; layers that are trained whole are saved anyway
        trained.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    copy_tokenizer(job.tokenizer, folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `publish` writes the real one
