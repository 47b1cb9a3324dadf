"""The command line: its help, its errors, and the commands that need neither Airflow nor a model process."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from include.paths import PROJECT
from include.pipeline.stage import recorded
from include.storage.artifacts import Store
from retune.cli import app, main
from retune.headless import stage_line

COMMANDS = ("run", "stage", "up", "cluster", "rollback", "maintain", "report", "docs")


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Take back what a command sets for the process, which is not the test's own."""
    root, log = logging.getLogger(), logging.getLogger("airflow.task.retune")
    handlers, levels = [*root.handlers], (root.level, log.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    log.setLevel(levels[1])


@pytest.fixture
def data_recipe(write_recipe: Callable, dataset: Path, tmp_path: Path) -> Path:
    """A recipe whose data stages need no model: its base is a folder that looks like one."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    (base / "model.safetensors").write_bytes(b"")
    return write_recipe(dataset=str(dataset), base_model=str(base))


def call(*arguments: str) -> int:
    """Run a command in this process; return its status."""
    try:
        return main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def test_the_help_lists_every_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  (\w+)  +(\S.*)$", text.partition("Commands:")[2], re.MULTILINE)
    assert tuple(name for name, _ in listed) == COMMANDS
    assert all(summary.endswith(".") and not summary.endswith("..") for _, summary in listed), "no summary is cut"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_description(command: str) -> None:
    for parameter in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert getattr(parameter, "help", None), f"{command}: {parameter.name}"


def test_the_help_needs_neither_airflow_nor_a_heavy_library() -> None:
    program = "import sys; from retune.cli import app; print(sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert not {"airflow", "torch", "transformers", "huggingface_hub", "pyarrow"} & set(eval(done.stdout))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage", "demo", "--until", "tempalte"], "there is no stage 'tempalte'. Choose one of: resolve, make_base,"),
        (["stage", "dmeo"], "there is no recipe 'dmeo'. Choose one of: demo, demo_real, dpo_preferences, gemma3_4b"),
        (["stage", "demo", "--set", "lora_rank=8"], "unknown field 'lora_rank'"),
        (["report", "demo"], "no run of demo has ended in"),
        (["maintain", "dmeo"], "there is no recipe 'dmeo'"),
        (["rollback", "demo", "v1", "--reason", " "], "no reason is given"),
    ],
)
def test_an_error_is_one_line_and_status_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments", [["run"], ["up", "--port", "0"], ["cluster", "--profile", "tpu"], ["rollback", "demo", "v1"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert "Usage: python -m retune" in capsys.readouterr().err


def test_stages_run_here_and_the_report_of_a_run_is_found(
    data_recipe: Path, var: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert call("stage", "small", "--until", "download") == 0
    assert "download done: 60 rows" in caplog.text
    assert [path.name for path in (var / "store" / "small").iterdir() if path.name != "runs"] != []
    assert not (var / "store" / "small" / "validate").exists(), "no stage after the last one that was asked for"
    first = json.loads((var / "last_run.json").read_text())
    assert (first["verdict"], first["error"]) == ("stopped", None)
    assert "stopped after download, as asked" in caplog.text
    assert call("stage", "small", "--until", "download", "--set", "max_rows=7") == 0
    assert "download done: 7 rows" in caplog.text
    second = json.loads((var / "last_run.json").read_text())

    # the time of a run's end is written in whole seconds: make the order of the two certain
    path = next((var / "store/small/runs").glob(f"*{first['run'][-12:-6].replace(':', '_')}*/run.json"), None)
    assert path is not None
    path.write_text(json.dumps({**first, "finished_at": "2020-01-01T00:00:00+00:00"}))
    assert call("report", "small") == 0
    text = capsys.readouterr().out
    assert f"run       {second['run']}\n" in text
    assert f"report    {second['report'].removeprefix('file://')}\n" in text
    assert Path(second["report"].removeprefix("file://")).is_file()
    assert call("report", "small", first["run"]) == 0
    assert f"run       {first['run']}\n" in capsys.readouterr().out
    assert call("report", "small", "none") == 1
    assert f"small has no run none. Runs that have ended: {first['run']}, {second['run']}" in capsys.readouterr().out


def test_a_stage_that_fails_is_status_1_logs_why_and_has_a_report(
    data_recipe: Path, var: Path, dataset: Path, retune: Callable
) -> None:
    dataset.write_bytes(b"")
    done = retune("stage", "small", "--until", "download")
    assert done.returncode == 1
    assert "download failed: " in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((var / "last_run.json").read_text())["verdict"] == "failed"


def test_a_run_that_has_not_ended_has_no_report_yet(data_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorded(Store(), "small", "waiting", "download"):
        assert call("report", "small", "waiting") == 1
        assert "the run waiting of small has no report yet" in capsys.readouterr().out


def test_maintenance_only_says_what_it_would_remove(
    data_recipe: Path, var: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert call("stage", "small", "--until", "download") == 0
    for manifest in (var / "store" / "small").glob("*/*/manifest.json"):
        manifest.chmod(0o600)
        manifest.write_bytes(manifest.read_bytes().replace(b'"made_at": "20', b'"made_at": "19'))
    for record in (var / "store" / "small" / "runs").rglob("*.json"):
        record.write_bytes(record.read_bytes().replace(b'_at": "20', b'_at": "19'))
    before = sorted((var / "store").rglob("*"))
    assert call("maintain", "small", "--dry-run") == 0
    assert any(re.match(r"would remove \d artifacts? of small, ", line) for line in caplog.messages)
    assert sorted((var / "store").rglob("*")) == before
    assert call("maintain", "small") == 0
    assert any(re.match(r"removed \d artifacts? of small, ", line) for line in caplog.messages)
    assert sorted((var / "store").rglob("*")) != before


def test_a_line_about_a_stage_says_how_it_ended(var: Path) -> None:
    with recorded(Store(), "small", "run", "train", {"candidate": "m=[q_proj]", "resolve": "f00"}) as record:
        record.progress("step 3 of 8")
        assert "m=\\[q_proj]: step 3 of 8" in stage_line({**record.content, "seconds": 2.0}), "no markup in a text"
        record.close("done", reused=True, summary="8 steps")
    assert (
        stage_line({**record.content, "seconds": 2.04})
        == "[green]✓[/] train           2.0 s  m=\\[q_proj]: reused, 8 steps"
    )
    failed = {**record.content, "state": "failed", "seconds": 90.0, "reused": False}
    assert stage_line(failed) == "[red]✗[/] train          90.0 s  m=\\[q_proj]: 8 steps"
