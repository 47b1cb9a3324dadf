"""standardize and template shared by several machines: the result of one machine, whatever happens to a shard."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from include.errors import RetuneError, TransientError
from include.pipeline.sharding import MAX_SHARDS, PARTS, _split
from include.pipeline.stage import output_of
from include.storage.artifacts import Artifact, Store
from include.storage.files import MANIFEST, file_digest
from tasks.report import report
from tasks.standardize import decide, standardize
from tasks.template import template
from tests.conftest import conversation, last_run, unlock
from tests.services.s3 import S3
from tests.services.workers import DONE, Worker, run_stage

WORDS = [f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "ra", "se", "ti") for b in ("n", "rd", "la", "st", "mmo")]


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations; some very long, some with an empty answer, some of the last 1,000 nearly equal to early ones."""
    chooser = random.Random(7)

    def said(words: int) -> str:
        return " ".join(chooser.choices(WORDS, k=words))

    made = []
    for i in range(count):
        row = conversation(f"{said(8)}?", f"{said(12)}.")
        for _ in range(5 if i % 90 == 0 else 0):
            row["conversations"] += conversation(said(8), said(30))["conversations"]
        if i % 500 == 3:
            row["conversations"][-1]["value"] = " "
        made.append(row)
    for i in range(10, 60):
        turns = [turn["value"] for turn in made[i]["conversations"][:2]]
        made[count - 1000 + i] = conversation(turns[0], turns[1] + " again")
    return made


def pairs(count: int) -> list[dict[str, Any]]:
    """Preference rows, some too long."""
    plain = [[turn["value"] for turn in row["conversations"][:2]] for row in rows(count)]
    return [
        {"prompt": asked, "chosen": f"yes {answer} {i}", "rejected": f"no {i} " * (120 if i % 70 == 0 else 1)}
        for i, (asked, answer) in enumerate(plain)
    ]


def written(tmp_path: Path, content: list[dict[str, Any]]) -> str:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def known(found: Artifact) -> dict[str, Any]:
    """What is said of an artifact, with the digests of its files, without times and the data docs, which show times."""
    said = {name: value for name, value in found.manifest.items() if name not in ("made_at", "seconds", "packages")}
    said["metadata"] = {name: value for name, value in said["metadata"].items() if name != "docs"}
    said["files"] = {name: file for name, file in said["files"].items() if not name.startswith("data_docs/")}
    return said


class Workers:
    """Machines without a disk in common: each step in a process of its own, with the state folder of its machine."""

    def __init__(self, folder: Path, lineage: dict[str, str]):
        self.folder, self.lineage = folder, lineage

    def start(self, machine: str, stage: str, way: str, step: str = "", shard: Any = None) -> Worker:
        return Worker(run_stage, stage, way, self.lineage, step, shard, RETUNE_VAR=str(self.folder / machine))

    def say(self, *arguments: Any) -> Any:
        """What a task of the first machine returned."""
        return json.loads(ended(self.start("one", *arguments)))

    def share(self, stage: str, step: str, shards: list[Any]) -> None:
        """A step's shards on two machines, two at a time."""
        for i in range(0, len(shards), 2):
            for process in [
                self.start(m, stage, "do", step, s) for m, s in zip(("one", "two"), shards[i:], strict=False)
            ]:
                ended(process)

    def run(self) -> None:
        """Both stages, from one machine to the other."""
        shards = self.say("standardize", "plan")
        self.share("standardize", "compare", shards)
        ended(self.start("two", "standardize", "do", "decide"))
        self.share("standardize", "write", shards[::-1])
        self.lineage = self.say("standardize", "finish")
        self.share("template", "encode", self.say("template", "plan"))
        self.lineage = self.say("template", "finish")


def ended(worker: Worker) -> str:
    result = worker.result()
    assert result is not None, "it has failed"
    return result


