"""docker-compose.yaml's topology as processes of this machine: Postgres, Redis, an S3 server, Airflow, Celery workers.

One cluster for all tests; each worker has a disk of its own, and a new one has an empty disk.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from cluster.env import fernet_key
from cluster.native import Cluster, cluster, free_port, program
from include.errors import RetuneError
from include.registry import open_registry
from include.storage.artifacts import Store
from tests.conftest import conversation
from tests.services.airflow import Airflow, eventually
from tests.test_demo import processes

GPU = ("train", "smoke_test", "evaluate")
PAUSE = 1.0  # seconds between two looks: the API server has its own work, on the same two cores
VISIBILITY = 8  # seconds: far less than a training takes


class Running:
    """The cluster and its API."""

    def __init__(self, made: Cluster, airflow: Airflow):
        self.made, self.airflow = made, airflow

    @cached_property
    def shared(self) -> str:
        """A run whose data two CPU workers share."""
        self.made.process("worker-cpu", "cpu-2").start()
        self.made.wait("cpu-2")
        return self.airflow.trigger("many")

    def gpu_worker(self, name: str) -> None:
        """Start a GPU worker with an empty disk."""
        assert not (self.made.folder / name).exists()
        self.made.process("worker-cpu-train", name).start()
        self.made.wait(name)

    def lose(self, name: str, number: int) -> None:
        """End a worker by a signal, its disk with it."""
        self.made.processes[name].stop(number)
        assert not processes(self.made.folder / name)
        shutil.rmtree(self.made.folder / name)

    def steps(self, recipe: str, worker: str) -> int:
        """Steps that a worker's training has made, as its disk says."""
        logs = (self.made.folder / worker).glob(f"work/{recipe}/train/*/training_log.jsonl")
        return sum(len(log.read_bytes().splitlines()) for log in logs)

    def stored(self, recipe: str) -> int:
        """The step of the newest whole checkpoint in the object store."""
        found = Store().path(recipe, "train").glob("*.checkpoints/checkpoint-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)

    def states(self, dag: str, run: str) -> dict[str, str]:
        return {name: task["state"] for name, task in self.airflow.tasks(dag, run).items()}

    def record(self, recipe: str, run: str, stage: str = "run") -> dict[str, Any]:
        """What the run has left in the object store about a stage."""
        return Store().read_records(recipe, run)[stage]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[Path]:
    """Two small recipes and a large one, which works in shards."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = [conversation(f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}.") for i in range(60)]
    (folder / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    own = {
        "dataset": str(folder / "rows.jsonl"), "base_model": str(tiny_base), "max_seq_length": 256, "max_steps": 8,
        "learning_rate": 0.01, "holdout_share": 0.2, "prompts": ["What is 2 plus 3?"], "required_checks": [],
        "max_new_tokens": 8,
    }  # fmt: skip
    for name in ("one", "other"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    words, rng = [f"word{i}" for i in range(2000)], random.Random(0)
    rows = [conversation(" ".join(rng.sample(words, 8)), " ".join(rng.sample(words, 4))) for _ in range(12_000)]
    (folder / "many.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    many = {"dataset": str(folder / "many.jsonl"), "shard_rows": 5000}
    (folder / "many.yaml").write_text(yaml.safe_dump(own | many))
    return sorted(folder.glob("*.yaml"))


@pytest.fixture(scope="module")
def running(recipes: list[Path], tiny_base: Path) -> Iterator[Running]:
    """The cluster, without a GPU worker."""
    try:
        program("initdb"), program("redis-server")
    except RetuneError as missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(missing))
    folder = Path(tempfile.mkdtemp(prefix="retune-cluster-"))
    folder.chmod(0o755)  # Postgres is not run by root
    alone = pytest.MonkeyPatch()
    alone.setenv("OMP_NUM_THREADS", "1")  # torch's threads on busy cores wait for each other
    places = {"RETUNE_RECIPES": ":".join(map(str, recipes)), "VISIBILITY_TIMEOUT": str(VISIBILITY)}
    try:
        with cluster(folder, free_port(), **places) as made:
            made.up(*(name for name in made.services("cpu-train") if name != "worker-cpu-train"))
            yield Running(made, Airflow(made.port, made.variables["ADMIN_PASSWORD"]))
        assert not processes(folder), "nothing is left behind"
    finally:
        alone.undo()
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def store(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test looks into the same object store."""
    for name, value in running.made.processes["worker-cpu"].environment.items():
        if name.startswith(("AWS_", "RETUNE_STORE", "RETUNE_REGISTRY")):
            monkeypatch.setenv(name, value)


def test_nobody_gets_in_without_the_secrets(running: Running) -> None:
    import boto3
    import botocore.exceptions
    import psycopg2
    import redis

    places = running.made.variables
    with pytest.raises(urllib.error.HTTPError, match="401"):
        Airflow(running.made.port, "admin")
    for password in ("", "airflow"):
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(
                host="127.0.0.1", port=places["POSTGRES_PORT"], user="airflow", dbname="airflow", password=password
            )
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(port=int(places["REDIS_PORT"])).ping()
    endpoint = f"http://127.0.0.1:{places['S3_PORT']}"
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch|AccessDenied|403"):
        wrong = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="retune", aws_secret_access_key="airflow")
        wrong.list_objects(Bucket="retune")
    secret = {name: value for name, value in places.items() if name.endswith(("PASSWORD", "SECRET", "KEY"))}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert not [name for name, value in secret.items() if value in command], command


