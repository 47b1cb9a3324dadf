"""standardize and template on one worker of one core against two such workers: `make bench-shards`.

The rows are those of `bench/data.py`. Each task is a process of its own, imports counted, bound to its worker's core;
workers have state folders of their own and a store in common. The two ways go in turn, `--rounds` times. Besides the
seconds on the clock, which others on the machine disturb, the processor seconds on the longest way are given: for each
step, of the worker that had most to do.

What one machine must do alone is measured on made-up columns: the comparison of signatures (MinHash), and the checks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.data import PROJECT, TOKENIZER, in_process

STAGES = ("standardize", "template")
SHARE_NEAR = 0.01  # of made-up rows, copies of others


def task(core: str, stage: str, way: str, lineage: str, step: str, shard: str) -> Any:
    """A task of a stage, on a core."""
    os.sched_setaffinity(0, {int(core)})
    of = getattr(import_module(f"tasks.{stage}"), stage)
    if way == "run_step":
        return of.run_step(json.loads(lineage), next(one for one in of.steps if one.name == step), json.loads(shard))
    return getattr(of, way)(json.loads(lineage))


def signatures(core: str, rows: str) -> dict[str, float]:
    """Group so many made-up rows by their signatures; returns `seconds`, without the imports."""
    import numpy as np

    from include.data.deduplication import SLOTS, ShingleSets, candidate_rows, near_duplicate_groups

    chooser, count = np.random.default_rng(0), int(rows)
    made = chooser.integers(1, 2**32, (count, SLOTS), np.uint32)
    copies = chooser.choice(count, int(count * SHARE_NEAR), replace=False)
    made[copies] = made[chooser.integers(0, count, len(copies))]
    one_each = made[:, :2].copy().view(np.uint64).ravel()  # equal for copies
    sets = ShingleSets(one_each, np.arange(count), np.ones(count, np.int64))
    began = time.monotonic()
    candidate_rows(made, 0.85)
    near_duplicate_groups(made, sets, np.arange(count), 0.85)
    return {"seconds": time.monotonic() - began}


def suite(core: str, rows: str) -> dict[str, float]:
    """Put so many made-up rows through the suite of `template`; returns `seconds`, without the imports."""
    import numpy as np
    import pandas as pd

    from include.data.expectations import PREPARED_ROWS, Suite

    columns: dict[str, Any] = {rule.column: np.zeros(int(rows), np.int32) for rule in PREPARED_ROWS}
    columns["tokens_over"][::100] = 1
    frame = pd.DataFrame({"row": np.arange(int(rows)), **columns})
    with tempfile.TemporaryDirectory() as folder, Suite("prepared_rows", PREPARED_ROWS, {}, Path(folder)) as checks:
        checks.validate(frame.head(1000))
        shutil.rmtree(folder)
        began = time.monotonic()
        checks.validate(frame)
        return {"seconds": time.monotonic() - began}


def process(var: Path, way: str, *arguments: Any) -> dict[str, Any]:
    """One of the functions above in a process of its own: what it returned (`said`), `seconds`, `cpu_seconds` with
    those of its own processes, and `peak_mb` of the largest.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.NamedTemporaryFile() as result, tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.shards", way, result.name, *map(str, arguments)], cwd=PROJECT,
            env={**os.environ, "RETUNE_VAR": str(var)}, stdout=log, stderr=log,
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise RuntimeError(log.read()[-2000:])
        return {
            "said": json.loads(Path(result.name).read_text()), "seconds": time.monotonic() - began,
            "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024,
        }  # fmt: skip