def test_two_machines_make_what_one_makes(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = rows(11_600)  # the last thousand to evaluate on: some nearly equal to early ones
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_up[10_600:]))
    (tmp_path / "prompts.txt").write_text(made_up[77]["conversations"][0]["value"])
    repeated = [
        conversation(turns[0]["value"], turns[1]["value"] + " once more")
        for turns in (row["conversations"] for row in made_up[100:140])
    ]
    fields = {"dataset": written(tmp_path, [*made_up[:10_600], *repeated]), "on_too_long": "split",
              "max_seq_length": 160, "near_duplicates": "drop", "eval_dataset": str(tmp_path / "eval.jsonl"),
              "decontaminate_against": str(tmp_path / "prompts.txt"), "holdout_share": 0.05}  # fmt: skip
    lineage = pipeline(small_recipe(**fields), "template")
    alone = {name: known(artifact(lineage, name)) for name in ("standardize", "template")}
    assert alone["standardize"]["metadata"]["left_out_reasons"].keys() == {
        "near-duplicate of another row", "near-duplicate of a held-out row", "contains a benchmark's prompt"
    }  # fmt: skip
    assert min(alone["standardize"]["metadata"][name] for name in ("near_duplicates", "leaking")) >= 20
    assert alone["template"]["metadata"]["too_long"] > alone["template"]["metadata"]["left_out"]

    with S3(tmp_path / "s3", "bucket"):
        uri = "s3://bucket"
        monkeypatch.setenv("RETUNE_STORE", uri)
        monkeypatch.setenv("RETUNE_VAR", str(tmp_path / "zero"))
        workers = Workers(tmp_path, pipeline(small_recipe(**fields, shard_rows=5_000), "validate"))
        workers.run()
        store, made = Store(), workers.lineage
        for name, said in alone.items():
            found = output_of(store, made, name)
            assert known(found) == said, name
            below = {path.removeprefix(found.folder.path + "/") for path in found.folder.fs.find(found.folder.path)}
            assert below == {*found.manifest["files"], MANIFEST}, "nothing of the parts is left"
        for machine in ("one", "two"):
            assert not list((tmp_path / machine).rglob("*.arrow")), "no machine keeps rows"
        assert [store.read_records("small", "test")[name]["state"] for name in alone] == ["done", "done"]
        assert workers.say("standardize", "plan") == [], "it is there already"

        # what is fetched is what was made
        found = output_of(store, made, "template")
        local = found.local("holdout", "samples.txt", into=tmp_path / "some")
        fetched = {path.relative_to(local).parts[0] for path in local.rglob("*") if path.is_file()}
        assert fetched == {"holdout", "samples.txt"}
        with ThreadPoolExecutor(6) as pool:  # as tasks of one machine do
            (cached,) = set(
                pool.map(lambda names: found.local(*names), [("holdout",), (), ("samples.txt", "train")] * 2)
            )
        assert {name: file_digest(cached / name) for name in found.manifest["files"]} == {
            name: file["sha256"] for name, file in found.manifest["files"].items()
        }
        samples = found.folder / "samples.txt"
        samples.write_bytes(samples.read_bytes()[::-1])
        with pytest.raises(TransientError, match=r"samples\.txt has another sha256 than its manifest says"):
            found.local("samples.txt", into=tmp_path / "others")
        assert not [path for path in (tmp_path / "others").rglob("*") if path.is_file()]


def test_a_shard_that_is_killed_or_done_twice_does_no_harm(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"dataset": written(tmp_path, pairs(5_200)), "method": "dpo"}
    lineage = pipeline(small_recipe(**fields), "template")
    alone = {name: known(artifact(lineage, name)) for name in ("standardize", "template")}
    assert alone["template"]["metadata"]["too_long"] > 0

    monkeypatch.setenv("RETUNE_STORE", f"file://{tmp_path}/third")
    workers = Workers(tmp_path, pipeline(small_recipe(**fields, shard_rows=5_000), "validate"))
    first, second = workers.say("standardize", "plan")
    assert [shard["label"] for shard in (first, second)] == ["rows 0 to 5,000", "rows 5,000 to the end"]
    folder = tmp_path / "third" / "small" / "standardize" / first["of"]

    killed = workers.start("one", "standardize", "do", "compare", first)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "one").glob("work/small/standardize/*.compare-0-1")):  # it is at work
        assert killed.running and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.result() is None
    assert not list(folder.rglob("compare-*.json"))
    with pytest.raises(RetuneError, match=f"parts of the step compare are not in .*{first['of']}"):
        standardize.run_step(workers.lineage, decide)

    at_once = [workers.start(m, "standardize", "do", "compare", first) for m in ("one", "two", "one")]
    assert [ended(process) for process in at_once] == [DONE] * 3
    ended(workers.start("two", "standardize", "do", "compare", second))
    record = folder / PARTS / "compare-0-1.json"
    before = record.stat().st_mtime_ns
    ended(workers.start("two", "standardize", "do", "compare", first))
    assert record.stat().st_mtime_ns == before, "what is done is not done again"
    assert Store().find("small", "standardize", first["of"]) is None, "no one sees it yet"

    workers.run()
    late = workers.start("two", "standardize", "do", "write", first)  # delivered once more after the end
    ended(late)
    for name, said in alone.items():
        found = output_of(Store(), workers.lineage, name)
        assert known(found) == said, name
        files = {path.relative_to(found.local()).as_posix() for path in found.local().rglob("*") if path.is_file()}
        assert files == {*found.manifest["files"], MANIFEST}
    made = tmp_path / "third" / "small" / "template" / workers.lineage["template"]
    unlock(made)
    (made / "train" / "00001.arrow").unlink()
    assert [shard["first"] for shard in workers.say("template", "plan")] == [0, 1], "half of it is worth nothing"


