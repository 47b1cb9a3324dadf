"""Datasets of the Hub: files of every form, row by row; and each fault as one sentence. A real Hub server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT
from tests.rows import ROWS, csv, lines, parquet
from tests.services.hub import Hub

CONFIGS = b"""---
configs:
- config_name: one
  data_files: [{split: train, path: one/*.jsonl}]
- config_name: two
  data_files: two/a.json
  field: data
---
"""
DATASETS: dict[str, dict[str, bytes]] = {
    "columns": {"a.jsonl": lines([{**row, "score": "high"} for row in ROWS[:2]]),
                "b.jsonl": b'{"score": NaN, "more": true}\n{"bad'},
    "splits": {"train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS[:5]), "more.csv": csv(ROWS[:5])},
    "formats": {"train.jsonl": lines(ROWS), "test.csv": csv(ROWS[:5])},
    "configs": {"README.md": CONFIGS, "one/x.jsonl": lines(ROWS[:2]), "one/y.jsonl": lines(ROWS[2:4]),
                "two/a.json": json.dumps({"x": [{"a": 1}], "data": ROWS[:7]}).encode()},
    "text": {"train.txt": b"hello\nworld\n"},
    "script": {"script.py": b"import datasets", "README.md": b"# x"},
    "nothing": {"README.md": b"# x", "weights.bin": b"1"},
    "cut": {"train.parquet": parquet(ROWS)[:-20]},
    "generated": {"train.txt": b"\xff\xfe"},
}  # fmt: skip
# asks for rows as (name, config, split), prints for each the rows and notes, or the error
CLIENT = """
import json, sys
from include.data.sources import DatasetRef, pin_dataset, read_rows
answers = []
for name, config, split in json.loads(sys.argv[1]):
    notes = []
    try:
        name = name if "://" in name else f"owner/{name}"
        revision = pin_dataset(DatasetRef(name, config, split))
        rows = list(read_rows(DatasetRef(name, config, split, revision), notes.append))
        answers.append({"rows": [row.decode() for row in rows], "notes": notes})
    except Exception as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps(answers))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def ask(hub: Hub, tmp_path: Path, *questions: tuple[str, str | None, str]) -> list[dict[str, Any]]:
    """Read datasets in a process of its own: `datasets` takes the Hub's address when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(questions)], cwd=PROJECT, text=True, capture_output=True, check=False,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_files_are_read_row_by_row_and_faults_are_one_sentence(hub: Hub, tmp_path: Path) -> None:
    for name, files in DATASETS.items():
        hub.put(f"owner/{name}", files, kind="dataset")
    good: dict[tuple[str, str | None, str], tuple[list[Any], list[str]]] = {
        ("splits", None, "test"): (ROWS[:5], ["not read, of the same dataset: more.csv, train.jsonl"]),
        ("splits", None, "train"): (ROWS, ["not read, of the same dataset: more.csv, test.jsonl"]),
        ("splits", None, "train[:3]"): (ROWS[:3], []),
        ("configs", "one", "train"): (ROWS[:4], ["not read, of the same dataset: two/a.json"]),
        ("configs", "two", "train"): (ROWS[:7], []),
        ("hf://datasets/owner/formats/test.csv", None, "train"): (
            [{"conversations": json.dumps(row["conversations"])} for row in ROWS[:5]],
            [],
        ),
        ("hf://datasets/owner/configs/one/*.jsonl", None, "train"): (
            ROWS[:4],
            ["files read, in this order: x.jsonl, y.jsonl"],
        ),
        ("text", None, "train"): ([{"text": "hello"}, {"text": "world"}], []),
    }
    bad = {
        ("splits", None, "dev"): ("NotFound", "'dataset_split': .* has no split 'dev'. Choose one of: .*train"),
        ("splits", None, "train[:x]"): ("NotFound", "Unrecognized instruction format"),
        ("splits", "nope", "train"): ("NotFound", "'nope' not found. Available: .* Set dataset_config"),
        ("configs", None, "train"): ("NotFound", "pick one among the available configs: .*one.*two"),
        ("formats", None, "train"): ("BadData", "format for all splits.*dataset: hf://datasets/owner/formats/"),
        ("script", None, "train"): ("BadData", "has a loading script, which .* no longer runs. Name a dataset with"),
        ("nothing", None, "train"): ("NotFound", "has no data files of a known type"),
        ("cut", None, "train"): ("BadData", "owner/cut/train.parquet cannot be read: not a complete parquet file"),
        ("generated", None, "train"): ("BadData", "owner/generated cannot be read: .*utf-8"),
        ("hf://datasets/owner/configs/three/*.jsonl", None, "train"): ("NotFound", r"three/.* does not exist: three"),
        ("hf://datasets/owner/absent/a.jsonl", None, "train"): ("NotFound", "is not on the Hub, or is private"),
        ("absent", None, "train"): ("NotFound", "is not on the Hub, or is private"),
        ("a--b", None, "train"): ("NotFound", "cannot be on the Hub: "),
    }
    columns, *answers = ask(hub, tmp_path, ("columns", None, "train"), *good, *bad)
    rows = columns["rows"]
    assert [json.loads(row) for row in rows[:3]] == [
        *({**row, "score": "high"} for row in ROWS[:2]), {"score": None, "more": True},
    ]  # fmt: skip
    assert rows[3:] == ['{"bad'], "a bad row is one row, as in a local file"
    assert columns["notes"] == ["b.jsonl: NaN or Infinity was read as null in 1 rows"]
    for question, (expected, notes) in good.items():
        answer = answers.pop(0)
        assert [json.loads(row) for row in answer["rows"]] == expected, question
        assert answer["notes"] == notes, question
    for question, (kind, message) in bad.items():
        answer = answers.pop(0)
        assert answer.get("error") == kind, (question, answer)
        assert re.search(message, answer["message"]), (question, answer)
        assert "\n" not in answer["message"]


def test_faults_of_the_hub_are_retried_or_not(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("owner/splits", DATASETS["splits"], kind="dataset")
    question = ("splits", None, "train")
    hub.fail("GET|HEAD", "/tree/", status=500, times=100)
    hub.fail("GET|HEAD", "/paths-info/", status=500, times=100)
    (answer,) = ask(hub, tmp_path, question)
    hub.faults.clear()
    assert answer["error"] == "Unreachable" and "the Hub answered 500" in answer["message"]
    hub.fail("GET|HEAD", "/resolve/.*train.jsonl", status=403, times=100)
    (answer,) = ask(hub, tmp_path, question)
    hub.faults.clear()
    assert answer["error"] == "NoPermission"
    assert "does not let Retune read the file train.jsonl of the dataset owner/splits" in answer["message"]
    monkeypatch.setenv("HF_TOKEN", "hf_ä")
    (answer,) = ask(hub, tmp_path, question)
    assert answer["error"] == "NoPermission" and "a character that no token has" in answer["message"]
    assert "hf_" not in answer["message"]
