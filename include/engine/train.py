"""The train job: a LoRA adapter, or a whole model, from token ids, with checkpoints that a later try goes on from."""

from __future__ import annotations

import math
import resource
import shutil
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import orjson

from include.chat.tokenized import load_rows
from include.engine.attention import use_varlen
from include.engine.device_plan import PLAN, Plan, fit, free_memory, make_plan
from include.engine.distributed import RANK, highest, join
from include.engine.model import load_trainable
from include.errors import BadData, BadRecipe, OutOfMemory, ProcessLost
from include.storage.files import MANIFEST, atomic_write, describe_files, to_json

ADAPTER, CHECKPOINTS, TRAINING_LOG = "adapter", "checkpoints", "training_log.jsonl"


def train(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """Train, from the newest whole checkpoint where there is one. Several processes may do it together (torchrun); all
    of them return the result, and the first one writes.

    Args:
        job: `recipe` (its fields), `base`, `tokenizer` (folders), `rows` (folder, see `include.chat.tokenized`), `out` (folder),
            `base_name` and `base_revision` (what the adapter's config names as its base).
        say: takes a line for people.

    Returns:
        Plan, steps, seconds, tokens, losses and memory as plain JSON values.

    Raises:
        ProcessLost: SIGTERM came; a checkpoint of the last finished step has been saved.
        BadData: the loss is not a number any more.
    """
    recipe, out = job["recipe"], Path(job["out"])
    plan = make_plan(recipe, job.get("micro_batch"))  # imports unsloth, where it is to be used, before transformers
    import torch
    from transformers import AutoTokenizer, set_seed

    join(plan.device)
    rows = load_rows(job["rows"])
    plan = fit(plan, recipe, job["base"], _longest(rows), free_memory(plan.device))
    if recipe["device_memory_gb"] and plan.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, recipe["device_memory_gb"] * 2**30 / torch.cuda.get_device_properties().total_memory)
        )
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    if plan.engine == "transformers":
        set_seed(recipe["seed"])  # the adapter's first weights; Unsloth takes the seed itself
    model = load_trainable(job["base"], recipe, plan)
    if plan.attention == "varlen":
        use_varlen(model if recipe["full_finetuning"] else model.get_base_model())
    settings = _settings(recipe, plan, out)
    if RANK == 0:
        atomic_write(out / PLAN, to_json(plan.as_dict()))
        for note in plan.notes:
            say(note)
    types = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    journal = _journal_class()(out, recipe, say, plan.device)
    trainer = _trainer(job, settings, model, rows, tokenizer, journal)
    trained: Any = trainer.model
    for name, parameter in trained.named_parameters():
        # TRL casts the adapter of a quantized base to bfloat16, in which small updates are lost.
        if parameter.requires_grad and name in types:
            parameter.data = parameter.data.to(types[name])
    checkpoint = newest_checkpoint(out / CHECKPOINTS)
    if checkpoint:
        journal.go_on_from(checkpoint)
    journal.watch_signals()
    journal.watch_batches(model, plan.accumulation)
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
        raise BadData(f"{error.what}; {journal.rows_of_last_step(rows)}", error.do) from error
    if journal.stopped:
        raise ProcessLost(
            f"training was asked to stop and saved step {trainer.state.global_step}",
            "Run again: it goes on from there",
        )
    if RANK == 0:
        _save(trained, tokenizer, job, out / ADAPTER, plan)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    losses = [entry["loss"] for entry in journal.entries]
    return {
        "plan": plan.as_dict(),
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint.name if checkpoint else None,
        "seconds": round(journal.seconds(), 2),
        "tokens_per_second": round(journal.tokens_per_second(), 1),
        "tokens": int(trainer.state.num_input_tokens_seen),
        "first_losses": sum(losses[:10]) / len(losses[:10]),
        "last_losses": sum(losses[-10:]) / len(losses[-10:]),
        "trainable_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "peak_memory_bytes": _peak_memory(),
    }


def _longest(rows: Any) -> int:
    """Tokens of the longest sequence: of a row, or of a pair's prompt with one of its answers."""
    import numpy as np
    import pyarrow.compute as pc

    lengths = {
        name: pc.list_value_length(rows.data.column(name)).to_numpy() for name in rows.column_names if "ids" in name
    }
    if "input_ids" in lengths:
        return int(lengths["input_ids"].max())
    return int((lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])).max())


