"""publish: the adapter with its card and its manifest becomes one version of the registry, and goes live."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from include.base_model import base_license, fetch_base
from include.engine import supervise
from include.errors import Conflict, GateRefused
from include.pipeline.stage import Result, StageContext, stage
from include.registry import CARD, Version, content_digest, merged_uri, open_registry
from include.reporting.model_card import merged_card, model_card
from include.reporting.plots import loss_plot
from include.storage.artifacts import Artifact
from include.storage.files import MANIFEST, describe_files, file_digest, fingerprint, installed_packages, now, to_json
from tasks.sweep import sweep_of
from tasks.train import ADAPTER

TRAINING_LOG, PICTURE = "training_log.jsonl", "loss.png"


@stage(version=3, recipe_fields=("registry", "merged_16bit"), reuse=False)
def publish(
    context: StageContext, download: Artifact, validate: Artifact, standardize: Artifact, template: Artifact, train: Artifact,
    smoke_test: Artifact, evaluate: Artifact, approve: Artifact,
) -> Result:  # fmt: skip
    """Publish what the gate let through; the same content again is the same version.

    Raises:
        GateRefused: the gate did not let the candidate through, and why; or it is an older version, which a person may
            make live again.
        Conflict: something else went live since the candidate was compared.
        NoPermission, Unreachable: the registry cannot be written, or does not answer.
    """
    verdict = evaluate.metadata["verdict"]
    if not verdict["publish"]:
        raise GateRefused(
            "the candidate is not published: " + "; ".join(verdict["reasons"]),
            "What was live stays live; the report shows the numbers and the answers",
        )
    stages = (download, validate, standardize, template, train, smoke_test, evaluate, approve)
    folder = context.out / "version"
    shutil.copytree(train.local() / ADAPTER, folder)
    shutil.copy(train.local() / TRAINING_LOG, folder)
    (folder / PICTURE).write_bytes(loss_plot((folder / TRAINING_LOG).read_bytes()))
    (folder / CARD).unlink(missing_ok=True)  # PEFT's own
    manifest = build_manifest(context, {artifact.manifest["stage"]: artifact for artifact in stages})
    manifest["files"] = describe_files(folder)
    manifest["content"] = content_digest(manifest["files"])
    (folder / MANIFEST).write_bytes(to_json(manifest))
    # the card comes last and names the manifest's digest, so the manifest cannot name the card's
    card = model_card(manifest, file_digest(folder / MANIFEST))
    (folder / CARD).write_text(card, encoding="utf-8")

    registry = open_registry(str(context.recipe.registry))
    compared = evaluate.metadata["live"]
    version = registry.publish(folder, compared and compared["revision"], context.recipe.private)
    shutil.rmtree(folder)
    unchanged = version.run != context.run_id
    facts = asdict(version)
    line = f"{version.name} {'was live already' if unchanged else 'is live'}: {version.place}"
    if context.recipe.merged_16bit:
        merged = publish_merged(context, version, train.local() / ADAPTER, manifest)
        facts["merged"] = asdict(merged)
        line += f"; merged: {merged.place}"
    return Result(line, facts, unchanged)


def publish_merged(context: StageContext, version: Version, adapter: Path, manifest: dict[str, Any]) -> Version:
    """Make the merged model of the live adapter live, too; merged only where no earlier try or run has done it."""
    recipe, registry = context.recipe, open_registry(merged_uri(str(context.recipe.registry)))
    for known in registry.versions():
        if known.content == version.content:
            return registry.promote(known.revision, f"the adapter's {version.name} is live")
    folder = context.out / "merged"
    work = {
        "recipe": recipe.model_dump(mode="json"), "base": fetch_base(recipe, context.store), "adapter": adapter,
        "out": folder,
    }  # fmt: skip
    made = supervise.run("merge", work, context.out, context.say)
    repository = str(recipe.registry).removeprefix("hf://") if str(recipe.registry).startswith("hf://") else None
    manifest = {
        "run": context.run_id,
        "content": version.content,
        "adapter": {"name": version.name, "revision": version.revision, "place": version.place,
                    "repository": repository},
        "recipe": manifest["recipe"],
        "base": manifest["base"],
        "dtype": made["dtype"],
        "packages": installed_packages(),
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


def build_manifest(context: StageContext, stages: dict[str, Artifact]) -> dict[str, Any]:
    """All that is known about how the adapter came to be; the card is made from it.

    Rows of the data and the recipe's operations (addresses) stay out of it: the adapter may be public.
    """
    facts = {name: artifact.metadata for name, artifact in stages.items()}
    facts["template"] = {name: value for name, value in facts["template"].items() if name != "samples"}
    profile = {name: value for name, value in facts["validate"]["profile"].items() if name != "top_duplicates"}
    facts["validate"] = {**facts["validate"], "profile": profile}
    recipe = context.recipe
    return {
        "run": context.run_id,
        "recipe": recipe.training_inputs,
        "recipe_sha256": fingerprint(recipe.training_inputs),
        "made_at": now(),
        "dataset": {"name": recipe.dataset, "revision": recipe.dataset_revision, **facts["download"]},
        "base": {"name": recipe.base_model, "revision": recipe.base_revision, **base_license(recipe)},
        "data": {**facts["validate"], **facts["standardize"]},
        "tokens": facts["template"],
        "training": facts["train"],
        "smoke_test": facts["smoke_test"],
        "evaluation": facts["evaluate"],
        "approval": facts["approve"],
        "sweep": sweep_of(context.store.read_records(recipe.name, context.run_id)),
        "seconds": {name: artifact.manifest["seconds"] for name, artifact in stages.items()},
        "fingerprints": {name: artifact.fingerprint for name, artifact in stages.items()},
        "packages": {**installed_packages(), **stages["train"].manifest["packages"]},
    }