def test_the_demo_is_published_through_a_bad_night(running: Running) -> None:
    airflow = running.airflow
    run = airflow.trigger("demo")
    eventually(lambda: running.states("demo", run)["train"] == "queued", 900, PAUSE)
    waiting = airflow.tasks("demo", run)["train"]
    assert (waiting["queue"], waiting["pool"], waiting["start_date"]) == ("gpu", "gpu", None)
    assert {name for name, state in running.states("demo", run).items() if state == "success"} == {
        "resolve", "pretrain", "download", "validate", "standardize", "template"
    }  # fmt: skip

    running.gpu_worker("gpu-1")
    assert running.states("demo", run)["train"] in ("queued", "running"), "it waited, and was not given up"
    eventually(lambda: running.steps("demo", "gpu-1") >= 30)
    scheduler = running.made.processes["scheduler"]
    scheduler.stop(signal.SIGKILL)
    scheduler.start()
    database = running.made.processes["postgres"]
    database.stop()
    database.start()
    running.made.wait("scheduler")
    running.made.wait("api-server")
    at = running.steps("demo", "gpu-1")
    eventually(lambda: running.steps("demo", "gpu-1") >= at + 10)
    assert airflow.tasks("demo", run)["train"]["try_number"] == 1, "the training did not notice"

    running.lose("gpu-1", signal.SIGTERM)
    assert running.made.processes["gpu-1"].popen.returncode == 0, "it went when the checkpoint was in the store"
    told = running.stored("demo")
    assert told >= at + 10, "it was saved when SIGTERM came"

    running.gpu_worker("gpu-2")
    eventually(lambda: running.stored("demo") > told, 240, PAUSE)
    running.lose("gpu-2", signal.SIGKILL)
    later = running.stored("demo")
    assert later % 25 == 0, "the last of the regular ones"
    assert running.shared, "it begins, since a minute goes by until the lost worker is missed"
    running.gpu_worker("gpu-3")
    assert airflow.ended("demo", run, 900, PAUSE) == "success", running.states("demo", run)

    tasks = airflow.tasks("demo", run)
    assert {name: task["try_number"] for name, task in tasks.items() if task["try_number"] != 1} == {"train": 3}
    assert {name for name, task in tasks.items() if task["queue"] == "gpu"} == set(GPU)
    summary, train = running.record("demo", run), running.record("demo", run, "train")
    assert (summary["verdict"], summary["version"]) == ("published", "v1")
    assert "went on from checkpoint-" in train["summary"]
    fetched = [line for attempt in (2, 3) for line in airflow.log("demo", run, "train", attempt) if "fetched" in line]
    assert len(fetched) == 2, "each new disk was empty"
    assert [int(line.split("checkpoint-")[1].split()[0]) for line in fetched] == [told, later]
    assert not running.stored("demo"), "no checkpoint of a finished training is kept"
    live = open_registry(f"{os.environ['RETUNE_REGISTRY']}/demo").live()
    assert live is not None
    assert live.name == "v1"
    for worker, stages in (("worker-cpu", set(GPU)), ("gpu-3", {"validate", "template", "publish"})):
        assert not {path.name for path in (running.made.folder / worker / "work" / "demo").iterdir()} & stages


