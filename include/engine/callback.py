"""The trainer's callback: training log, progress, whole checkpoints, SIGTERM.

It imports transformers at once, so only `include.engine.train.train` imports it, after Unsloth.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import orjson
from transformers import TrainerCallback

from include.engine.checkpoints import TRAINING_LOG, checkpoint_step, complete_checkpoint
from include.engine.distributed import RANK, all_reduce_max
from include.engine.jobs import Progress
from include.errors import BadData
from include.recipe import Recipe
from include.storage.files import atomic_write

SIGN_OF_LIFE_SECONDS = 1.0
LINE_SECONDS = 2.0  # between two lines for people


def peak_memory() -> int:
    """Return the largest number of bytes used so far: of the GPU's memory, or by this process if there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TrainingLog:
    """The log of a training over all its tries, one JSON line for each entry; the first process writes it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self.entries: list[dict[str, Any]] = []
        self.resumed: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}  # last entry of the earlier tries
        self._began = time.monotonic()

    def resume(self, step: int) -> None:
        """Read the entries of earlier tries, and drop those after a step, since its checkpoint is resumed."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        self.entries = [entry for line in lines if (entry := orjson.loads(line))["step"] <= step]
        if RANK == 0:
            atomic_write(self._path, b"".join(orjson.dumps(entry) + b"\n" for entry in self.entries))
        if self.entries:
            self.resumed = self.entries[-1]

    def start_clock(self) -> None:
        """Start to count this try's seconds."""
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds of training so far, over all tries."""
        return self.resumed["seconds"] + time.monotonic() - self._began

    def tokens_per_second(self) -> float:
        """Return the rate of tokens without padding, over all tries."""
        return self.entries[-1]["tokens"] / max(self.entries[-1]["seconds"], 1e-9)

    def first_and_last(self) -> tuple[float, float]:
        """Return the mean loss of the first and of the last ten entries; of fewer than 20, of each half."""
        losses = [entry["loss"] for entry in self.entries]
        count = min(10, max(1, len(losses) // 2))
        return sum(losses[:count]) / count, sum(losses[-count:]) / count

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry."""
        self.entries.append(entry)
        if RANK == 0:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(entry) + b"\n")


class LastBatches:
    """The batches of the last step, to name their rows when the loss breaks.

    Args:
        model: the trained model.
        accumulation: batches of a step.
    """

    def __init__(self, model: Any, accumulation: int):
        self._batches: deque[Any] = deque(maxlen=accumulation)

        def remember(_: Any, __: Any, arguments: dict[str, Any]) -> None:
            if model.training and arguments.get("input_ids") is not None:
                starts = arguments.get("cu_seq_lens_q")
                self._batches.append((arguments["input_ids"], arguments.get("attention_mask"), starts))

        model.register_forward_pre_hook(remember, with_kwargs=True)

    def row_numbers(self, rows: Any) -> list[int]:
        """Return the numbers of this process's unpacked rows in the dataset.

        Args:
            rows: the training set.
        """
        sequences = set()
        for ids, mask, starts in self._batches:
            if starts is not None:  # rows joined into one sequence
                sequences |= {tuple(row.tolist()) for row in ids[0].split(starts.diff().tolist())}
                continue
            masked = mask is not None and mask.shape == ids.shape
            keep = mask.bool().tolist() if masked else [[True] * ids.shape[1]] * len(ids)
            for line, kept in zip(ids.tolist(), keep, strict=True):
                sequences.add(tuple(id for id, real in zip(line, kept, strict=True) if real))
        return sorted(row["row"] for row in rows if _ids(row) in sequences)


