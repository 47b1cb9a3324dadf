"""The model card (README.md) of a published version, made from its manifest."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import orjson
import yaml

from include.data.sources import is_hub_id, short_name
from include.paths import PROJECT
from include.reporting.pages import page_templates

# the oldest packages with which Retune's tests load what it publishes: tests/compat-requirements.txt
OLDEST_TESTED = {"transformers": "4.57.3", "peft": "0.15.2"}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank accepts


def model_card(manifest: dict[str, Any], manifest_sha256: str) -> str:
    """Return the README.md of a published version, with the Hub's metadata in front.

    Args:
        manifest: content of the version's `manifest.json`.
        manifest_sha256: digest of that file.
    """
    fields = {"name": None, "description": None, **manifest["recipe"]}  # name and description come first
    recipe = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120).strip()
    address = manifest["recipe"]["registry"]
    template = page_templates().get_template("card.md")
    return template.render(
        **manifest,
        metadata=_metadata(manifest).to_yaml(),
        recipe_yaml=recipe,
        adapter=address.removeprefix("hf://") if address.startswith("hf://") else None,
        vllm_rank=min(rank for rank in VLLM_RANKS if rank >= min(manifest["recipe"]["r"], VLLM_RANKS[-1])),
        manifest_sha256=manifest_sha256,
    )


def also_tested_with(folder: Path) -> dict[str, str] | None:
    """Return the version of Retune (`retune`), and the oldest packages with which its tests load what it publishes.

    Args:
        folder: of an adapter or of a whole model.

    Returns:
        None for an adapter of experts that transformers 5 has as one tensor (`target_parameters`): transformers 4 has a
        module for each expert, and PEFT 0.15 ignores the adapter's weights of them without an error.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and orjson.loads(adapter.read_bytes()).get("target_parameters"):
        return None
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"retune": project["version"], **OLDEST_TESTED}


def _metadata_of_base(base: dict[str, Any]) -> dict[str, Any]:
    on_hub = {"base_model": base["name"]} if is_hub_id(base["name"]) else {}
    licence = {name: base[name] for name in ("license", "license_name", "license_link") if name in base}
    return on_hub | licence | {"pipeline_tag": "text-generation"}


def _metadata(manifest: dict[str, Any]) -> Any:
    """Return the card's front matter as `ModelCardData`, which the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, dataset, base = manifest["recipe"], manifest["dataset"], manifest["base"]
    on_hub = is_hub_id(dataset["name"])
    evaluated = manifest.get("evaluation_dataset") or dataset
    evaluated_on, evaluated_on_hub = recipe.get("eval_dataset") or recipe["dataset"], is_hub_id(evaluated["name"])
    smoke_test, loss = manifest["smoke_test"], manifest["evaluation"]["verdict"]["against_base"]["candidate"]

    def result(metric: str, name: str, value: float) -> Any:
        return EvalResult(
            task_type="text-generation",
            dataset_type=evaluated["name"] if evaluated_on_hub else "sharegpt",
            dataset_name=f"{short_name(evaluated_on).rsplit('/', 1)[-1]} (held out)",
            dataset_revision=evaluated["revision"] if evaluated_on_hub else None,
            metric_type=metric,
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
                "Smoke-test answers that pass the required checks",
                round(smoke_test["passed"] / len(smoke_test["answers"]), 4),
            ),
        ],
    )  # fmt: skip


def merged_card(manifest: dict[str, Any], manifest_sha256: str) -> str:
    """Return the README.md of a merged model.

    Args:
        manifest: content of the merged model's `manifest.json`.
        manifest_sha256: digest of that file.
    """
    recipe, base = manifest["recipe"], manifest["base"]
    on_hub = recipe["registry"].startswith("hf://")
    metadata = _metadata_of_base(base) | {"library_name": "transformers", "tags": ["merged", "retune"]}
    template = page_templates().get_template("merged.md")
    return template.render(
        **manifest,
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        here=f"{recipe['registry'].removeprefix('hf://')}-merged" if on_hub else "path/to/this/folder",
        manifest_sha256=manifest_sha256,
    )