def _settings(recipe: dict[str, Any], plan: Plan, out: Path) -> Any:
    """The recipe and the plan as the trainer takes them: a TRL SFTConfig or DPOConfig."""
    settings: dict[str, Any] = {
        "output_dir": str(out / CHECKPOINTS),
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "max_steps": recipe["max_steps"],
        "num_train_epochs": recipe["num_train_epochs"],
        "learning_rate": recipe["learning_rate"],
        "lr_scheduler_type": recipe["lr_scheduler_type"],
        "warmup_steps": recipe["warmup_steps"],
        "optim": plan.optim,
        "weight_decay": recipe["weight_decay"],
        "seed": recipe["seed"],
        "bf16": plan.dtype == "bfloat16",
        "fp16": plan.dtype == "float16",
        "use_cpu": plan.device == "cpu",
        "use_liger_kernel": plan.liger,
        "gradient_checkpointing": bool(plan.gradient_checkpointing),
        "max_length": recipe["max_seq_length"],
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": recipe["logging_steps"],
        "logging_nan_inf_filter": False,
        "save_steps": recipe["save_steps"],
        "save_total_limit": 2,
        "disable_tqdm": True,
        "report_to": recipe["report_to"] or "none",
        "run_name": recipe["name"],
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": plan.device == "cuda",
        "ddp_find_unused_parameters": False if plan.processes > 1 else None,
    }
    if recipe["early_stopping_patience"]:  # measure the holdout loss at every checkpoint and keep the best one
        settings.update(
            eval_strategy="steps",
            eval_steps=recipe["save_steps"],
            per_device_eval_batch_size=plan.micro_batch,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
        )
    if recipe["method"] == "dpo":
        from trl import DPOConfig

        return DPOConfig(beta=recipe["beta"], **settings)
    from trl import SFTConfig

    return SFTConfig(packing=recipe["packing"], dataset_kwargs={"skip_prepare_dataset": True}, **settings)


