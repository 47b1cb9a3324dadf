"""docker-compose.yaml as far as it can be held without a container engine: its form, its secrets, what it opens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dotenv import dotenv_values

from cluster.env import SECRETS, write_env
from cluster.native import COMPOSE, Cluster, Process, interpolate
from include.errors import RetuneError
from tests.conftest import PROJECT

TEXT = COMPOSE.read_text(encoding="utf-8")
SERVICES = yaml.safe_load(TEXT)["services"]
REQUIRED = set(re.findall(r"\$\{(\w+):\?", TEXT))


def test_it_is_what_the_compose_specification_asks_for() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", COMPOSE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_secrets_are_fresh_and_nothing_starts_without_any_of_them(tmp_path: Path) -> None:
    assert {*SECRETS, "FERNET_KEY"} == REQUIRED
    assert not REQUIRED & set(re.findall(r"\$\{(\w+)(?:\}|:-)", TEXT)), "a default, or nothing, where a secret belongs"
    write_env(tmp_path / "a" / ".env")
    write_env(tmp_path / "b" / ".env")
    one, other = (dotenv_values(tmp_path / name / ".env") for name in "ab")
    assert set(one) == REQUIRED
    assert all(len(value) >= 43 and value != other[name] for name, value in one.items() if value)
    assert (tmp_path / "a" / ".env").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_env(tmp_path / "a" / ".env")
    interpolate(SERVICES, one)
    for name in REQUIRED:
        for wrong in ({**one, name: ""}, {key: value for key, value in one.items() if key != name}):
            with pytest.raises(RetuneError, match=f"{name} is not set. run make compose-env"):
                interpolate(SERVICES, wrong)


def test_making_secrets_needs_nothing_but_python_and_never_replaces_them(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "env.py").write_bytes((PROJECT / "cluster" / "env.py").read_bytes())
    command = [sys.executable, "-I", "-S", str(folder / "env.py")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    written = (tmp_path / ".env").read_text()
    assert "docker compose up" in first.stdout
    assert not any(value in first.stdout for value in dotenv_values(tmp_path / ".env").values() if value != "gpu")
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "exists already" in second.stderr
    assert (tmp_path / ".env").read_text() == written


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${A}", "1"), ("${NONE}", ""), ("${NONE:-x y}", "x y"), ("${EMPTY:-x}", "x"), ("${A:-x}${A:?say}", "11"),
        ("$$A ${A} $$", "$A 1 $"), ("a$b", "a$b"),
    ],
)  # fmt: skip
def test_variables_are_filled_in_as_compose_does(text: str, filled: str) -> None:
    assert interpolate([{"x": text, "n": 3}], {"A": "1", "EMPTY": ""}) == [{"x": filled, "n": 3}]


PLACES = {
    "PYTHONPATH", "RETUNE_VAR", "AIRFLOW_HOME", "AIRFLOW__CORE__DAGS_FOLDER", "AIRFLOW__CORE__PLUGINS_FOLDER",
    "AIRFLOW__LOGGING__BASE_LOG_FOLDER", "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT",
    "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT", "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_SERVER_PORT",
    "AIRFLOW__API__HOST", "AIRFLOW__API__PORT", "AIRFLOW__API__BASE_URL", "AIRFLOW__CORE__EXECUTION_API_SERVER_URL",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "AIRFLOW__CELERY__BROKER_URL", "AIRFLOW__CELERY__RESULT_BACKEND",
    "AWS_ENDPOINT_URL_S3", "RCLONE_S3_ENDPOINT",
}  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_a_process_of_this_machine_is_the_container_at_another_place(name: str, tmp_path: Path) -> None:
    made = Cluster(tmp_path, 8123)
    process, container = made.process(name), interpolate(SERVICES[name], dotenv_values(tmp_path / ".env"))
    settings = container["environment"]
    differing = {key for key, value in settings.items() if process.environment[key] != value}
    assert differing == PLACES & settings.keys()
    hosts = re.compile(r"[@/](postgres|redis|store|api-server):")
    assert not [value for value in process.environment.values() if hosts.search(value)]
    for part in ("entrypoint", "command", "healthcheck", "stop_signal"):
        native, other = (re.sub(r"[\d.*]+", "", str(found.get(part))) for found in (process.service, container))
        assert native == other, "the same but for addresses and ports"


def test_the_shells_variables_come_before_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETUNE_RECIPES", "/elsewhere/mine.yaml")
    monkeypatch.setenv("LISTEN", "0.0.0.0")
    made = Cluster(tmp_path, 8123).process("scheduler").environment
    assert (made["RETUNE_RECIPES"], made["AIRFLOW__API__HOST"]) == ("/elsewhere/mine.yaml", "127.0.0.1")


def test_only_the_ui_is_published_and_only_on_loopback() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "api-server": ["127.0.0.1:${PORT:-8080}:${API_PORT:-8080}"]
    }


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_pinned_bounded_and_looked_after(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":\d+\.\d+(\.\d+)?(-\w+)?$", service["image"])
    assert service["restart"] in ("unless-stopped", "on-failure:3")
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    assert ("healthcheck" in service) == (name != "init")


def test_gpu_stages_have_a_worker_of_their_own() -> None:
    gpu, cpu = SERVICES["worker-gpu"], SERVICES["worker-cpu-train"]
    devices = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert (gpu["profiles"], cpu["profiles"]) == (["gpu"], ["cpu-train"])
    assert gpu["command"] == cpu["command"]
    assert "--queues gpu --concurrency 1 " in gpu["command"][-1]
    assert gpu["build"]["target"] == "gpu"
    assert "requirements-gpu.txt" in (PROJECT / gpu["build"]["dockerfile"]).read_text()
    assert "--queues default " in SERVICES["worker-cpu"]["command"][-1]


def test_the_images_are_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    own = {service["image"] for service in SERVICES.values() if "build" in service}
    assert own == {f"retune:{version[1]}", f"retune-gpu:{version[1]}"}


def test_without_containers_only_a_service_with_a_gpu_sees_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    visible = {
        name: Process(name, service, tmp_path, tmp_path / "log").environment["CUDA_VISIBLE_DEVICES"]
        for name, service in SERVICES.items()
        if name.startswith("worker")
    }
    assert visible.pop("worker-gpu") == "0,1"
    assert set(visible.values()) == {""}
