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
        line = f"{len(grid)} candidates: {values or 'the recipe as written'}"
        frozen_as = {lineage["candidate"]: lineage["resolve"] for lineage in grid}
        record.close("done", summary=line, grid=recipe.sweep, candidates=frozen_as)
        log.info("%s", line)
    return grid


def choose(grid: list[Lineage], lineages: Iterable[Lineage]) -> Lineage:
    """Return the lineage of the candidate with the lowest holdout loss of those that passed the gate, else of all.

    Its records become those of the run. The first of the grid wins a tie.

    Args:
        grid: what `candidates` returned.
        lineages: of those that came through `evaluate`.

    Raises:
        PermanentError: every candidate failed; the message has the first one's failure.
    """
    store, recipe, run = Store(), grid[0]["recipe"], grid[0]["run"]
    with recorded(store, recipe, run, "choose") as record:
        records, through = store.read_records(recipe, run), {lineage["resolve"]: lineage for lineage in lineages}
        table = [_result(store, records, lineage, through.get(lineage["resolve"])) for lineage in grid]
        record.content.update(grid=records["candidates"]["grid"], candidates=table)  # also of a sweep that failed
        measured = [row for row in table if row["loss"] is not None]
        if not measured:
            raise PermanentError(
                f"none of the {len(grid)} candidates came through: {table[0]['candidate']}: {table[0]['summary']}",
                "Correct the sweep and run again; the report says what became of each",
            )
        best = min(measured, key=lambda row: (not row["publish"], row["loss"]))
        best["chosen"] = True
        chosen = through[best["resolve"]]
        for stage in CANDIDATE_STAGES:
            store.write_record(recipe, run, stage, records[record_name(stage, chosen)])
        failed = len(table) - len(measured)
        line = f"{best['candidate']}, the best of {len(grid)}: loss {best['loss']:.3f}"
        line += f"; {failed} failed" if failed else ""
        record.close("done", summary=line)
        log.info("%s", line)
    return {name: value for name, value in chosen.items() if name != "candidate"}


def _result(store: Store, records: dict[str, Any], lineage: Lineage, through: Lineage | None) -> dict[str, Any]:
    """Return a candidate's row of the table: its losses and the verdict, or its failure."""
    found = [records[name] for stage in CANDIDATE_STAGES if (name := record_name(stage, lineage)) in records]
    failures = [record["summary"] for record in found if record["state"] == "failed"]
    row: dict[str, Any] = {
        "candidate": lineage["candidate"], "resolve": lineage["resolve"], "chosen": False, "publish": False,
        "loss": None, "base": None, "live": None, "summary": failures[0] if failures else "it was stopped",
        "seconds": round(sum(record.get("seconds", 0) for record in found), 2),
    }  # fmt: skip
    if through:
        verdict = output_of(store, through, "evaluate").metadata.verdict
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
