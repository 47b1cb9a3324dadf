"""Where the time of a training step goes on a GPU: kernels by group, and the time in which the GPU waits.

    python -m bench.train --profile

prints the table for each way of `bench.train`. It runs the train job of the engine with PyTorch's profiler on two
steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

GROUPS = {  # the first whose words are in a kernel's name
    "attention, backward": ("flash_bwd",),
    "attention, forward": ("flash_fwd", "fmha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "gemv"),
    "4-bit dequantization": ("dequant",),
    "optimizer, clipping": ("optimizer", "multi_tensor", "adam", "lpnorm"),
    "loss": ("cross_entropy", "logsumexp"),
    "norms, positions, activations": ("triton_", "rms_norm", "rope", "swiglu", "silu"),
    "copies": ("memcpy", "memset", "copy"),
}
PROFILED = 2  # steps, the last but one and the one before


def profile(job: Any, steps: int) -> dict[str, Any]:
    """Run a train job with the profiler.

    Args:
        job: of the engine (`TrainJob`).
        steps: of the job's recipe.

    Returns:
        For one of the profiled steps: its milliseconds, those in which no kernel ran, and those of each group.
    """
    import torch
    from transformers import TrainerCallback

    from include.engine import train

    class Profiler(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == steps - PROFILED - 1:
                torch.cuda.synchronize()
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == steps - 1:
                torch.cuda.synchronize()
                self.profiler.__exit__(None, None, None)

    profiler, make = Profiler(), train._trainer
    module: Any = train

    def with_profiler(*arguments: Any) -> Any:
        trainer = make(*arguments)
        trainer.add_callback(profiler)
        return trainer

    module._trainer = with_profiler
    train.train(job, lambda *_, **__: None)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.profiler.export_chrome_trace(str(trace))
        return _summary(json.loads(trace.read_text())["traceEvents"])


def _summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels.sort(key=lambda event: event["ts"])
    busy, until, groups = 0.0, 0.0, dict.fromkeys([*GROUPS, "others"], 0.0)
    for kernel in kernels:
        end = kernel["ts"] + kernel["dur"]
        busy += max(0.0, end - max(kernel["ts"], until))
        until = max(until, end)
        name = kernel["name"].lower()
        group = next((group for group, words in GROUPS.items() if any(word in name for word in words)), "others")
        groups[group] += kernel["dur"] / 1e3 / PROFILED
    span = until - kernels[0]["ts"]
    return {
        "step_ms": span / 1e3 / PROFILED,
        "idle_ms": (span - busy) / 1e3 / PROFILED,
        "groups_ms": {group: round(ms, 1) for group, ms in groups.items()},
    }


def main(way: str, folder: str, out: str, steps: str) -> None:
    """Profile one way of `bench.train`, and write the summary; called in a process of its own."""
    from bench.train import job_of

    found = profile(job_of(way, Path(folder), Path(out), int(steps)), int(steps))
    Path(out, "profile.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
