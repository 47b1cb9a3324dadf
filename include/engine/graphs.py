"""Training steps on a GPU as CUDA graphs: the host launches one graph in the place of thousands of kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

MOST = 48  # graphs; batches of other shapes are computed kernel by kernel

Batch = dict[str, Any]


@dataclass
class _Captured:
    graph: Any
    batch: Batch
    loss: Tensor


class StepGraphs:
    """Computes micro-steps, each forward and backward pass of one shape captured when it comes for the second time.

    Gradients are kept and set to zero, since graphs add to them where they are. Memory of all steps comes from one
    pool, captured or not, so that it is needed once.

    Args:
        step: takes a batch on the device, adds to the gradients, returns the loss.
        parameters: the trained ones.
    """

    def __init__(self, step: Callable[[Batch], Tensor], parameters: list[Any]):
        self._step, self._grads = step, [torch.zeros_like(parameter) for parameter in parameters]
        for parameter, grad in zip(parameters, self._grads, strict=True):
            parameter.grad = grad
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.MemPool()
        self._seen: Counter[Any] = Counter()
        self._captured: dict[Any, _Captured] = {}
        self.failure: str | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to zero."""
        torch._foreach_zero_(self._grads)

    def __call__(self, batch: Batch) -> Tensor:
        """Compute a micro-step.

        Args:
            batch: tensors whose shapes are few (`include.engine.attention.JoinRows` with `padded`).

        Returns:
            The loss.

        Raises:
            torch.OutOfMemoryError: the step does not fit into memory.
        """
        shape = tuple((name, value.shape) for name, value in sorted(batch.items()) if isinstance(value, Tensor))
        self._seen[shape] += 1
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._seen[shape] == 2 and len(self._captured) < MOST and not self.failure:
                self._capture(shape, batch)
            if captured := self._captured.get(shape):
                for name, value in captured.batch.items():
                    if isinstance(value, Tensor):
                        value.copy_(batch[name], non_blocking=True)
                captured.graph.replay()
                loss = captured.loss.clone()
            else:
                with torch.cuda.use_mem_pool(self._pool):
                    loss = self._step(batch)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, shape: Any, batch: Batch) -> None:
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=cast(Any, self._pool.id), stream=self._stream, capture_error_mode="thread_local"
            ):
                loss = self._step(kept)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failure = " ".join(str(error).split())[:300]
            self._pool = torch.cuda.MemPool()  # the other one is left as it was during the capture
            return
        self._captured[shape] = _Captured(graph, kept, loss)
