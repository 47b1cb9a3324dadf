"""publish: the adapter with its card and its birth certificate becomes one version of the registry, and goes live."""

from __future__ import annotations

import shutil
from typing import Any

from include.errors import Refused
from include.registry import CARD, content_digest, open_registry
from include.report import loss_picture, model_card
from include.stage import Job, Result, stage
from include.store import MANIFEST, Artifact, describe_files, fingerprint, installed_packages, now, to_json
from tasks.train import ADAPTER

TRAINING_LOG, PICTURE = "training_log.jsonl", "loss.png"


@stage(version=1, uses=("registry",), reuse=False)
def publish(
    job: Job, download: Artifact, validate: Artifact, standardize: Artifact, template: Artifact, train: Artifact,
    smoke_test: Artifact, evaluate: Artifact,
) -> Result:  # fmt: skip
    """Publish what the gate let through; the same content again is the same version.

    Raises:
        Refused: the gate did not let the candidate through, and why.
        PermanentError: something else went live since the candidate was compared.
        NoPermission, Unreachable: the registry cannot be written, or does not answer.
    """
    verdict = evaluate.facts["verdict"]
    if not verdict["publish"]:
        raise Refused(
            "the candidate is not published: " + "; ".join(verdict["reasons"]),
            "What was live stays live; the report shows the numbers and the answers",
        )
    stages = (download, validate, standardize, template, train, smoke_test, evaluate)
    folder = job.out / "version"
    shutil.copytree(train.local() / ADAPTER, folder)
    shutil.copy(train.local() / TRAINING_LOG, folder)
    (folder / PICTURE).write_bytes(loss_picture(train.local() / TRAINING_LOG))
    certificate = birth_certificate(job, {artifact.manifest["stage"]: artifact for artifact in stages})
    (folder / CARD).write_text(model_card(certificate), encoding="utf-8")
    certificate["files"] = describe_files(folder)
    certificate["content"] = content_digest(certificate["files"])
    (folder / MANIFEST).write_bytes(to_json(certificate))

    registry = open_registry(str(job.recipe.registry))
    before, compared = registry.live(), evaluate.facts["live"]
    version = registry.publish(folder, compared and compared["revision"], job.recipe.private)
    shutil.rmtree(folder)
    unchanged = before is not None and before.revision == version.revision
    facts = {"name": version.name, "revision": version.revision, "place": version.place, "content": version.content}
    return Result(f"{version.name} {'was live already' if unchanged else 'is live'}: {version.place}", facts, unchanged)


def birth_certificate(job: Job, stages: dict[str, Artifact]) -> dict[str, Any]:
    """All that is known about how the adapter came to be; the card and the report are made from it."""
    facts = {name: artifact.facts for name, artifact in stages.items()}
    recipe = job.recipe
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": fingerprint(recipe.model_dump(mode="json")),
        "made_at": now(),
        "dataset": {"name": recipe.dataset, "revision": recipe.dataset_revision, **facts["download"]},
        "base": {"name": recipe.base_model, "revision": recipe.base_revision},
        "data": {**facts["validate"], **facts["standardize"]},
        "tokens": facts["template"],
        "training": facts["train"],
        "smoke_test": facts["smoke_test"],
        "evaluation": facts["evaluate"],
        "seconds": {name: artifact.manifest["seconds"] for name, artifact in stages.items()},
        "fingerprints": {name: artifact.fingerprint for name, artifact in stages.items()},
        "packages": {**installed_packages(), **stages["train"].manifest["packages"]},
    }
