"""verify: proof that what was published is whole, loads, and answers as what was tested."""

from __future__ import annotations

import shutil

import orjson

from include.chat import ChatFormat
from include.engine import supervise
from include.errors import PermanentError
from include.registry import CARD, open_registry
from include.sources import fetch_base
from include.stage import Job, Result, stage
from include.store import MANIFEST, Artifact, describe_files, file_digest, fingerprint
from tasks.smoke_test import messages
from tasks.template import TOKENIZER
from tasks.train import ADAPTER

TOLERANCE = 1e-4  # of logits: the two copies are the same bytes, run by the same code


def as_published(job: Job, publish: Artifact) -> str:
    """What the registry holds of the version now: a changed byte there means another proof."""
    return fingerprint(open_registry(str(job.recipe.registry)).holds(publish.facts["revision"]))


@stage(
    version=2,
    uses=("base_model", "base_revision", "chat_template", "missing_special_tokens", "load_in_4bit", "prompts"),
    facts=lambda job, publish, **_: as_published(job, publish),
)
def verify(job: Job, template: Artifact, train: Artifact, publish: Artifact) -> Result:
    """Fetch the published version, compare its digests with its manifest and its logits with the tested adapter's.

    Raises:
        PermanentError: a file differs from its digest, or the two adapters answer differently.
    """
    recipe, name = job.recipe, publish.facts["name"]
    empty = job.out / "published"  # this try's own, so that nothing fetched earlier stands in for what is published
    folder = open_registry(str(recipe.registry)).fetch(publish.facts["revision"], into=empty)
    expected = orjson.loads((folder / MANIFEST).read_bytes())["files"]
    found = describe_files(folder)
    wrong = [file for file, facts in expected.items() if found.get(file, {}).get("sha256") != facts["sha256"]]
    if file_digest(folder / MANIFEST) not in (folder / CARD).read_text(encoding="utf-8"):
        wrong.append(MANIFEST)
    if wrong:
        raise PermanentError(
            f"the published {name} in {publish.facts['place']} is not what was published: {', '.join(wrong)} differ",
            "Remove that version and run again; it will be published anew",
        )
    chat = ChatFormat(template.local() / TOKENIZER, recipe)
    compared = supervise.run(
        "logits",
        {
            "recipe": recipe.model_dump(mode="json"),
            "base": fetch_base(recipe, job.store),
            "adapters": [train.local() / ADAPTER, folder],
            "prompts": [chat.prompt(messages(prompt)) for prompt in recipe.prompts],
        },
        job.out,
        job.say,
    )
    if compared["largest_difference"] > TOLERANCE or not compared["same_tokens"]:
        raise PermanentError(
            f"the published {name} answers differently from what was tested (logits differ by "
            f"{compared['largest_difference']:.2g})",
            "Do not use that version; compare the packages of this worker with those in its manifest",
        )
    shutil.rmtree(empty, ignore_errors=True)
    line = f"{name}: {len(expected)} files whole, logits differ by {compared['largest_difference']:.1g} at most"
    return Result(line, compared)
