"""`retune cluster`: the services of docker-compose.yaml as processes of this machine, until Ctrl-C."""

from __future__ import annotations

import signal
from pathlib import Path

from dotenv import dotenv_values
from rich.console import Console

from cluster.native import cluster
from include.paths import var

console = Console(highlight=False)


def device_profile() -> str:
    """Return the compose profile for this machine: `gpu` where there is an NVIDIA driver, else `cpu-train`."""
    return "gpu" if Path("/dev/nvidiactl").exists() else "cpu-train"


def serve(port: int, profile: str) -> None:
    """Start every service of a profile, print the address and the login, and wait for Ctrl-C.

    Raises:
        RetuneError: a program is not installed, or a service did not become healthy.
    """
    folder = var() / "cluster"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT otherwise
    with cluster(folder, port) as made:
        try:
            with console.status("Postgres, Redis, the object store and Airflow are starting"):
                made.up(*made.services(profile))
            password = dotenv_values(folder / ".env")["ADMIN_PASSWORD"]
            console.print(
                f"[bold green]The cluster is up[/]   http://127.0.0.1:{port}   user admin   password {password}",
                soft_wrap=True,
            )
            console.print(f"Logs are in {folder / 'logs'}. Ctrl-C stops it.", soft_wrap=True)
            signal.pause()
        except KeyboardInterrupt:
            console.print("stopping ...")
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # a second signal must not cut the stopping short
