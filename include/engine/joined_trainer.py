"""TRL's trainer for joined rows and the fast kernels: it never makes the host wait for the device within a step.

It imports TRL at once, so only `include.engine.train` imports it, after Unsloth.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer
from trl import SFTTrainer

from include.engine.attention import JoinRows
from include.engine.graphs import StepGraphs
from include.engine.jobs import Progress


class JoinedTrainer(SFTTrainer):
    """TRL's trainer, whose batches are joined rows.

    Several processes add up their gradients once for each optimizer step. On a GPU micro-steps are CUDA graphs.

    Args:
        longest: tokens that no row exceeds.
        progress: takes lines for people.
        arguments: of TRL's trainer.
    """

    def __init__(self, *, longest: int, progress: Progress, **arguments: Any):
        super().__init__(**arguments)
        self._graphs: StepGraphs | None = None
        self._on_gpu, self._progress = self.args.device.type == "cuda", progress
        if self._on_gpu:  # the optimizer of bitsandbytes waits for the device after each matrix
            import bitsandbytes.optim.optimizer

            bitsandbytes.optim.optimizer.sync_gpu = lambda _: None  # type: ignore[assignment]
        # without PyTorch's wrapper for several processes, whose hooks run on another stream than a graph
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.data_collator = JoinRows(longest if self._on_gpu else None)  # TRL takes none for packed rows

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss without TRL's metrics, each of which is a number that the host would wait for."""
        inputs = {name: value for name, value in inputs.items() if name not in ("_prediction_loss_only", "tokens")}
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add a micro-batch's gradients; with the last one of an optimizer step, those of the other processes."""
        inputs, alone = self._prepare_inputs(inputs), self.accelerator.unwrap_model(model)
        if self._on_gpu:
            loss = self._step_with_graphs(model, alone, inputs, num_items_in_batch)
        else:
            loss = super().training_step(alone, inputs, num_items_in_batch)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            _average([p.grad for p in alone.parameters() if p.grad is not None], self.accelerator.num_processes)
        return loss

    def _step_with_graphs(self, wrapped: Any, model: Any, inputs: dict[str, Any], items: Any) -> Tensor:
        if self._graphs is None:

            def step(batch: dict[str, Any]) -> Tensor:
                inputs = {name: value for name, value in batch.items() if name != "items"}
                return super(JoinedTrainer, self).training_step(model, inputs, batch["items"])

            self._graphs = StepGraphs(step, [p for p in model.parameters() if p.requires_grad])
            wrapped.zero_grad = model.zero_grad = self._graphs.zero_grad
        before = self._graphs.failure
        loss = self._graphs({**inputs, "items": items})
        if self._graphs.failure != before:
            self._progress(f"no more CUDA graphs: {self._graphs.failure}")
        return loss

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        tokens = inputs["tokens"]
        if self.accelerator.num_processes > 1:
            tokens = int(self.accelerator.reduce(torch.tensor(tokens, device=self.args.device)))
        self.state.num_input_tokens_seen += tokens


def _average(grads: list[Tensor], processes: int) -> None:
    """Replace gradients by their mean over all processes, sent as one tensor."""
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= processes
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
