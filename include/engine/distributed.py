"""Processes that train together: torchrun starts them, each with a GPU of its own, or all on the CPU."""

from __future__ import annotations

import os

COUNT, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def join(device: str) -> None:
    """Meet the others, where there are some; it must come before the first `highest`."""
    import torch

    if COUNT > 1:
        if device == "cpu":
            os.environ["ACCELERATE_TORCH_DEVICE"] = device  # its own "cpu:0" is nothing that torch.load can load to
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")


def highest(number: int, device: str) -> int:
    """The largest of the processes' numbers, once all of them have asked."""
    import torch

    if COUNT == 1:
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)