class TrainingCallback(TrainerCallback):
    """Logs each step, saves whole checkpoints, shows signs of life, and stops at SIGTERM.

    Args:
        out: the job's folder.
        recipe: the recipe's fields.
        progress: takes lines for people.
        device: `cuda` or `cpu`.
    """

    def __init__(self, out: Path, recipe: Recipe, progress: Progress, device: str):
        self._recipe, self._progress, self._device = recipe, progress, device
        self.log = TrainingLog(out / TRAINING_LOG)
        self.stopped = self._training = False
        self._last_line = self._last_sign = time.monotonic()

    def resume(self, checkpoint: Path) -> None:
        """Continue the log after a checkpoint's step."""
        self._progress(f"resuming from {checkpoint.name}")
        self.log.resume(checkpoint_step(checkpoint))

    def watch(self, model: Any, accumulation: int) -> None:
        """Remember the model's batches. Call it after the trainer is made: DPO's copies the model with its hooks.

        Args:
            accumulation: micro-steps of an optimizer step.
        """
        self._last_batches = LastBatches(model, accumulation)
        self._guessing = math.log(model.config.get_text_config().vocab_size)

    def handle_sigterm(self) -> None:
        """From now on, SIGTERM means: finish the step, save a checkpoint, stop."""

        def stop(*_: Any) -> None:
            self.stopped = True

        signal.signal(signal.SIGTERM, stop)

    def describe_last_rows(self, rows: Any) -> str:
        """Return a clause that names the rows of this process's last step.

        Args:
            rows: the training set.
        """
        if self._recipe.packing:
            return "its rows are packed together"
        return f"rows of that step: {', '.join(map(str, self._last_batches.row_numbers(rows)))}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.log.start_clock()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add an entry to the training log.

        Raises:
            BadData: the loss is not finite, or twice as high as the loss of guessing.
        """
        if not logs or "loss" not in logs:
            return
        entry = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs.get("grad_norm") or 0.0),
            "tokens": int(state.num_input_tokens_seen),
            "seconds": round(self.log.seconds(), 3),
        }
        if not math.isfinite(entry["loss"]) or entry["loss"] > 2 * self._guessing:
            raise BadData(*self._explain(entry))
        self.log.add(entry)
        last = state.global_step >= state.max_steps
        if time.monotonic() - self._last_line >= LINE_SECONDS or len(self.log.entries) == 1 or last:
            self._last_line = time.monotonic()
            self._progress(self._describe(entry, state.max_steps))

    def _explain(self, entry: dict[str, Any]) -> tuple[str, str]:
        """Return what is wrong with a loss, and what to do. The first loss is the base's: no step has changed it."""
        what = f"the loss is {entry['loss']:.3g} at step {entry['step']}"
        if not math.isnan(entry["loss"]):
            what += f", more than twice the loss of guessing ({self._guessing:.1f})"
        if entry["step"] > self._recipe.logging_steps:
            return what, "Lower learning_rate, or check these rows"
        return what, (
            "The base is damaged, or chat_template does not fit it, or its tokenizer belongs to another model; "
            "learning_rate is not the cause"
        )

    def _describe(self, entry: dict[str, Any], steps: int) -> str:
        seconds, tokens, done = (entry[key] - self.log.resumed[key] for key in ("seconds", "tokens", "step"))
        rate, left = tokens / max(seconds, 1e-9), seconds / max(done, 1) * (steps - entry["step"])
        return (
            f"step {entry['step']}/{steps}  loss {entry['loss']:.3f}  lr {entry['learning_rate']:.1e}  "
            f"{rate:,.0f} tokens/s  {peak_memory() / 2**30:.1f} GiB  {left:.0f} s left"
        )

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show a sign of life."""
        self._show_life()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show a sign of life."""
        self._show_life()

    def _show_life(self) -> None:
        if time.monotonic() - self._last_sign >= SIGN_OF_LIFE_SECONDS:
            self._last_sign = time.monotonic()
            self._progress("", training=self._training)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show a sign of life; stop if one of the processes was asked to."""
        if not self._training:
            self._training, self._last_sign = True, -math.inf  # the supervisor must know of the first step
        self._show_life()
        self.stopped = bool(all_reduce_max(int(self.stopped), self._device))  # all processes stop at the same step
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Complete the checkpoint that the trainer has saved."""
        all_reduce_max(0, self._device)  # wait until the other processes have written their random states
        if RANK == 0:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            complete_checkpoint(checkpoint)
            self._progress("", checkpoint=checkpoint)


def _ids(row: dict[str, Any]) -> tuple[int, ...]:
    """Return a row's ids as the model reads them; of a pair those with the chosen answer."""
    return tuple(row["input_ids"] if "input_ids" in row else row["prompt_ids"] + row["chosen_ids"])
