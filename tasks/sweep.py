"""sweep: before training, one candidate per combination of the recipe's `sweep`; afterwards, the best of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from include.errors import PermanentError
from include.pipeline.records import Lineage, log, record_name, recorded
from include.pipeline.stage import output_of, pinned_recipe
from include.storage.artifacts import Store
from tasks.resolve import pin
from tasks.stages import PIPELINE

CANDIDATE_STAGES = tuple(stage.name for stage in PIPELINE if stage.per_candidate)


def candidates(lineage: Lineage) -> list[Lineage]:
    """Return one lineage per combination of the sweep's values, in the grid's order, each with a pinned recipe."""
    store = Store()
    with recorded(store, lineage["recipe"], lineage["run"], "candidates") as record:
        recipe = pinned_recipe(store, lineage)
        grid = []
        for label, candidate in recipe.candidates().items():
            pinned, _ = pin(store, candidate, label)
            grid.append({**lineage, "resolve": pinned.fingerprint, "candidate": label})
        values = " x ".join(f"{name} ({len(values)})" for name, values in recipe.sweep.items())
        summary = f"{len(grid)} candidates: {values or 'the recipe as written'}"
        fingerprints = {lineage["candidate"]: lineage["resolve"] for lineage in grid}
        record.close("done", summary=summary, grid=recipe.sweep, candidates=fingerprints)
        log.info("%s", summary)
    return grid


def choose(grid: list[Lineage], lineages: Iterable[Lineage]) -> Lineage:
    """Return the lineage of the best candidate: the lowest holdout loss among those that passed the gate, or among all
    if none passed.

    The records of the best candidate become the records of the run. On a tie, the first one in the grid wins.

    Args:
        grid: what `candidates` returned.
        lineages: the lineages of the candidates that finished `evaluate`.

    Raises:
        PermanentError: every candidate failed; the message has the failure of the first one.
    """
    store, recipe, run = Store(), grid[0]["recipe"], grid[0]["run"]
    with recorded(store, recipe, run, "choose") as record:
        records, finished = store.read_records(recipe, run), {lineage["resolve"]: lineage for lineage in lineages}
        table = [_result(store, records, lineage, finished.get(lineage["resolve"])) for lineage in grid]
        record.content.update(grid=records["candidates"]["grid"], candidates=table)  # a failed sweep, too
        measured = [row for row in table if row["loss"] is not None]
        if not measured:
            raise PermanentError(
                f"all {len(grid)} candidates failed; the first one: {table[0]['candidate']}: {table[0]['summary']}",
                "Correct the sweep and run again; the report has the reason for each",
            )
        best = min(measured, key=lambda row: (not row["publish"], row["loss"]))
        best["chosen"] = True
        chosen = finished[best["resolve"]]
        for stage in CANDIDATE_STAGES:
            store.write_record(recipe, run, stage, records[record_name(stage, chosen)])
        failed = len(table) - len(measured)
        summary = f"{best['candidate']}, the best of {len(grid)}: loss {best['loss']:.3f}"
        summary += f"; {failed} failed" if failed else ""
        record.close("done", summary=summary)
        log.info("%s", summary)
    return {name: value for name, value in chosen.items() if name != "candidate"}


def _result(store: Store, records: dict[str, Any], lineage: Lineage, finished: Lineage | None) -> dict[str, Any]:
    """Return a candidate's row of the table: its losses and the verdict, or its failure."""
    found = [records[name] for stage in CANDIDATE_STAGES if (name := record_name(stage, lineage)) in records]
    failures = [record["summary"] for record in found if record["state"] == "failed"]
    row: dict[str, Any] = {
        "candidate": lineage["candidate"], "resolve": lineage["resolve"], "chosen": False, "publish": False,
        "loss": None, "base": None, "live": None, "summary": failures[0] if failures else "it was stopped",
        "seconds": round(sum(record.get("seconds", 0) for record in found), 2),
    }  # fmt: skip
    if finished:
        verdict = output_of(store, finished, "evaluate").metadata.verdict
        base, live = verdict.against_base, verdict.against_live
        row.update(
            publish=verdict.publish, summary="; ".join(verdict.reasons), loss=base.candidate, base=base.other,
            live=live and live.other,
        )  # fmt: skip
    return row


def sweep_of(records: dict[str, Any]) -> dict[str, Any] | None:
    """Return the sweep for the manifest of the published version: grid, losses and verdicts, no texts."""
    if "choose" not in records:
        return None
    rows = [{name: row[name] for name in ("candidate", "loss", "publish", "chosen")}
            for row in records["choose"]["candidates"]]  # fmt: skip
    return {"grid": records["choose"]["grid"], "candidates": rows}
