"""Processes that train together: torchrun starts them, each with a GPU of its own, or all on the CPU."""

from __future__ import annotations

import os

WORLD_SIZE, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # as torchrun sets them


def init_process_group(device: str) -> None:
    """Connect the processes, if there are several. Call it before the first `all_reduce_max`."""
    import torch

    if WORLD_SIZE > 1:
        if device == "cpu":
            os.environ["ACCELERATE_TORCH_DEVICE"] = device  # torch.load does not know accelerate's own name, "cpu:0"
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")


def all_reduce_max(number: int, device: str) -> int:
    """Return the largest of the processes' numbers; wait until every process has called it."""
    import torch

    if WORLD_SIZE == 1:
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)
