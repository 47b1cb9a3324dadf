"""Rules of the house that no single module can keep: who imports whom, and what a DAG file may pull in."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "include": {"tasks", "dags", "airflow", "plugins", "cluster"},
    "tasks": {"dags", "airflow", "plugins", "cluster"},
}
HEAVY = {
    "torch",
    "transformers",
    "great_expectations",
    "datasets",
    "peft",
    "trl",
    "pandas",
    "matplotlib",
    "bitsandbytes",
}
PARSE_SECONDS = 2.0

PARSE = """
import json, sys, time
import airflow.sdk
began = time.process_time()
import dags.finetune
print(json.dumps({
    "seconds": time.process_time() - began,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "dags": sorted(name for name in vars(dags.finetune) if name.startswith("dag_")),
}))
"""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_dependencies_point_one_way(layer: str) -> None:
    files = list((PROJECT / layer).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(PROJECT)): bad for f in files if (bad := imports(f) & FORBIDDEN[layer])}
    assert not wrong


def test_the_dag_file_is_parsed_fast_and_without_the_heavy_libraries(tmp_path: Path) -> None:
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    parsed = min(
        (
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", PARSE],
                    cwd=PROJECT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.splitlines()[-1]
            )
            for _ in range(2)  # the first one may compile the sources
        ),
        key=lambda result: result["seconds"],
    )
    assert not HEAVY & set(parsed["modules"])
    assert parsed["seconds"] < PARSE_SECONDS
    assert parsed["dags"] == ["dag_demo", "dag_llama32_3b_finetome", "dag_smollm2_135m_cpu"]


def test_the_demos_dataset_is_what_its_generator_writes(tmp_path: Path) -> None:
    from include.demo.village import write_dataset

    write_dataset(tmp_path / "demo.jsonl")
    assert (tmp_path / "demo.jsonl").read_bytes() == (PROJECT / "include" / "recipes" / "demo.jsonl").read_bytes()


def test_every_target_of_the_makefile_is_there_once() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    assert sorted(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) == sorted(targets[1].split())
