"""The README.md of a published version, made from its manifest."""

from __future__ import annotations

from typing import Any

import yaml

from include.data.sources import is_hub_id
from include.reporting.pages import page_templates

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def model_card(manifest: dict[str, Any], manifest_sha256: str) -> str:
    """The README.md of a published version, with the Hub's metadata, from its manifest.

    Args:
        manifest_sha256: of the `manifest.json` beside it, which holds the manifest.
    """
    fields = {"name": None, "description": None, **manifest["recipe"]}  # these two first
    recipe = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120).strip()
    address = manifest["recipe"]["registry"]
    page = page_templates().get_template("card.md")
    return page.render(
        **manifest,
        metadata=_metadata(manifest).to_yaml(),
        recipe_yaml=recipe,
        adapter=address.removeprefix("hf://") if address.startswith("hf://") else None,
        vllm_rank=min(rank for rank in VLLM_RANKS if rank >= min(manifest["recipe"]["r"], VLLM_RANKS[-1])),
        manifest_sha256=manifest_sha256,
    )


def _metadata_of_base(base: dict[str, Any]) -> dict[str, Any]:
    known = {name: base[name] for name in ("license", "license_name", "license_link") if name in base}
    return (
        ({"base_model": base["name"]} if is_hub_id(base["name"]) else {}) | known | {"pipeline_tag": "text-generation"}
    )


def _metadata(manifest: dict[str, Any]) -> Any:
    """What the Hub reads: the card's front matter."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, dataset, base = manifest["recipe"], manifest["dataset"], manifest["base"]
    on_hub = is_hub_id(dataset["name"])
    smoke_test, loss = manifest["smoke_test"], manifest["evaluation"]["verdict"]["against_base"]["candidate"]

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
            *(["unsloth"] if manifest["training"]["plan"]["engine"] == "unsloth" else []), "retune",
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


def merged_card(manifest: dict[str, Any], manifest_sha256: str) -> str:
    """The README.md of a merged model, from its manifest's content."""
    recipe, base = manifest["recipe"], manifest["base"]
    on_hub = recipe["registry"].startswith("hf://")
    metadata = _metadata_of_base(base) | {"library_name": "transformers", "tags": ["merged", "retune"]}
    return (
        page_templates()
        .get_template("merged.md")
        .render(
            **manifest,
            metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
            here=f"{recipe['registry'].removeprefix('hf://')}-merged" if on_hub else "path/to/this/folder",
            manifest_sha256=manifest_sha256,
        )
    )
