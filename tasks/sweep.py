"""sweep: a candidate for each combination of the recipe's `sweep`, before training; the best of them, afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from include.errors import PermanentError
from include.stage import Trail, artifact_of, frozen_recipe, log, record_name, recorded
from include.store import Store
from tasks.resolve import freeze

OF_A_CANDIDATE = ("train", "smoke_test", "evaluate")  # the stages that each runs for itself


def candidates(trail: Trail) -> list[Trail]:
    """A trail for each combination of the sweep's values, in the grid's order, with a frozen recipe of its own."""
    store = Store()
    with recorded(store, trail["recipe"], trail["run"], "candidates") as record:
        recipe = frozen_recipe(store, trail)
        grid = []
        for label, candidate in recipe.candidates().items():
            frozen, _ = freeze(store, candidate, label)
            grid.append({**trail, "resolve": frozen.fingerprint, "candidate": label})
        values = " x ".join(f"{name} ({len(values)})" for name, values in recipe.sweep.items())
        line = f"{len(grid)} candidates: {values or 'the recipe as written'}"
        frozen_as = {trail["candidate"]: trail["resolve"] for trail in grid}
        record.close("done", line=line, grid=recipe.sweep, candidates=frozen_as)
        log.info("%s", line)
    return grid


def choose(grid: list[Trail], trails: Iterable[Trail]) -> Trail:
    """The trail of the best candidate: of those that the gate lets through, or else of all, the lowest holdout loss.

    Its records become those of the run. The first of the grid wins a tie.

    Args:
        grid: what `candidates` returned.
        trails: of those that came through `evaluate`.

    Raises:
        PermanentError: none came through; it says what became of the first.
    """
    store, recipe, run = Store(), grid[0]["recipe"], grid[0]["run"]
    with recorded(store, recipe, run, "choose") as record:
        records, through = store.records(recipe, run), {trail["resolve"]: trail for trail in trails}
        table = [_result(store, records, trail, through.get(trail["resolve"])) for trail in grid]
        record.content.update(grid=records["candidates"]["grid"], candidates=table)  # also of a sweep that failed
        measured = [row for row in table if row["loss"] is not None]
        if not measured:
            raise PermanentError(
                f"none of the {len(grid)} candidates came through: {table[0]['candidate']}: {table[0]['line']}",
                "Correct the sweep and run again; the report says what became of each",
            )
        best = min(measured, key=lambda row: (not row["publish"], row["loss"]))
        best["chosen"] = True
        chosen = through[best["resolve"]]
        for stage in OF_A_CANDIDATE:
            store.record(recipe, run, stage, records[record_name(stage, chosen)])
        failed = len(table) - len(measured)
        line = f"{best['candidate']}, the best of {len(grid)}: loss {best['loss']:.3f}"
        line += f"; {failed} failed" if failed else ""
        record.close("done", line=line)
        log.info("%s", line)
    return {name: mark for name, mark in chosen.items() if name != "candidate"}


def _result(store: Store, records: dict[str, Any], trail: Trail, through: Trail | None) -> dict[str, Any]:
    """A candidate's row of the table: what was measured, or what it failed of."""
    found = [records[name] for stage in OF_A_CANDIDATE if (name := record_name(stage, trail)) in records]
    failures = [record["line"] for record in found if record["state"] == "failed"]
    row: dict[str, Any] = {
        "candidate": trail["candidate"], "resolve": trail["resolve"], "chosen": False, "publish": False,
        "loss": None, "base": None, "live": None, "line": failures[0] if failures else "it was stopped",
        "seconds": round(sum(record.get("seconds", 0) for record in found), 2),
    }  # fmt: skip
    if through:
        facts = artifact_of(store, through, "evaluate").facts
        verdict, base, live = facts["verdict"], facts["verdict"]["against_base"], facts["verdict"]["against_live"]
        row.update(
            publish=verdict["publish"], line="; ".join(verdict["reasons"]), loss=base["candidate"], base=base["other"],
            live=live and live["other"],
        )  # fmt: skip
    return row


def sweep_of(records: dict[str, Any]) -> dict[str, Any] | None:
    """What a published version says of the sweep that it was chosen in: grid, losses and verdicts, no texts."""
    if "choose" not in records:
        return None
    rows = [{name: row[name] for name in ("candidate", "loss", "publish", "chosen")}
            for row in records["choose"]["candidates"]]  # fmt: skip
    return {"grid": records["choose"]["grid"], "candidates": rows}
