"""The commands of `python -m retune` with their options. Each command calls one function; this file has no logic.

A command imports what it needs when it is called, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Literal, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from include.errors import RetuneError

app = typer.Typer(
    help="Turn a ShareGPT dataset into a published QLoRA adapter.",
    epilog="State is kept under var/; the environment variable RETUNE_VAR moves it. See README.md and docs/.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a recipe in include/recipes, or path of a recipe file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Replace a value of the recipe for this run. Repeat it for more."
    ),
]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port of the UI on the loopback address.")]


@app.command()
def run(recipe: RecipeName, values: Overrides = None) -> None:
    """Run a recipe to its end through Airflow, without UI.

    Prints one line per stage. The exit status is 0 when a version was published or the same version is live already,
    and 1 otherwise. Stages whose inputs are unchanged are reused.
    """
    from retune import headless

    try:
        published = headless.run(recipe, values or [])
    except KeyboardInterrupt:
        console.print("stopped; run again to continue: finished stages are reused")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if published else 1)


@app.command()
def stage(
    recipe: RecipeName,
    until: Annotated[str, typer.Option(metavar="STAGE", help="Last stage to run, for example template.")] = "verify",
    values: Overrides = None,
) -> None:
    """Run a recipe's stages in this process, without Airflow.

    For data checks before a training (--until template), and for a debugger. Stages whose inputs are unchanged are
    reused.
    """
    from retune.in_process import run_until

    _log_to(sys.stderr)
    raise typer.Exit(0 if run_until(recipe, until, values or []) else 1)


@app.command()
def up(port: Port = 8080) -> None:
    """Start Airflow with its UI on this machine.

    Prints the address and the login. Ctrl-C stops Airflow.
    """
    from retune.airflow_process import serve

    serve(port)


@app.command()
def cluster(
    port: Port = 8080,
    profile: Annotated[
        Literal["gpu", "cpu-train"] | None,
        typer.Option(show_default=False, help="Who trains. By default gpu where there is an NVIDIA driver."),
    ] = None,
) -> None:
    """Run docker-compose.yaml on this machine, without containers.

    Starts the same services with the same settings as processes, each with a disk of its own. Needs the programs of
    PostgreSQL and Redis. Ctrl-C stops the services.
    """
    from retune.native_cluster import device_profile, serve

    serve(port, profile or device_profile())


@app.command()
def rollback(
    recipe: RecipeName,
    version: Annotated[
        str,
        typer.Argument(metavar="VERSION", help="Version to make live, for example v1. An unknown one lists them all."),
    ],
    reason: Annotated[str, typer.Option(help="Why. The registry's history keeps it.")],
) -> None:
    """Make an earlier version live again.

    Works while a training runs. For a registry on the Hugging Face Hub, HF_TOKEN must be set.
    """
    from tasks.rollback import rollback as make_live

    console.print(escape(make_live(recipe, version, reason)), soft_wrap=True)


@app.command()
def maintain(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", show_default=False, help="Only this recipe, and no caches and logs.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove what no run has used for keep_days.

    Removes artifacts, checkpoints and runs from the store, and unfinished work, caches and logs from this machine.
    Whatever is live, published or in use stays. The DAG "maintenance" does the same every night.
    """
    from tasks.maintenance import maintain_disk, maintain_store

    _log_to(sys.stdout)
    maintain_store(recipe, dry_run)
    maintain_disk(recipe, dry_run)


@app.command()
def report(
    recipe: RecipeName,
    run_id: Annotated[
        str | None, typer.Argument(metavar="RUN", show_default=False, help="Id of the run; by default the newest.")
    ] = None,
) -> None:
    """Print a run's verdict and the path of its report."""
    from retune.runs import find_run

    summary = find_run(recipe, run_id)
    console.print(f"run       {escape(summary['run'])}", soft_wrap=True)
    console.print(f"verdict   {summary['verdict']} {summary['version'] or ''}".rstrip(), soft_wrap=True)
    console.print(f"report    {escape(summary['report'].removeprefix('file://'))}", soft_wrap=True)


@app.command()
def docs(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if a generated part is not current.")
    ] = False,
) -> None:
    """Write the generated parts of docs/.

    These are the recipe reference and the table of stages.
    """
    from retune.generated_docs import check_docs, write_docs

    for line in check_docs() if check else write_docs():
        console.print(escape(line), soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; print an error as one line and return status 1.

    Args:
        arguments: by default those of the process.

    Raises:
        SystemExit: with the status of a command that ended without an error of Retune's own; 2 after wrong usage.
    """
    try:
        app(arguments, prog_name="python -m retune")
    except RetuneError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def _log_to(stream: TextIO) -> None:
    """Print the stages' log lines, and warnings of everything else."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=stream)
    logging.getLogger("airflow.task.retune").setLevel(logging.INFO)