def test_two_recipes_share_one_gpu_and_nothing_runs_twice(running: Running) -> None:
    airflow = running.airflow
    if "gpu-4" not in running.made.processes:
        running.gpu_worker("gpu-4")
    runs = {name: airflow.trigger(name, max_steps=100) for name in ("one", "other")}
    for name, run in runs.items():
        assert airflow.ended(name, run, 900, PAUSE) == "success", running.states(name, run)
    tasks = {name: airflow.tasks(name, run) for name, run in runs.items()}
    spans = sorted(
        tuple(datetime.fromisoformat(tasks[name][stage][when]) for when in ("start_date", "end_date"))
        for name in tasks
        for stage in GPU
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "one at a time, with two workers at hand"
    assert any((end - begin).total_seconds() > VISIBILITY + 10 for begin, end in spans), "Redis sent it out again"
    assert {task["try_number"] for name in tasks for task in tasks[name].values()} == {1}
    for name, run in runs.items():
        assert running.record(name, run)["verdict"] == "published"
        begun = [line for line in airflow.log(name, run, "train") if "went on" in line or "fetched" in line]
        assert not begun


def test_two_cpu_workers_share_the_data_and_make_what_one_makes(
    running: Running, pipeline: Callable, artifact: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    airflow, run = running.airflow, running.shared
    eventually(lambda: running.states("many", run)["template.finish"] == "success", 900, PAUSE)
    airflow.call("PATCH", f"/api/v2/dags/many/dagRuns/{run}", {"state": "failed"})
    for step in ("standardize.compare", "standardize.write", "template.encode"):
        path = f"/api/v2/dags/many/dagRuns/{run}/taskInstances?task_id={step}"
        mapped = airflow.call("GET", path)["task_instances"]
        assert {task["rendered_map_index"] for task in mapped} == {
            "rows 0 to 5,000", "rows 5,000 to 10,000", "rows 10,000 to the end"
        }  # fmt: skip
    for worker in ("worker-cpu", "cpu-2"):
        assert list((running.made.folder / worker / "work" / "many").glob("*/.*-*.lock")), f"{worker} had no shard"
    shared = running.record("many", run, "template")

    shared_facts = Store().find("many", "template", shared["fingerprint"])
    monkeypatch.setenv("RETUNE_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("RETUNE_RECIPES", running.made.variables["RETUNE_RECIPES"])
    lineage = pipeline(Path("many"), "template")
    assert lineage["template"] == shared["fingerprint"]
    alone = artifact(lineage)
    assert shared_facts is not None
    assert shared_facts.metadata.train.ids_sha256 == alone.metadata.train.ids_sha256
    rows = {name: file for name, file in alone.manifest["files"].items() if not name.startswith("data_docs/")}
    assert {name: shared_facts.manifest["files"][name] for name in rows} == rows


def test_a_ui_without_a_live_worker_still_shows_what_tasks_said(running: Running) -> None:
    run = running.airflow.runs("demo")[-1]["dag_run_id"]
    said = running.airflow.log("demo", run, "train", 1)  # of the worker that got SIGTERM
    assert any("s3://retune/logs" in line for line in said)


def test_a_backup_is_restored_under_fresh_secrets(running: Running) -> None:
    """What docs/operations.md says of backups, made while a run goes on, and of secrets."""
    old, run = running.made, running.airflow.trigger("one")

    def stored_log(airflow: Airflow) -> bool:
        return any("s3://retune/logs" in line for line in airflow.log("one", run, "resolve"))

    eventually(lambda: running.states("one", run)["resolve"] == "success", 120, PAUSE)
    eventually(lambda: stored_log(running.airflow), 60, PAUSE)
    kept = {"connection_id": "kept", "conn_type": "http", "password": "hf_kept"}
    running.airflow.call("POST", "/api/v2/connections", kept)
    with tempfile.TemporaryDirectory(prefix="retune-restored-") as name:
        folder, dump, fresh = Path(name), Path(name) / "airflow.dump", fernet_key()
        folder.chmod(0o755)
        postgres(old, "pg_dump", "--format=custom", f"--file={dump}")
        shutil.copytree(old.folder / "store", folder / "store")
        with cluster(folder, free_port(), FERNET_KEY=f"{fresh},{old.variables['FERNET_KEY']}") as new:
            secret = {name for name in old.variables if name.endswith(("PASSWORD", "SECRET", "KEY"))}
            assert not [name for name in secret & new.variables.keys() if new.variables[name] == old.variables[name]]
            new.up("postgres", "store")
            postgres(new, "pg_restore", "--clean", "--if-exists", str(dump))
            new.up("redis", "init", "api-server")
            environment = new.processes["api-server"].environment
            command(environment, "rotate-fernet-key")
            found = command({**environment, "AIRFLOW__CORE__FERNET_KEY": fresh}, "connections", "get", "kept")
            assert "hf_kept" in found
            with pytest.raises(urllib.error.HTTPError, match="401"):
                Airflow(new.port, old.variables["ADMIN_PASSWORD"])
            restored = Airflow(new.port, new.variables["ADMIN_PASSWORD"])
            assert restored.tasks("one", run)["resolve"]["state"] == "success"
            assert stored_log(restored)


def postgres(made: Cluster, name: str, *arguments: str) -> None:
    """Run one of Postgres's programs on a cluster's database."""
    variables = made.variables
    where = ["--host=127.0.0.1", f"--port={variables['POSTGRES_PORT']}", "--username=airflow", "--dbname=airflow"]
    password = {**os.environ, "PGPASSWORD": variables["POSTGRES_PASSWORD"]}
    subprocess.run([program(name), *where, *arguments], env=password, check=True)


def command(environment: dict[str, str], *arguments: str) -> str:
    """What a command of Airflow's says."""
    airflow = str(Path(sys.executable).with_name("airflow"))
    return subprocess.run([airflow, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
