"""`make cluster`: docker-compose.yaml without containers, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from dotenv import dotenv_values
from rich.console import Console
from rich.markup import escape

from cluster.native import cluster
from include.errors import RetuneError
from include.paths import var

console = Console(highlight=False)


def main() -> int:
    """Parse the command line; errors are one line and status 1."""
    parser = argparse.ArgumentParser(prog="cluster", description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="of the UI, on the loopback address")
    gpu = "gpu" if Path("/dev/nvidiactl").exists() else "cpu-train"
    parser.add_argument("--profile", choices=("gpu", "cpu-train"), default=gpu, help="by default what the machine has")
    arguments = parser.parse_args()
    folder = var() / "cluster"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background job ignores it
    try:
        with cluster(folder, arguments.port) as made:
            try:
                with console.status("Postgres, Redis, the object store and Airflow are starting"):
                    made.up(*made.services(arguments.profile))
                password = dotenv_values(folder / ".env")["ADMIN_PASSWORD"]
                console.print(
                    f"[bold green]The cluster is up[/]   http://127.0.0.1:{arguments.port}   user admin   "
                    f"password {password}",
                    soft_wrap=True,
                )
                console.print(f"Logs are in {folder / 'logs'}. Ctrl-C stops it.", soft_wrap=True)
                signal.pause()
            except KeyboardInterrupt:
                console.print("stopping ...")
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)  # one is enough; a second must not cut the stopping short
    except RetuneError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
