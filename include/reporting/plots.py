"""Plots of a run."""

from __future__ import annotations

import io

import orjson

SMOOTHING = 10  # log lines of the running mean


def loss_plot(log: bytes) -> bytes:
    """Return a PNG of the training loss over steps, with its running mean.

    Args:
        log: content of `training_log.jsonl`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [orjson.loads(line) for line in log.splitlines()]
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    means = [sum(losses[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(7, 3), dpi=110, layout="constrained")
    axes.plot(steps, losses, color="#9db4d8", linewidth=1, label="logged loss")
    axes.plot(steps, means, color="#1f4e96", linewidth=2, label=f"running mean of {SMOOTHING}")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    plt.close(figure)
    return picture.getvalue()
