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
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import kombu
import orjson
import pytest
import yaml

from cluster.env import fernet_key
from cluster.native import Cluster, cluster, free_port, program
from include.errors import RetuneError
from include.pipeline.stage import find_output
from include.registry import open_registry
from include.storage.artifacts import Store
from tests.conftest import conversation
from tests.services.airflow import Airflow, eventually
from tests.test_demo import processes

pytestmark = pytest.mark.xdist_group("cluster")  # they share one cluster

GPU = ("train", "smoke_test", "evaluate")
PAUSE = 1.0  # seconds between two requests: the API server has other work, on the same two cores


class Running:
    """The cluster and its API."""

    def __init__(self, made: Cluster, airflow: Airflow):
        self.made, self.airflow = made, airflow

    @cached_property
    def shared(self) -> str:
        """The id of a run whose data two CPU workers share."""
        self.made.process("worker-cpu", "cpu-2").start()
        self.made.wait("cpu-2")
        return self.airflow.trigger("many")

    def gpu_worker(self, name: str) -> None:
        """Start a GPU worker with an empty disk."""
        assert not (self.made.folder / name).exists()
        self.made.process("worker-cpu-train", name).start()
        self.made.wait(name)

    def lose(self, name: str, number: int) -> None:
        """End a worker by a signal and remove its disk."""
        self.made.processes[name].stop(number)
        assert not processes(self.made.folder / name)
        shutil.rmtree(self.made.folder / name)

    def steps(self, recipe: str, worker: str) -> int:
        """Return the number of steps in the training logs on a worker's disk."""
        logs = (self.made.folder / worker).glob(f"work/{recipe}/train/*/training_log.jsonl")
        return sum(len(log.read_bytes().splitlines()) for log in logs)

    def engines(self, worker: str) -> list[int]:
        """Return the engine processes of a worker."""
        return processes(self.made.folder / worker, "include.engine")

    def freeze_at(self, recipe: str, worker: str, steps: int) -> None:
        """Stop a worker's training after so many steps, until `thaw`: what the test does then has all the time."""
        eventually(lambda: self.steps(recipe, worker) >= steps, pause=0.02)
        for pid in self.engines(worker):
            os.kill(pid, signal.SIGSTOP)
        assert self.engines(worker), "the training has not ended"

    def thaw(self, worker: str) -> None:
        """Let a stopped training go on."""
        for pid in self.engines(worker):
            os.kill(pid, signal.SIGCONT)

    def refused_messages(self) -> int:
        """Messages that a GPU worker has got although their task runs already, by the workers' logs."""
        logs = (process.log for name, process in self.made.processes.items() if name.startswith("gpu-"))
        return sum(log.read_text(errors="replace").count("already running elsewhere") for log in logs)

    def unanswered(self, queue: str) -> set[str]:
        """Return the tags of the messages that a worker of the queue has got and not answered."""
        with self._channel() as channel:
            messages = channel.client.hgetall(channel.unacked_key)
            return {tag.decode() for tag, message in messages.items() if orjson.loads(message)[2] == queue}

    def deliver_again(self, tags: set[str]) -> None:
        """Put unanswered messages back into their queue, as workers do after the visibility timeout."""
        with self._channel() as channel:
            for tag in tags:
                channel.qos.restore_by_tag(tag)

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        places = self.made.variables
        broker = f"redis://:{places['REDIS_PASSWORD']}@127.0.0.1:{places['REDIS_PORT']}/0"
        with kombu.Connection(broker) as connection:
            yield connection.default_channel

    def stored(self, recipe: str) -> int:
        """Return the step of the newest complete checkpoint in the object store; 0 without one."""
        found = Store().path(recipe, "train").glob("*.checkpoints/checkpoint-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)

    def states(self, dag: str, run: str) -> dict[str, str]:
        return {name: task["state"] for name, task in self.airflow.tasks(dag, run).items()}

    def record(self, recipe: str, run: str, stage: str = "run") -> dict[str, Any]:
        """Return the run's record of a stage from the object store."""
        return Store().read_records(recipe, run)[stage]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[Path]:
    """Two small recipes, one with a long training, and one with many rows, which works in shards."""
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
    night = {"max_steps": 400, "save_steps": 25, "gradient_accumulation_steps": 1, "learning_rate": 0.002}
    (folder / "night.yaml").write_text(yaml.safe_dump(own | night))
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
    try:
        with cluster(folder, free_port(), RETUNE_RECIPES=":".join(map(str, recipes))) as made:
            made.up(*(name for name in made.services("cpu-train") if name != "worker-cpu-train"))
            yield Running(made, Airflow(made.port, made.variables["ADMIN_PASSWORD"]))
        assert not processes(folder), "nothing is left behind"
    finally:
        alone.undo()
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def store(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test use the cluster's object store."""
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


def test_a_run_is_published_through_a_bad_night(running: Running) -> None:
    airflow = running.airflow
    run = airflow.trigger("night")
    eventually(lambda: running.states("night", run)["train"] == "queued", pause=PAUSE)
    waiting = airflow.tasks("night", run)["train"]
    assert (waiting["queue"], waiting["pool"], waiting["start_date"]) == ("gpu", "gpu", None)
    assert {name for name, state in running.states("night", run).items() if state == "success"} == {
        "resolve", "download", "validate", "standardize", "template"
    }  # fmt: skip

    running.gpu_worker("gpu-1")
    assert running.states("night", run)["train"] in ("queued", "running"), "it waited and has not failed"
    running.freeze_at("night", "gpu-1", 30)
    scheduler, database = running.made.processes["scheduler"], running.made.processes["postgres"]
    scheduler.stop(signal.SIGKILL)
    database.stop()
    at = running.steps("night", "gpu-1")
    running.thaw("gpu-1")
    running.freeze_at("night", "gpu-1", at + 10)  # it goes on without scheduler and database
    database.start()
    running.made.wait("postgres")
    scheduler.start()
    running.made.wait("scheduler")
    running.made.wait("api-server")
    assert eventually(lambda: running.states("night", run), pause=PAUSE)["train"] == "running"
    assert airflow.tasks("night", run)["train"]["try_number"] == 1, "the training did not notice"

    at = running.steps("night", "gpu-1")
    running.thaw("gpu-1")
    eventually(lambda: running.steps("night", "gpu-1") > at, pause=0.02)
    running.lose("gpu-1", signal.SIGTERM)
    assert running.made.processes["gpu-1"].popen.returncode == 0, "it ended after the checkpoint was in the store"
    saved = running.stored("night")
    assert saved > at, "it was saved when SIGTERM came"

    running.gpu_worker("gpu-2")
    running.freeze_at("night", "gpu-2", saved + 26)
    eventually(lambda: running.stored("night") > saved, pause=PAUSE)
    running.lose("gpu-2", signal.SIGKILL)
    later = running.stored("night")
    assert later % 25 == 0, "the last of the regular ones"
    assert running.shared, "it begins now, since Airflow notices a lost worker after a minute"
    running.gpu_worker("gpu-3")
    assert airflow.ended("night", run, pause=PAUSE) == "success", running.states("night", run)

    tasks = airflow.tasks("night", run)
    assert {name: task["try_number"] for name, task in tasks.items() if task["try_number"] != 1} == {"train": 3}
    assert {name for name, task in tasks.items() if task["queue"] == "gpu"} == set(GPU)
    summary, train = running.record("night", run), running.record("night", run, "train")
    assert (summary["verdict"], summary["version"]) == ("published", "v1")
    assert "resumed from checkpoint-" in train["summary"]
    fetched = [line for attempt in (2, 3) for line in airflow.log("night", run, "train", attempt) if "fetched" in line]
    assert len(fetched) == 2, "each new disk was empty"
    assert [int(line.split("checkpoint-")[1].split()[0]) for line in fetched] == [saved, later]
    assert not running.stored("night"), "no checkpoint of a finished training is kept"
    live = open_registry(f"{os.environ['RETUNE_REGISTRY']}/night").live()
    assert live is not None
    assert live.name == "v1"
    for worker, stages in (("worker-cpu", set(GPU)), ("gpu-3", {"validate", "template", "publish"})):
        assert not {path.name for path in (running.made.folder / worker / "work" / "night").iterdir()} & stages


def test_two_recipes_share_one_gpu_and_nothing_runs_twice(running: Running) -> None:
    airflow, workers = running.airflow, ("gpu-3", "gpu-4")
    for worker in workers:
        if worker not in running.made.processes:
            running.gpu_worker(worker)
    refused, of_lost_workers = running.refused_messages(), running.unanswered("gpu")
    runs = {name: airflow.trigger(name) for name in ("one", "other")}
    (busy,) = eventually(lambda: [worker for worker in workers if running.engines(worker)], pause=0.02)
    for pid in running.engines(busy):
        os.kill(pid, signal.SIGSTOP)
    running.deliver_again(eventually(lambda: running.unanswered("gpu") - of_lost_workers, pause=PAUSE))
    eventually(lambda: running.refused_messages() > refused, pause=PAUSE)  # the other worker has got it
    running.thaw(busy)
    for name, run in runs.items():
        assert airflow.ended(name, run, pause=PAUSE) == "success", running.states(name, run)
    tasks = {name: airflow.tasks(name, run) for name, run in runs.items()}
    spans = sorted(
        tuple(datetime.fromisoformat(tasks[name][stage][when]) for when in ("start_date", "end_date"))
        for name in tasks
        for stage in GPU
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "one at a time, with two workers at hand"
    assert {task["try_number"] for name in tasks for task in tasks[name].values()} == {1}
    for name, run in runs.items():
        assert running.record(name, run)["verdict"] == "published"
        begun = [line for line in airflow.log(name, run, "train") if "went on" in line or "fetched" in line]
        assert not begun


def test_two_cpu_workers_share_the_data_and_make_what_one_makes(
    running: Running, pipeline: Callable, artifact: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    airflow, run = running.airflow, running.shared
    eventually(lambda: running.states("many", run)["template.finish"] == "success", pause=PAUSE)
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

    shared_facts = find_output(Store(), "many", "template", shared["fingerprint"])
    monkeypatch.setenv("RETUNE_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("RETUNE_RECIPES", running.made.variables["RETUNE_RECIPES"])
    lineage = pipeline(Path("many"), "template")
    assert lineage["template"] == shared["fingerprint"]
    alone = artifact(lineage)
    assert shared_facts is not None
    assert shared_facts.metadata.train.ids_sha256 == alone.metadata.train.ids_sha256
    rows = {name: file for name, file in alone.manifest["files"].items() if not name.startswith("data_docs/")}
    assert {name: shared_facts.manifest["files"][name] for name in rows} == rows


def test_the_ui_shows_the_logs_of_a_worker_that_is_gone(running: Running) -> None:
    run = running.airflow.runs("night")[-1]["dag_run_id"]
    said = running.airflow.log("night", run, "train", 1)  # of the worker that got SIGTERM
    assert any("s3://retune/logs" in line for line in said)


def test_a_backup_is_restored_under_fresh_secrets(running: Running) -> None:
    """Follow docs/operations.md: a backup during a run, and a restore with new secrets."""
    old, run = running.made, running.airflow.trigger("one", force=True)

    def stored_log(airflow: Airflow) -> bool:
        return any("s3://retune/logs" in line for line in airflow.log("one", run, "resolve"))

    eventually(lambda: running.states("one", run)["resolve"] == "success", pause=PAUSE)
    eventually(lambda: stored_log(running.airflow), pause=PAUSE)
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
    """Run an Airflow command; return its output."""
    airflow = str(Path(sys.executable).with_name("airflow"))
    return subprocess.run([airflow, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
