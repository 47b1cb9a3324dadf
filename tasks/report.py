"""report: one page about a run, and `var/last_run.json` for programs; also when the run failed."""

from __future__ import annotations

from typing import Any

from include.recipe import find
from include.report import run_page
from include.settings import var
from include.stage import log
from include.store import Store, now, to_json, write_aside

STAGES = (
    "resolve", "pretrain", "download", "validate", "standardize", "template", "train", "smoke_test", "evaluate",
    "publish", "verify",
)  # fmt: skip


def report(recipe_file: str, run_id: str) -> str:
    """Sum up what the stages recorded; returns the place of the page.

    The verdict is `published`, `unchanged` (what was made was live already), `refused` (by the gate) or `failed`.
    """
    store, name = Store(), find(recipe_file).stem
    records = store.records(name, run_id)
    stages = {stage: records[stage] for stage in STAGES if stage in records}
    details = {stage: _details(store, name, stages.get(stage)) for stage in STAGES}
    errors = [record["error"] for record in stages.values() if record["state"] == "failed"]
    published = details["publish"]
    page = store.run_folder(name, run_id) / "report.html"
    summary: dict[str, Any] = {
        "recipe": name,
        "run": run_id,
        "verdict": _verdict(stages, errors),
        "version": published.get("name"),
        "revision": published.get("revision"),
        "place": published.get("place"),
        "error": errors[0] if errors else None,
        "report": str(page),
        "finished_at": now(),
        "seconds": round(sum(record.get("seconds", 0) for record in stages.values()), 2),
        "stages": {
            stage: {key: record.get(key) for key in ("state", "seconds", "reused", "folder", "line")}
            for stage, record in stages.items()
        },
    }
    with store.writing():
        write_aside(page, run_page(summary, details).encode())
    store.record(name, run_id, "run", summary)
    write_aside(var() / "last_run.json", to_json(summary))
    log.info("report: %s", page)
    return str(page)


def _verdict(stages: dict[str, Any], errors: list[dict[str, str]]) -> str:
    if any(error["kind"] == "Refused" for error in errors):
        return "refused"
    if errors or stages.get("verify", {}).get("state") != "done":
        return "failed"
    return "unchanged" if stages["publish"]["reused"] else "published"


def _details(store: Store, recipe: str, record: dict[str, Any] | None) -> dict[str, Any]:
    """The facts of a stage that finished; none of one that did not."""
    if record is None or record["state"] != "done":
        return {}
    artifact = store.find(recipe, record["stage"], record["fingerprint"])
    return artifact.facts if artifact else {}
