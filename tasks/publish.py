"""publish: make the adapter, with model card and manifest, one version of the registry, and make it live."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from include.base_model import base_license, fetch_base
from include.data.sources import dataset_label
from include.engine import supervise
from include.engine.jobs import MergeJob
from include.errors import Conflict, GateRefused
from include.pipeline.contracts import (
    ApproveOutput,
    DownloadOutput,
    EvaluateOutput,
    PublishedVersion,
    PublishOutput,
    SmokeTestOutput,
    StandardizeOutput,
    TemplateOutput,
    TrainOutput,
    ValidateOutput,
)
from include.pipeline.stage import Output, Result, StageContext, stage
from include.recipe import TRAINING_INPUTS, Recipe, eval_ref
from include.registry import CARD, Version, content_digest, merged_uri, open_registry
from include.reporting.model_card import also_tested_with, merged_card, model_card
from include.reporting.plots import loss_plot
from include.storage.files import (
    MANIFEST,
    copy_folder,
    describe_files,
    file_digest,
    fingerprint,
    installed_packages,
    now,
    to_json,
)
from tasks.sweep import sweep_of

PICTURE = "loss.png"
LOADING_PACKAGES = ("transformers", "peft", "torch")


@stage(version=5, recipe_fields=TRAINING_INPUTS, reuse=False)
def publish(
    context: StageContext, download: Output[DownloadOutput], validate: Output[ValidateOutput],
    standardize: Output[StandardizeOutput], template: Output[TemplateOutput], train: Output[TrainOutput],
    smoke_test: Output[SmokeTestOutput], evaluate: Output[EvaluateOutput], approve: Output[ApproveOutput],
) -> Result[PublishOutput]:  # fmt: skip
    """Publish a candidate that passed the gate. The same content is never published as a second version.

    Raises:
        GateRefused: the gate refused the candidate (the message has the reasons), or its content is an older version's,
            which only a rollback makes live again.
        Conflict: another version went live since the candidate was compared.
        NoPermission, Unreachable: the registry cannot be written, or does not answer.
    """
    verdict = evaluate.metadata.verdict
    if not verdict.publish:
        raise GateRefused(
            "the candidate is not published: " + "; ".join(verdict.reasons),
            "The live version does not change; the report shows the numbers and the answers",
        )
    outputs = (download, validate, standardize, template, train, smoke_test, evaluate, approve)
    folder = context.out / "version"
    copy_folder(train.local() / TrainOutput.ADAPTER, folder)
    shutil.copyfile(train.local() / TrainOutput.TRAINING_LOG, folder / TrainOutput.TRAINING_LOG)
    (folder / PICTURE).write_bytes(loss_plot((folder / TrainOutput.TRAINING_LOG).read_bytes()))
    (folder / CARD).unlink(missing_ok=True)  # PEFT's own
    manifest = build_manifest(context, {output.manifest["stage"]: output for output in outputs})
    manifest["files"] = describe_files(folder)
    manifest["content"] = content_digest(manifest["files"])
    (folder / MANIFEST).write_bytes(to_json(manifest))
    # the card is written last: it contains the manifest's digest, so the manifest cannot contain the card's
    card = model_card(manifest, file_digest(folder / MANIFEST))
    (folder / CARD).write_text(card, encoding="utf-8")

    registry = open_registry(str(context.recipe.registry))
    compared = evaluate.metadata.live
    version = registry.publish(folder, compared.revision if compared else None, context.recipe.private)
    shutil.rmtree(folder)
    unchanged = version.run != context.run_id
    merged = None
    summary = f"{version.name} {'was live already' if unchanged else 'is live'}: {version.place}"
    if context.recipe.merged_16bit:
        merged = publish_merged(context, version, train.local() / TrainOutput.ADAPTER, manifest)
        summary += f"; merged: {merged.place}"
    published = PublishOutput(**asdict(version), merged=PublishedVersion(**asdict(merged)) if merged else None)
    return Result(summary, published, unchanged)


def publish_merged(context: StageContext, version: Version, adapter: Path, manifest: dict[str, Any]) -> Version:
    """Publish the merged model of the live adapter; merge only if no earlier try or run has done it."""
    recipe, registry = context.recipe, open_registry(merged_uri(str(context.recipe.registry)))
    for known in registry.versions():
        if known.content == version.content:
            return registry.promote(known.revision, f"the adapter's {version.name} is live")
    folder = context.out / "merged"
    job = MergeJob(base=fetch_base(recipe, context.store), adapter=adapter, out=folder)
    made = supervise.run(job, context.out, context.progress)
    repository = str(recipe.registry).removeprefix("hf://") if str(recipe.registry).startswith("hf://") else None
    manifest = {
        "run": context.run_id,
        "content": version.content,
        "adapter": {"name": version.name, "revision": version.revision, "place": version.place,
                    "repository": repository},
        "recipe": manifest["recipe"],
        "base": manifest["base"],
        "dtype": made.dtype,
        "packages": installed_packages(),
        "also_tested_with": also_tested_with(folder),
        "files": describe_files(folder),
    }  # fmt: skip
    (folder / MANIFEST).write_bytes(to_json(manifest))
    (folder / CARD).write_text(merged_card(manifest, file_digest(folder / MANIFEST)), encoding="utf-8")
    adapters = open_registry(str(recipe.registry))
    if (now := adapters.live()) is None or now.content != version.content:
        raise Conflict(
            f"{now.name if now else 'nothing'} went live in {recipe.registry} while {version.name} was merged",
            "Nothing to do: the merged model of what is live stays live",
        )
    live = registry.live()
    merged = registry.publish(folder, live.revision if live else None, recipe.private)
    shutil.rmtree(folder)
    return merged


def build_manifest(context: StageContext, outputs: dict[str, Output[Any]]) -> dict[str, Any]:
    """Return the manifest: data, base, settings, losses and verdicts of the adapter. The model card is made from it.

    It has no rows of the data and no values of `Operations` (mail addresses), because the adapter may be public.
    """
    metadata = {name: output.metadata.to_json() for name, output in outputs.items()}
    del metadata["template"]["samples"]
    del metadata["validate"]["profile"]["top_duplicates"]
    recipe = context.recipe
    return {
        "run": context.run_id,
        "recipe": recipe.to_json(),
        "recipe_sha256": fingerprint(recipe.to_json()),
        "made_at": now(),
        "dataset": {"name": dataset_label(recipe.dataset), "revision": recipe.dataset_revision, **metadata["download"]},
        "evaluation_dataset": _evaluation_dataset(recipe),
        "base": {"name": recipe.base_model, "revision": recipe.base_revision, **base_license(recipe)},
        "data": {**metadata["validate"], **metadata["standardize"]},
        "tokens": metadata["template"],
        "training": metadata["train"],
        "smoke_test": metadata["smoke_test"],
        "evaluation": metadata["evaluate"],
        "approval": metadata["approve"],
        "sweep": sweep_of(context.store.read_records(recipe.name, context.run_id)),
        "seconds": {name: output.manifest["seconds"] for name, output in outputs.items()},
        "fingerprints": {name: output.fingerprint for name, output in outputs.items()},
        "packages": {**installed_packages(), **outputs["train"].manifest["packages"]},
        "loaded_with": {name: outputs["smoke_test"].manifest["packages"][name] for name in LOADING_PACKAGES},
        "also_tested_with": also_tested_with(outputs["train"].local() / TrainOutput.ADAPTER),
    }


def _evaluation_dataset(recipe: Recipe) -> dict[str, Any] | None:
    """Return the dataset that the holdout comes from; None if it is a share of the training dataset."""
    found = eval_ref(recipe)
    if found is None:
        return None
    split = found.split if found.has_splits else None
    return {"name": dataset_label(found.name), "split": split, "revision": found.revision}