def share(folder: Path, lineage: dict[str, str], workers: int) -> dict[str, dict[str, float]]:
    """Both stages, with so many workers: for each step `seconds`, `cpu_seconds` on the longest way, `peak_mb`."""
    found: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        shutil.rmtree(folder / "store" / "bench" / stage, ignore_errors=True)
    for stage in STAGES:
        of = getattr(import_module(f"tasks.{stage}"), stage)

        known = json.dumps(lineage)

        def once(way: str, step: str = "", stage: str = stage, known: str = known) -> Any:
            cost = process(folder / "worker-0", "task", 0, stage, way, known, step, "null")
            said = cost.pop("said")
            found[f"{stage} {step or way}"] = cost
            return said

        shards = once("plan")
        for step in of.steps[len(of.leading_steps) :]:
            if not step.mapped:
                once("run_step", step.name)
                continue

            tasks: list[tuple[str, ...]] = [
                (stage, "run_step", known, step.name, json.dumps(shard)) for shard in shards
            ]

            def lane(worker: int, tasks: list[tuple[str, ...]] = tasks) -> list[dict[str, Any]]:
                own = tasks[worker::workers]
                return [process(folder / f"worker-{worker}", "task", worker, *one) for one in own]

            began = time.monotonic()
            with ThreadPoolExecutor(workers) as pool:
                lanes = list(pool.map(lane, range(workers)))
            found[f"{stage} {step.name}"] = {
                "seconds": time.monotonic() - began,
                "cpu_seconds": max(sum(cost["cpu_seconds"] for cost in lane) for lane in lanes),
                "peak_mb": max(cost["peak_mb"] for lane in lanes for cost in lane),
            }
        lineage = once("finish")
    return found


def main() -> None:
    """Run both ways in turn, print the table, write bench/shards.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--shard-rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", type=int, nargs="+", default=[1_000_000, 4_000_000], help="rows of made-up columns")
    arguments = parser.parse_args()
    rounds: dict[int, list[dict[str, dict[str, float]]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_process("generate", str(folder / "rows.jsonl"), str(arguments.rows))
        base = folder / "base"
        shutil.copytree(TOKENIZER, base)
        (base / "config.json").write_text("{}")
        (base / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # no tensors: only the tokenizer is read
        recipe = folder / "bench.yaml"
        recipe.write_text(
            f"dataset: {folder / 'rows.jsonl'}\nbase_model: {base}\nholdout_share: 0.01\n"
            f"shard_rows: {arguments.shard_rows}\n"
        )
        os.environ.update(RETUNE_VAR=name, RETUNE_STORE=f"file://{name}/store", RETUNE_RECIPES=str(recipe))
        from tasks.stages import run_stages

        lineage = run_stages("bench", {}, "bench", "validate")
        for _ in range(arguments.rounds):
            for workers, costs in rounds.items():
                costs.append(share(folder, lineage, workers))
    alone = [
        {"what": way, "rows": rows, "seconds": cost["said"]["seconds"], "peak_mb": cost["peak_mb"]}
        for rows in arguments.alone for way in ("signatures", "suite")
        for cost in [process(Path(name), way, 0, rows)]
    ]  # fmt: skip
    table: dict[str, dict[str, list[float]]] = {}
    print(f"{arguments.rows:,} rows, shards of {arguments.shard_rows:,}; medians of {arguments.rounds}")
    print(f"{'step':<24} {'1 worker':>9} {'2':>7} {'x':>5}   {'1, CPU s':>9} {'2':>7} {'x':>5} {'peak MB':>8}")
    for step in rounds[1][0]:
        table[step] = {
            key: [statistics.median(one[step][key] for one in rounds[workers]) for workers in rounds]
            for key in ("seconds", "cpu_seconds", "peak_mb")
        }
    total = {key: [sum(cost[key][i] for cost in table.values()) for i in (0, 1)] for key in ("seconds", "cpu_seconds")}
    for step, cost in {**table, "all": {**total, "peak_mb": [max(c["peak_mb"][1] for c in table.values())]}}.items():
        (one, two), (cpu, cpus) = cost["seconds"], cost["cpu_seconds"]
        print(f"{step:<24} {one:>9.1f} {two:>7.1f} {one / two:>5.2f}   {cpu:>9.1f} {cpus:>7.1f} {cpu / cpus:>5.2f} "
              f"{max(cost['peak_mb']):>8,.0f}")  # fmt: skip
    for entry in alone:
        print(f"{entry['what']:<24} {entry['rows']:>11,} rows {entry['seconds']:>7.1f} s {entry['peak_mb']:>8,.0f} MB")
    report = {"rows": arguments.rows, "shard_rows": arguments.shard_rows, "steps": table, "all": total, "alone": alone,
              "rounds": [{str(workers): costs[i] for workers, costs in rounds.items()}
                         for i in range(arguments.rounds)]}  # fmt: skip
    (PROJECT / "bench" / "shards.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    ways: dict[str, Any] = {"task": task, "signatures": signatures, "suite": suite}
    if sys.argv[1:2] and sys.argv[1] in ways:
        outcome = ways[sys.argv[1]](*sys.argv[3:])
        Path(sys.argv[2]).write_text(json.dumps(outcome))
    else:
        main()