def test_the_report_shows_the_error_of_a_shard(tmp_path: Path, small_recipe: Callable, pipeline: Callable) -> None:
    recipe = small_recipe(dataset=written(tmp_path, rows(5_200)), shard_rows=5_000)
    lineage = pipeline(recipe, "validate")
    _, second = standardize.plan(lineage)
    with pytest.raises(RetuneError, match="this worker computes .*, the worker that planned computed other"):
        standardize.run_step(lineage, standardize.steps[0], {**second, "of": "other"})
    summary = report("small", "test")
    assert summary["error"]["what"].startswith("rows 5,000 to the end: this worker computes ")
    assert summary["stages"]["standardize"]["state"] == "failed"
    assert [stage for stage in summary["stages"] if stage.startswith("standardize")] == ["standardize"]


def test_shards_are_as_few_as_they_may_be() -> None:
    assert [shard["label"] for shard in _split(3, 10_000, "")] == ["rows 0 to 10,000", "rows 10,000 to the end"]
    assert len(_split(3, 1_000_000, "")) == len(_split(3, None, "")) == 1
    assert len(_split(3, 1, "")) == 3, "a file is the least"
    many = _split(40_001, 5_000, "")
    assert len(many) <= MAX_SHARDS
    assert (many[0]["first"], many[-1]["end"]) == (0, 40_001)
    assert all(one["end"] == other["first"] for one, other in pairwise(many))


def test_airflow_maps_over_shards_and_reuses_what_is_there(
    tmp_path: Path, var: Path, airflow_home: Path, small_recipe: Callable, retune: Callable
) -> None:
    recipe = small_recipe(dataset=written(tmp_path, rows(5_200)), shard_rows=5_000, max_holdout_rows=20)
    labels = ["rows 0 to 5,000", "rows 5,000 to the end"]
    for verdict, mapped in (("published", ["success"] * 2), ("unchanged", ["skipped"])):
        done = retune("run", "small", RETUNE_RECIPES=str(recipe))
        assert done.returncode == 0, done.stdout
        assert last_run(var)["verdict"] == verdict
        for stage in ("standardize", "template"):
            assert done.stdout.count(f"✓ {stage}") == 1, "one line for a stage"
            assert last_run(var)["stages"][stage]["reused"] == (verdict == "unchanged")
        with sqlite3.connect(var / "airflow" / "headless" / "airflow.db") as database:
            found = database.execute(
                "SELECT task_id, state, rendered_map_index FROM task_instance WHERE run_id = ? AND task_id LIKE '%.%' "
                "ORDER BY task_id, map_index", (last_run(var)["run"],)
            ).fetchall()  # fmt: skip
        tasks: dict[str, list[tuple[str, str]]] = {}
        for name, *state in found:
            tasks.setdefault(name, []).append(tuple(state))
        assert set(tasks) == {*(f"standardize.{step}" for step in ("plan", "compare", "decide", "write", "finish")),
                              *(f"template.{step}" for step in ("plan", "encode", "finish"))}  # fmt: skip
        for name in ("standardize.compare", "standardize.write", "template.encode"):
            assert [state for state, _ in tasks[name]] == mapped, name
            if verdict == "published":
                assert [label for _, label in tasks[name]] == labels
        assert {tasks[name][0][0] for name in tasks if name.endswith((".plan", ".decide", ".finish"))} == {"success"}


def test_the_steps_are_those_of_the_stages() -> None:
    assert [(step.name, step.mapped) for step in (*standardize.steps, *template.steps)] == [
        ("compare", True), ("decide", False), ("write", True), ("verify_sample", False), ("encode", True),
    ]  # fmt: skip