def _trainer(job: dict[str, Any], settings: Any, model: Any, rows: Any, tokenizer: Any, journal: Any) -> Any:
    """TRL's trainer of the recipe's method, on rows that are token ids already.

    Raises:
        BadRecipe: a package that `report_to` names is not installed.
    """
    from trl import DPOTrainer, SFTTrainer, pack_dataset

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:  # it has no `skip_prepare_dataset`
            return dataset

    recipe = job["recipe"]
    callbacks, holdout = [journal], None
    if recipe["early_stopping_patience"]:
        from transformers import EarlyStoppingCallback

        holdout = load_rows(job["holdout"])
        holdout = holdout.select(range(min(recipe["max_holdout_rows"], len(holdout))))
        callbacks.append(EarlyStoppingCallback(recipe["early_stopping_patience"]))
    if recipe["packing"]:
        rows = pack_dataset(rows.select_columns(["input_ids", "labels"]), recipe["max_seq_length"])
    try:
        return (PairTrainer if recipe["method"] == "dpo" else SFTTrainer)(
            model=model, args=settings, train_dataset=rows, eval_dataset=holdout, processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip
    except RuntimeError as error:
        if recipe["report_to"] and "requires" in str(error):
            raise BadRecipe(
                f"field 'report_to': {' '.join(str(error).split())}", "Install it, or leave it out"
            ) from error
        raise


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: its manifest, written last, has the digests of what is there. Others are
    removed.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for checkpoint in found:
        try:
            files = orjson.loads((checkpoint / MANIFEST).read_bytes())["files"]
            if describe_files(checkpoint) == files:
                return checkpoint
        except (OSError, orjson.JSONDecodeError, KeyError):
            pass
        shutil.rmtree(checkpoint, ignore_errors=True)  # another process of this training may do the same
    return None


def _save(trained: Any, tokenizer: Any, job: dict[str, Any], folder: Path, plan: Plan) -> None:
    """The adapter, or the whole model, with its tokenizer; it names the pinned base, not a folder of this machine."""
    import torch

    if job["recipe"]["full_finetuning"]:
        trained.config._name_or_path = job["base_name"]
        trained = trained.to(getattr(torch, plan.dtype))
    else:
        config = trained.peft_config["default"]
        config.base_model_name_or_path, config.revision = job["base_name"], job["base_revision"]
    trained.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `publish` writes the real one


def _peak_memory() -> int:
    """The most bytes so far: of the device where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _journal_class() -> type:
    """The callback's class; made on demand, since its base class costs seconds to import."""
    from transformers import TrainerCallback

    class Journal(TrainerCallback):
        """Log file, lines for people, whole checkpoints, and SIGTERM."""

        def __init__(self, out: Path, recipe: dict[str, Any], say: Any, device: str):
            self.path, self.recipe, self.say, self.device = out / TRAINING_LOG, recipe, say, device
            self.entries: list[dict[str, Any]] = []
            self.stopped = False
            self._said = self._began = self._alive = time.monotonic()
            self._earlier = {"step": 0, "tokens": 0, "seconds": 0.0}  # where the tries before this one got to

        def watch_signals(self) -> None:
            """SIGTERM means: finish the step, save, stop."""

            def stop(*_: Any) -> None:
                self.stopped = True

            signal.signal(signal.SIGTERM, stop)

        def watch_batches(self, model: Any, accumulation: int) -> None:
            """Remember the batches of a step, to name their rows when the loss breaks."""
            self._batches: deque[Any] = deque(maxlen=accumulation)
            self._worst = 2 * math.log(model.get_input_embeddings().num_embeddings)

            def remember(_: Any, __: Any, named: dict[str, Any]) -> None:
                if model.training and named.get("input_ids") is not None:
                    self._batches.append((named["input_ids"], named.get("attention_mask")))

            model.register_forward_pre_hook(remember, with_kwargs=True)

        def rows_of_last_step(self, rows: Any) -> str:
            """The rows of this process's last step by their numbers in the dataset, as far as they can be told."""
            seen = set()
            for ids, mask in self._batches:
                for i, line in enumerate(ids.tolist()):
                    kept = (
                        mask[i].bool().tolist() if mask is not None and mask.shape == ids.shape else [True] * len(line)
                    )
                    seen.add(tuple(id for id, keep in zip(line, kept, strict=True) if keep))
            if self.recipe["packing"]:
                return "its rows are packed together"
            found = [row["row"] for row in rows if _ids(row) in seen]
            return f"rows of that step: {', '.join(map(str, sorted(found)))}"

        def go_on_from(self, checkpoint: Path) -> None:
            """Forget log entries of steps that were done after the checkpoint and are done again."""
            self.say(f"going on from {checkpoint.name}")
            step = int(checkpoint.name.rsplit("-", 1)[1])
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
            self.entries = [entry for line in lines if (entry := orjson.loads(line))["step"] <= step]
            if RANK == 0:
                atomic_write(self.path, b"".join(orjson.dumps(entry) + b"\n" for entry in self.entries))
            if self.entries:
                self._earlier = self.entries[-1]

        def seconds(self) -> float:
            """Seconds of training so far, over all tries."""
            return self._earlier["seconds"] + time.monotonic() - self._began

        def tokens_per_second(self) -> float:
            """Non-padding tokens a second, over all tries."""
            return self.entries[-1]["tokens"] / max(self.entries[-1]["seconds"], 1e-9)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._began = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            entry = {
                "step": state.global_step,
                "loss": float(logs["loss"]),
                "learning_rate": float(logs["learning_rate"]),
                "grad_norm": float(logs.get("grad_norm") or 0.0),
                "tokens": int(state.num_input_tokens_seen),
                "seconds": round(self.seconds(), 3),
            }
            if not math.isfinite(entry["loss"]) or entry["loss"] > self._worst:
                raise BadData(
                    f"the loss is {entry['loss']:.3g} at step {state.global_step}"
                    + ("" if math.isnan(entry["loss"]) else ", twice that of guessing"),
                    "Lower learning_rate, or look at these rows",
                )
            self.entries.append(entry)
            if RANK == 0:
                with self.path.open("ab") as file:
                    file.write(orjson.dumps(entry) + b"\n")
            last = state.global_step >= state.max_steps
            if time.monotonic() - self._said >= 2 or len(self.entries) == 1 or last:  # a log for people, not a stream
                self._said = time.monotonic()
                self.say(self._line(entry, state.max_steps))

        def _line(self, entry: dict[str, Any], steps: int) -> str:
            seconds, tokens, done = (entry[key] - self._earlier[key] for key in ("seconds", "tokens", "step"))
            rate, left = tokens / max(seconds, 1e-9), seconds / max(done, 1) * (steps - entry["step"])
            return (
                f"step {entry['step']}/{steps}  loss {entry['loss']:.3f}  lr {entry['learning_rate']:.1e}  "
                f"{rate:,.0f} tokens/s  {_peak_memory() / 2**30:.1f} GiB  {left:.0f} s left"
            )

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._show_life()

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._show_life()

        def _show_life(self) -> None:
            if time.monotonic() - self._alive >= 1:
                self._alive = time.monotonic()
                self.say("")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._show_life()
            self.stopped = bool(highest(int(self.stopped), self.device))  # all processes stop at the same step
            if self.stopped:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            highest(0, self.device)  # the other processes' random states are in the folder, too
            if RANK == 0:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                atomic_write(folder / MANIFEST, to_json({"step": state.global_step, "files": describe_files(folder)}))
                self.say("", saved=str(folder))

    return Journal


def _ids(row: dict[str, Any]) -> tuple[int, ...]:
    """A row as the model sees it; of a pair the chosen answer."""
    return tuple(row["input_ids"] if "input_ids" in row else row["prompt_ids"] + row["chosen_ids"])
