"""verify: check that the published version is complete, loads, and answers like the tested adapter."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import orjson

from include.base_model import fetch_base
from include.chat.chat_format import ChatFormat
from include.engine import supervise
from include.engine.jobs import LogitsJob, MergedLogitsJob
from include.errors import PermanentError
from include.pipeline.contracts import (
    MergedDistance,
    PublishedVersion,
    PublishOutput,
    TemplateOutput,
    TrainOutput,
    VerifyOutput,
)
from include.pipeline.stage import Output, Result, StageContext, stage
from include.registry import CARD, merged_uri, open_registry
from include.storage.files import MANIFEST, describe_files, file_digest, fingerprint
from tasks.smoke_test import messages

MERGED_TOLERANCE = 0.05  # nats: rounding the weights to 16 bits stays below it, another model does not
TOLERANCE = 1e-4  # of logits: the two copies are the same bytes, run by the same code


def as_published(context: StageContext, publish: Output[PublishOutput]) -> str:
    """Return a digest of the version's files in the registry now. If a file changes, the stage runs again."""
    held = [open_registry(str(context.recipe.registry)).file_digests(publish.metadata.revision)]
    if merged := publish.metadata.merged:
        held.append(open_registry(merged_uri(str(context.recipe.registry))).file_digests(merged.revision))
    return fingerprint(held)


@stage(
    version=3,
    recipe_fields=(
        "base_model",
        "base_revision",
        "chat_template",
        "chat_template_kwargs",
        "missing_special_tokens",
        "special_tokens_in_text",
        "load_in_4bit",
        "load_in_8bit",
        "prompts",
        "max_seq_length",
    ),
    other_fields=("registry",),
    external_inputs=lambda context, publish, **_: as_published(context, publish),
)
def verify(
    context: StageContext, template: Output[TemplateOutput], train: Output[TrainOutput], publish: Output[PublishOutput]
) -> Result[VerifyOutput]:
    """Fetch the published version, compare its digests with its manifest and its logits with the tested adapter's.

    Raises:
        PermanentError: a file differs from its digest, or the two adapters answer differently.
    """
    recipe, name = context.recipe, publish.metadata.name
    folder, files = fetch_and_check(str(recipe.registry), publish.metadata, context.out / "published")
    chat = ChatFormat.from_recipe(template.local(TemplateOutput.TOKENIZER) / TemplateOutput.TOKENIZER, recipe)
    base, prompts = fetch_base(recipe, context.store), [chat.prompt(messages(prompt)) for prompt in recipe.prompts]
    tested = train.local() / TrainOutput.ADAPTER
    new_tokens = list(template.metadata.new_special_tokens.values())
    logits = LogitsJob(
        recipe=recipe, base=base, tested=tested, published=folder, prompts=prompts, new_tokens=new_tokens
    )
    compared = supervise.run(logits, context.out, context.progress)
    if compared.largest_difference > TOLERANCE or not compared.same_tokens:
        raise PermanentError(
            f"the published {name} answers differently from the tested adapter (logits differ by "
            f"{compared.largest_difference:.2g})",
            "Do not use that version; compare the packages of this worker with those in its manifest",
        )
    summary = f"{name}: {files} files intact, logits differ by at most {compared.largest_difference:.1g}"
    merged_distance = None
    if merged := publish.metadata.merged:
        whole, files = fetch_and_check(merged_uri(str(recipe.registry)), merged, context.out / "merged")
        merged_logits = MergedLogitsJob(base=base, adapter=folder, merged=whole, prompts=prompts)
        distance = supervise.run(merged_logits, context.out, context.progress)
        if distance.kl > MERGED_TOLERANCE:
            raise PermanentError(
                f"the merged {merged.name} answers differently from base and adapter (KL {distance.kl:.2g} nats)",
                "Do not use the merged model; the adapter itself is as it was tested",
            )
        summary += f"; merged: {files} files intact, KL to base and adapter {distance.kl:.1g} nats"
        merged_distance = MergedDistance(**asdict(distance))
    for download in ("published", "merged"):
        shutil.rmtree(context.out / download, ignore_errors=True)
    return Result(summary, VerifyOutput(**asdict(compared), merged=merged_distance))


def fetch_and_check(uri: str, version: PublishedVersion, empty: Path) -> tuple[Path, int]:
    """Fetch a version into an empty folder, as a new user would; return the folder and the number of its files.

    Raises:
        PermanentError: a file differs from its digest in the manifest, or the manifest from its digest in the card.
    """
    folder = open_registry(uri).fetch(version.revision, into=empty)
    expected = orjson.loads((folder / MANIFEST).read_bytes())["files"]
    found = describe_files(folder)
    wrong = [file for file, facts in expected.items() if found.get(file, {}).get("sha256") != facts["sha256"]]
    if file_digest(folder / MANIFEST) not in (folder / CARD).read_text(encoding="utf-8"):
        wrong.append(MANIFEST)
    if wrong:
        raise PermanentError(
            f"the published {version.name} in {version.place} is not what was published: {', '.join(wrong)} differ",
            "Remove that version and run again; it will be published anew",
        )
    return folder, len(expected)
