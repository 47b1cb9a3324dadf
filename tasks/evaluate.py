"""evaluate: the candidate against the base and against what is live, row by row on the holdout, and the verdict."""

from __future__ import annotations

from include.engine import supervise
from include.gate import judge
from include.registry import Version, content_digest, open_registry
from include.sources import fetch_base
from include.stage import Job, Result, stage
from include.store import Artifact, to_json
from tasks.template import HOLDOUT
from tasks.train import ADAPTER

LOSSES = "losses.json"


def candidate_content(train: Artifact) -> str:
    """The digest that the candidate would have as a published version."""
    prefix = f"{ADAPTER}/"
    files = {
        name.removeprefix(prefix): file for name, file in train.manifest["files"].items() if name.startswith(prefix)
    }
    return content_digest(files)


def rival(job: Job, train: Artifact) -> Version | None:
    """What is live now, unless it is the candidate itself."""
    live = open_registry(str(job.recipe.registry)).live()
    return None if live is None or live.content == candidate_content(train) else live


@stage(
    version=1,
    uses=(
        "method", "beta", "base_model", "base_revision", "load_in_4bit", "load_in_8bit", "max_seq_length",
        "max_holdout_rows", "gate_margin", "gate_confidence",
    ),
    facts=lambda job, train, **_: (live := rival(job, train)) and [live.revision, live.content],
)  # fmt: skip
def evaluate(job: Job, template: Artifact, train: Artifact, smoke_test: Artifact) -> Result:
    """Measure the loss of every holdout row for base, candidate and live adapter, and judge; leave `losses.json`."""
    recipe = job.recipe
    registry, live = open_registry(str(recipe.registry)), rival(job, train)
    adapters = {"candidate": train.local() / ADAPTER}
    if live:
        adapters["live"] = registry.fetch(live.revision)
    measured = supervise.run(
        "losses",
        {
            "recipe": recipe.model_dump(mode="json"),
            "base": fetch_base(recipe, job.store),
            "rows": template.local() / HOLDOUT,
            "most": recipe.max_holdout_rows,
            "adapters": adapters,
        },
        job.out,
        job.say,
    )
    (job.out / LOSSES).write_bytes(to_json(measured))
    verdict = judge(measured["losses"], smoke_test.facts["failed"], recipe.gate_confidence, recipe.gate_margin)
    against = verdict.against_base
    line = f"loss {against.other:.3f} (base) -> {against.candidate:.3f}"
    if live and verdict.against_live:
        line += f", live {live.name} {verdict.against_live.other:.3f}"
    line += f" on {len(measured['row'])} holdout rows: " + ("better" if verdict.publish else "; ".join(verdict.reasons))
    facts = {
        "verdict": verdict.as_dict(),
        "holdout_rows": len(measured["row"]),
        "live": live and {"name": live.name, "revision": live.revision},
    }
    return Result(line, facts)
