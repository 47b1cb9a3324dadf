"""report: write one page about a run, and `var/last_run.json` for programs, also if the run failed."""

from __future__ import annotations

from typing import Any

from include.paths import var
from include.pipeline.contracts import TrainOutput
from include.pipeline.outcomes import FINAL, record_outcome
from include.pipeline.records import log
from include.pipeline.stage import Output, find_output, pinned_recipe
from include.recipe import find_recipe
from include.reporting.pages import report_page
from include.storage.artifacts import Store
from include.storage.files import atomic_write, now, to_json
from include.storage.object_store import read_all
from tasks.stages import NAMES


def report(recipe_file: str, run_id: str, waiting: bool = False, until: str = NAMES[-1]) -> dict[str, Any]:
    """Summarize the records of a run, write its page, and return the summary that `var/last_run.json` holds.

    The verdict is `published`, `unchanged` (the candidate was live already), `refused` (by the gate), `rejected` (by a
    person), `stopped` (after the stage that it was to end with), `skipped` (nothing was new) or `failed`. All but the
    last three are outcomes: the same recipe, data and base need not run again.

    Args:
        waiting: the run waits for a person's approval. Then its page is made and its verdict is `waiting`; what
            programs read (`var/last_run.json`) is still the newest run that has ended.
        until: the last stage that the run was to do.
    """
    store, name = Store(), find_recipe(recipe_file).stem
    records = store.read_records(name, run_id)
    reached = NAMES[: NAMES.index("approve") + 1] if waiting else NAMES  # later ones: before it was cleared
    stages = {stage: records[stage] for stage in reached if stage in records}
    outputs = {stage: _output(store, name, stages.get(stage)) for stage in NAMES}
    details = {stage: output.metadata if output else None for stage, output in outputs.items()}
    ended = any(record["state"] == "done" for key, record in records.items() if key.partition(".")[0] == until)
    errors = [record["error"] for record in stages.values() if record["state"] == "failed"]
    published = details["publish"]
    sweep = stages.get("choose", {}).get("candidates", [])
    page = store.run_folder(name, run_id) / "report.html"
    summary: dict[str, Any] = {
        "recipe": name,
        "run": run_id,
        "verdict": "waiting" if waiting else _verdict(stages, errors, ended, until),
        "version": published and published.name,
        "revision": published and published.revision,
        "place": published and published.place,
        "error": errors[0] if errors else None,
        "report": str(page),
        "finished_at": None if waiting else now(),
        "seconds": round(sum(record.get("seconds", 0) for record in stages.values() if "candidate" not in record)
                         + sum(candidate["seconds"] for candidate in sweep), 2),
        "stages": {
            stage: {key: record.get(key) for key in ("state", "seconds", "reused", "folder", "summary")}
            for stage, record in stages.items()
        },
        "sweep": sweep,
    }  # fmt: skip
    content = report_page(summary, details, _training_log(store, outputs["train"]))
    with store.write_errors():
        atomic_write(page, content.encode())
    if waiting:
        return summary
    store.write_record(name, run_id, "run", summary)
    atomic_write(var() / "last_run.json", to_json(summary))
    if summary["verdict"] in FINAL:
        resolved = {"recipe": name, "run": run_id, "resolve": stages["resolve"]["fingerprint"]}
        record_outcome(
            store,
            pinned_recipe(store, resolved),
            summary["verdict"],
            run=run_id,
            version=summary["version"],
            from_recipe_file=stages["resolve"]["from_recipe_file"],
        )
    log.info("report: %s%s", page, "" if store.is_local else " (in Airflow: the tab Report of the run's page)")
    return summary


def note(summary: dict[str, Any]) -> str:
    """Return a run in one line of Markdown: verdict, version, dataset and base with revisions, and the error."""
    parts = [f"**{summary['verdict']}** {summary['version'] or ''}".strip()]
    parts += [
        summary["stages"][stage]["summary"] for stage in ("resolve", "choose", "evaluate") if stage in summary["stages"]
    ]
    if summary["error"] and summary["error"]["what"] not in parts:
        parts.append(summary["error"]["what"])
    return "; ".join(part for part in parts if part)


def _verdict(stages: dict[str, Any], errors: list[dict[str, str]], ended: bool, until: str) -> str:
    if any(error["kind"] == "GateRefused" for error in errors):
        return "refused"
    if any(error["kind"] == "Rejected" for error in errors):
        return "rejected"
    if stages.get("resolve", {}).get("state") == "skipped":
        return "skipped"
    if errors or not ended:
        return "failed"
    if until != NAMES[-1]:
        return "stopped"
    return "unchanged" if stages["publish"]["reused"] else "published"


def _output(store: Store, recipe: str, record: dict[str, Any] | None) -> Output[Any] | None:
    """Return the output of a finished stage; None for a stage that did not finish, or has none."""
    if record is None or record["state"] != "done" or "fingerprint" not in record:
        return None
    return find_output(store, recipe, record["stage"], record["fingerprint"])


def _training_log(store: Store, train: Output[TrainOutput] | None) -> bytes | None:
    if train is None:
        return None
    path = train.folder / TrainOutput.TRAINING_LOG
    with store.read_errors():
        return read_all([path]).get(path)
