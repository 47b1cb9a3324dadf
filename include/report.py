"""What people read about a run: the loss picture, the model card and the run's page, all made from recorded facts."""

from __future__ import annotations

import base64
import html
import io
import re
from typing import Any

import orjson
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from include.recipe import Recipe
from include.settings import PROJECT
from include.sources import is_hub_id

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
ANSWERS_SHOWN = 12  # in the question whether a candidate may go live; those with something against them first
SMOOTHING = 10  # steps of the running mean in the loss picture


def loss_picture(log: bytes) -> bytes:
    """The training loss over steps as a PNG, with a running mean.

    Args:
        log: the content of `training_log.jsonl`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [orjson.loads(line) for line in log.splitlines()]
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


def _cell(text: str, most: int = 400) -> str:
    """Any text as the plain text of a cell of a Markdown table: what a model says may look like markup."""
    short = " ".join(text.split())
    short = short if len(short) <= most else short[:most] + " ..."
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(short, quote=False))


def _pages() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PROJECT / "include" / "pages"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["cell"] = _cell
    environment.tests["hub_id"] = is_hub_id
    return environment


def model_card(certificate: dict[str, Any], manifest_sha256: str) -> str:
    """The README.md of a published version, with the Hub's metadata, from its birth certificate.

    Args:
        manifest_sha256: of the `manifest.json` beside it, which holds the certificate.
    """
    fields = {"name": None, "description": None, **certificate["recipe"]}  # these two first
    recipe = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120).strip()
    address = certificate["recipe"]["registry"]
    page = _pages().get_template("card.md")
    return page.render(
        **certificate,
        metadata=_metadata(certificate).to_yaml(),
        recipe_yaml=recipe,
        adapter=address.removeprefix("hf://") if address.startswith("hf://") else None,
        vllm_rank=min(rank for rank in VLLM_RANKS if rank >= min(certificate["recipe"]["r"], VLLM_RANKS[-1])),
        manifest_sha256=manifest_sha256,
    )


def _metadata_of_base(base: dict[str, Any]) -> dict[str, Any]:
    known = {name: base[name] for name in ("license", "license_name", "license_link") if name in base}
    return (
        ({"base_model": base["name"]} if is_hub_id(base["name"]) else {}) | known | {"pipeline_tag": "text-generation"}
    )


def _metadata(certificate: dict[str, Any]) -> Any:
    """What the Hub reads: the card's front matter."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, dataset, base = certificate["recipe"], certificate["dataset"], certificate["base"]
    on_hub = is_hub_id(dataset["name"])
    smoke_test, loss = certificate["smoke_test"], certificate["evaluation"]["verdict"]["against_base"]["candidate"]

    def result(kind: str, name: str, value: float) -> Any:
        return EvalResult(
            task_type="text-generation",
            dataset_type=dataset["name"] if on_hub else "sharegpt",
            dataset_name=f"{dataset['name'].rsplit('/', 1)[-1]} (held out)",
            dataset_revision=dataset["revision"] if on_hub else None,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )

    return ModelCardData(
        **_metadata_of_base(base),
        datasets=[dataset["name"]] if on_hub else None,
        library_name="transformers" if recipe["full_finetuning"] else "peft",
        tags=[
            *([] if recipe["full_finetuning"] else ["lora", "qlora"] if recipe["load_in_4bit"] else ["lora"]),
            recipe["method"], "trl",
            *(["unsloth"] if certificate["training"]["plan"]["engine"] == "unsloth" else []), "retune",
        ],
        model_name=recipe["name"],
        eval_results=[
            result("loss", "DPO loss" if recipe["method"] == "dpo" else "Loss (nats per token)", round(loss, 4)),
            result(
                "pass_rate",
                "Smoke test answers that pass the required checks",
                round(smoke_test["passed"] / len(smoke_test["answers"]), 4),
            ),
        ],
    )  # fmt: skip


def merged_card(certificate: dict[str, Any], manifest_sha256: str) -> str:
    """The README.md of a merged model, from its manifest's content."""
    recipe, base = certificate["recipe"], certificate["base"]
    on_hub = recipe["registry"].startswith("hf://")
    metadata = _metadata_of_base(base) | {"library_name": "transformers", "tags": ["merged", "retune"]}
    return (
        _pages()
        .get_template("merged.md")
        .render(
            **certificate,
            metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
            here=f"{recipe['registry'].removeprefix('hf://')}-merged" if on_hub else "path/to/this/folder",
            manifest_sha256=manifest_sha256,
        )
    )


def question_page(
    recipe: Recipe, smoke_test: dict[str, Any], evaluate: dict[str, Any], regressions: list[str], report_address: str,
    made_of: str,
) -> str:  # fmt: skip
    """What a person must know to approve a candidate, as Markdown.

    Args:
        smoke_test, evaluate: the facts of these stages.
        regressions: see `tasks.approve`.
        made_of: the candidate's data and base, in a line.
    """
    answers = sorted(smoke_test["answers"], key=lambda answer: not answer["seen"])[:ANSWERS_SHOWN]
    return _pages().get_template("approval.md").render(
        recipe=recipe, smoke_test=smoke_test, evaluate=evaluate, regressions=regressions, answers=answers,
        report_address=report_address, made_of=made_of,
    )  # fmt: skip


def run_page(summary: dict[str, Any], details: dict[str, dict[str, Any]], training_log: bytes | None = None) -> str:
    """One self-contained HTML page about a run.

    Args:
        summary: what `var/last_run.json` holds.
        details: the facts of each stage; empty for one that did not finish.
        training_log: the content of the training's log.
    """
    picture = base64.b64encode(loss_picture(training_log)).decode() if training_log else None
    return _pages().get_template("run.html").render(run=summary, details=details, picture=picture)
