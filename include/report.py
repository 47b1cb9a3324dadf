"""What people read about a run: the loss picture, the model card and the run's page, all made from recorded facts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from include.settings import PROJECT
from include.sources import is_hub_id

SMOOTHING = 10  # steps of the running mean in the loss picture


def loss_picture(log: Path) -> bytes:
    """The training loss over steps as a PNG, with a running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    means = [sum(losses[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(7, 3), dpi=110, layout="constrained")
    axes.plot(steps, losses, color="#9db4d8", linewidth=1, label="each step")
    axes.plot(steps, means, color="#1f4e96", linewidth=2, label=f"mean of {SMOOTHING}")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    plt.close(figure)
    return picture.getvalue()


def _pages() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PROJECT / "include" / "pages"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["json"] = lambda value: orjson.dumps(value).decode()
    environment.tests["hub_id"] = is_hub_id
    return environment


def model_card(certificate: dict[str, Any]) -> str:
    """The README.md of a published version, with the Hub's metadata, from its birth certificate."""
    return _pages().get_template("card.md").render(**certificate)


def run_page(summary: dict[str, Any], details: dict[str, dict[str, Any]]) -> str:
    """One self-contained HTML page about a run.

    Args:
        summary: what `var/last_run.json` holds.
        details: the facts of each stage; empty for one that did not finish.
    """
    picture = None
    if details["train"]:
        log = Path(summary["stages"]["train"]["folder"].removeprefix("file://")) / "training_log.jsonl"
        picture = base64.b64encode(loss_picture(log)).decode() if log.is_file() else None
    return _pages().get_template("run.html").render(run=summary, details=details, picture=picture)
