"""docker-compose.yaml without containers: the same commands and settings as processes of this machine.

Each service has its own folder `<folder>/<service>` in place of volumes. Host names become loopback addresses, and
ports become free ports. Only the logs of running tasks are in a shared folder, because workers on one host cannot all
serve them on the same port. Postgres and Redis must be installed; the S3 server comes with `requirements.txt`.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import psutil
import yaml
from dotenv import dotenv_values

from cluster.env import write_env
from include.errors import RetuneError
from include.paths import PROJECT

COMPOSE = PROJECT / "docker-compose.yaml"
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?:(:[-?])([^}]*))?\}")
PORTS = ("POSTGRES_PORT", "REDIS_PORT", "S3_PORT", "SCHEDULER_HEALTH_PORT", "TRIGGERER_LOG_PORT")
PACKAGES = {"initdb": "postgresql", "redis-server": "redis-server"}
START_SECONDS, HEALTH_SECONDS = 300.0, 60.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """Return a part of a compose file with its variables filled in (Compose specification, chapter 12).

    Raises:
        RetuneError: a required variable is not set.
    """
    if isinstance(value, dict):
        return {name: interpolate(entry, variables) for name, entry in value.items()}
    if isinstance(value, list):
        return [interpolate(entry, variables) for entry in value]
    return VARIABLE.sub(lambda found: _fill(found, variables), value) if isinstance(value, str) else value


def _fill(found: re.Match[str], variables: Mapping[str, str]) -> str:
    name, operator, default = found.groups()
    if name is None:
        return "$"
    if not variables.get(name) and operator == ":?":
        raise RetuneError(f"{name} is not set", default)
    return variables.get(name) or default or ""


def free_port() -> int:
    """Return a free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A service of the compose file as a process that can be restarted.

    Args:
        name: name of the service, or another name for one more process of it (a second worker).
        service: the service's part of the compose file, interpolated for this process.
        folder: the service's disk.
        log: file for the process's output.

    Attributes:
        environment: environment variables of the process.
    """

    def __init__(self, name: str, service: dict[str, Any], folder: Path, log: Path):
        self.name, self.service, self.folder, self.log = name, service, folder, log
        self.popen: subprocess.Popen[bytes] | None = None
        self._wanted, self._changing = False, threading.RLock()
        airflow = "AIRFLOW_HOME" in service["environment"]
        self._cwd = PROJECT if airflow else folder
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "HOSTNAME": name,
            **{key: str(value) for key, value in service["environment"].items()},
        }
        if "devices" not in service.get("deploy", {}).get("resources", {}).get("reservations", {}):
            self.environment["CUDA_VISIBLE_DEVICES"] = ""  # as a container, it sees no GPU

    def start(self) -> None:
        """Start the process."""
        with self._changing:
            self._start()
            self._wanted = True

    def revive(self) -> None:
        """Restart the process if it ended by itself and its restart policy says so."""
        with self._changing:
            if self._wanted and not self.runs and self.service["restart"] == "unless-stopped":
                self._start()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command, user = [*_words(self.service.get("entrypoint")), *_words(self.service["command"])], None
        if command[0] == "postgres":
            user = _make_database(self.folder, self.service["environment"])
            command = [program("postgres"), "-D", str(self.folder), "-c", "unix_socket_directories=", *command[1:]]
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                command, cwd=self._cwd, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent, user=user, group=user,
                extra_groups=[] if user else None,
            )  # fmt: skip

    @property
    def runs(self) -> bool:
        """Return whether the process was started and has not ended."""
        return self.popen is not None and self.popen.poll() is None

    def healthy(self) -> bool:
        """Return the result of the service's health check; without a health check, whether the process runs."""
        test = self.service.get("healthcheck", {}).get("test")
        if not self.runs or test is None:
            return self.runs
        try:
            done = subprocess.run(
                ["sh", "-c", test], cwd=self._cwd, env=self.environment, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=HEALTH_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def stop(self, number: int | None = None) -> None:
        """Stop the process as a container engine does: signal the first process, and after the grace period kill all.

        Args:
            number: a signal in place of the service's own; SIGKILL kills all processes at once, like a lost machine.
        """
        with self._changing:
            self._wanted = False
            if self.popen is not None:
                self._stop(self.popen, number)

    def _stop(self, popen: subprocess.Popen[bytes], number: int | None) -> None:
        number = number or signal.Signals[self.service.get("stop_signal", "SIGTERM")]
        try:
            family = [psutil.Process(popen.pid), *psutil.Process(popen.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        if number != signal.SIGKILL and popen.poll() is None:
            popen.send_signal(number)
            try:
                popen.wait(_seconds(self.service.get("stop_grace_period", "10s")))
            except subprocess.TimeoutExpired:
                pass
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(family, 10)
        popen.wait()


class Cluster:
    """All processes of the compose file on this machine.

    Args:
        folder: folder of disks, logs and secrets.
        port: port of the UI.
        variables: further variables of the compose file.
    """

    def __init__(self, folder: Path, port: int, **variables: str):
        self.folder, self.port = folder, port
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        if not (folder / ".env").exists():
            write_env(folder / ".env")
        self.variables: dict[str, str] = {
            **{name: str(value) for name, value in dotenv_values(folder / ".env").items()}, **os.environ,
            **dict.fromkeys(("LISTEN", "POSTGRES_HOST", "REDIS_HOST", "S3_HOST", "API_HOST"), "127.0.0.1"),
            **{name: str(free_port()) for name in PORTS},
            "PORT": str(port), "API_PORT": str(port), "RETUNE_CODE": str(PROJECT),
            "LOGS": str(folder / "logs" / "tasks"), **variables,
        }  # fmt: skip
        self._compose = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
        self.processes: dict[str, Process] = {}

    def process(self, service: str, name: str | None = None) -> Process:
        """Return the process of a service, not started; under another name, one more process of the service."""
        name = name or service
        folder = self.folder / name
        variables = {**self.variables, "RETUNE_DISK": str(folder), "WORKER_LOG_PORT": str(free_port())}
        made = Process(
            name, interpolate(self._compose[service], variables), folder, self.folder / "logs" / f"{name}.log"
        )
        self.processes[name] = made
        return made

    def services(self, profile: str) -> Iterator[str]:
        """Yield the services of a profile, each after its dependencies."""
        wanted = {
            name: set(service.get("depends_on", ()))
            for name, service in self._compose.items()
            if profile in service.get("profiles", [profile])
        }
        yield from TopologicalSorter(wanted).static_order()

    def up(self, *names: str) -> None:
        """Start services in the given order and wait until all are healthy. A service waits for its dependencies.

        Raises:
            RetuneError: a service ended, or did not become healthy in time.
        """
        for name in names:
            for dependency, how in self._compose[name].get("depends_on", {}).items():
                self.wait(dependency, ended=how["condition"] == "service_completed_successfully")
            self.process(name).start()
        for name in names:
            if name != "init":
                self.wait(name)

    def wait(self, name: str, ended: bool = False) -> None:
        """Wait until a process is healthy or, with `ended`, until it has ended with status 0.

        Raises:
            RetuneError: see `up`.
        """
        process, deadline = self.processes[name], time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not process.runs:
                if ended and process.popen and process.popen.returncode == 0:
                    return
                break
            if not ended and process.healthy():
                return
            time.sleep(0.5)
        output = process.log.read_text(errors="replace").splitlines()[-3:] if process.log.exists() else []
        raise RetuneError(f"{name} did not start: {' / '.join(output)}", f"See {process.log}")

    def down(self) -> None:
        """Stop all processes, each before its dependencies."""
        for name in reversed(list(self.processes)):
            self.processes[name].stop()
        self.processes.clear()


@contextmanager
def cluster(folder: Path, port: int, **variables: str) -> Iterator[Cluster]:
    """Provide a cluster whose processes are restarted if they end, and stopped when the context ends."""
    made, ended = Cluster(folder, port, **variables), threading.Event()

    def supervise() -> None:
        while not ended.wait(2):
            for process in list(made.processes.values()):
                process.revive()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    try:
        yield made
    finally:
        ended.set()
        supervisor.join()
        made.down()


def _words(command: str | list[str] | None) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else command or []


def _seconds(duration: str) -> float:
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def _end_with_parent() -> None:
    """Make this child process end when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def program(name: str) -> str:
    """Return the path of a program of Postgres or Redis. Debian installs some of them outside of `PATH`.

    Raises:
        RetuneError: the program is not installed.
    """
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which(name) or shutil.which(name, path=str(folders[-1]) if folders else "")
    if not found:
        raise RetuneError(f"{name} is not installed", f"apt-get install {PACKAGES[name]}, or use docker compose")
    return found


def _make_database(folder: Path, environment: Mapping[str, str]) -> str | None:
    """Create the database if there is none, as the container's entry point does, and return the account that runs it.

    Postgres does not run as root; Debian's package creates an account for it. None: the current account.
    """
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user, user)
    if not (folder / "PG_VERSION").exists():
        account: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
        with tempfile.NamedTemporaryFile("w") as password:  # readable only by its owner
            password.write(environment["POSTGRES_PASSWORD"])
            password.flush()
            if user:
                shutil.chown(password.name, user)
            done = subprocess.run(
                [program("initdb"), "--pgdata", str(folder), "--username", environment["POSTGRES_USER"],
                 "--encoding=UTF8", "--auth=scram-sha-256", f"--pwfile={password.name}"],
                capture_output=True, text=True, check=False, **account,
            )  # fmt: skip
        if done.returncode:
            raise RetuneError(f"initdb failed: {done.stderr.strip()}", f"Check that {user or 'you'} may use {folder}")
        subprocess.run(
            [program("postgres"), "--single", "-D", str(folder), "postgres"],
            input=f'CREATE DATABASE "{environment["POSTGRES_DB"]}"\n', capture_output=True, text=True, check=True,
            **account,
        )  # fmt: skip
    return user
