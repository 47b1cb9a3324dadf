"""What the stages of the engine leave behind on a small fixed input, as far as floating point allows to foretell it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from include.registry import FolderRegistry
from include.storage.files import MANIFEST, file_digest
from tasks.stages import STAGES
from tests.conftest import PROJECT, conversation

GOLDEN = PROJECT / "tests" / "tasks" / "golden_engine_outputs.json"
STAGES_OF_THE_ENGINE = ("train", "smoke_test", "evaluate", "publish", "verify")
# values that depend on the machine, the time, the place, the versions of packages, or on a difference near zero
OF_THIS_RUN = {
    "seconds", "tokens_per_second", "peak_memory_bytes", "base_model_name_or_path", "transformers_version",
    "peft_version", "device_name", "dtype", "predicted_bytes", "notes", "checks", "failures", "stopped", "same_tokens",
}  # fmt: skip
NOT_AN_OUTPUT = {"engine.log", "job.json"}  # of the engine's process
TOLERANCE = 0.005  # of losses (nats) and gradient norms: processors round differently


def outline(value: Any, values: bool) -> Any:
    """Return the names and types in a JSON value, with the values themselves where these can be foretold."""
    if isinstance(value, dict):
        return {
            name: outline(part, values and name not in OF_THIS_RUN)
            for name, part in value.items()
            if part is not None or not values  # an argument that is not set, in a library's file
        }
    if isinstance(value, list):
        parts = [outline(part, values) for part in (value if values else value[:1])]
        return sorted(parts) if all(isinstance(part, str) for part in parts) else parts  # libraries write sets
    return value if values else type(value).__name__


def outline_of_file(path: Path) -> Any:
    """Return what can be foretold of a file: tensors, names and types of JSON, headings, otherwise a digest."""
    if path.name in NOT_AN_OUTPUT or path.suffix == ".png":
        return "there"
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118
            kinds = [(re.sub(r"\.\d+\.", ".*.", name), x.get_dtype(), *x.get_shape()) for name, x in tensors]
        return {name: f"{count} x {kind}" for (name, *kind), count in Counter(kinds).items()}
    if path.name == "losses.json" or path.name.endswith("config.json"):
        return outline(json.loads(path.read_bytes()), values=True)
    if path.name == MANIFEST:
        return sorted(json.loads(path.read_bytes()))  # names only: it has other stages' metadata, and the recipe
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return outline(json.loads(path.read_bytes()), values=False)
    if path.suffix == ".jsonl":
        return [outline(json.loads(line), values=True) for line in path.read_text().splitlines()]
    if path.suffix == ".md":
        return [line for line in path.read_text().splitlines() if line.startswith("#")]
    return file_digest(path)[:16]


def outline_of_version(version: Path, *trained: Path) -> dict[str, Any]:
    """Return the outlines of a published version's files; files of the training are only named."""
    known = {file.name: file.read_bytes() for folder in trained for file in folder.iterdir() if file.is_file()}
    return {
        path.name: "as trained" if path.read_bytes() == known.get(path.name) else outline_of_file(path)
        for path in sorted(version.iterdir())
    }


def differences(found: Any, known: Any, where: str = "") -> list[str]:
    """Return the places where two outlines differ by more than the tolerance."""
    if isinstance(found, dict) and isinstance(known, dict):
        names = sorted(found.keys() | known.keys())
        return [text for name in names for text in differences(found.get(name), known.get(name), f"{where}/{name}")]
    if isinstance(found, list) and isinstance(known, list) and len(found) == len(known):
        return [text for pair in zip(found, known, strict=True) for text in differences(*pair, f"{where}[]")]
    if isinstance(found, float) and isinstance(known, float):
        return [] if found == pytest.approx(known, rel=TOLERANCE, abs=TOLERANCE) else [f"{where}: {found} for {known}"]
    return [] if found == known else [f"{where}: {found!r}, expected {known!r}"]


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's plan and losses are others")
def test_a_stage_of_the_engine_whose_output_changes_raises_its_version(
    small_recipe: Callable, pipeline: Callable, artifact: Callable, material: Path, tmp_path: Path, var: Path
) -> None:
    """Golden outlines of one run. On purpose: raise the stage's version, then WRITE_GOLDEN=1."""
    path = tmp_path / "rows.jsonl"
    rows = [conversation(f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}.") for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"base_model": str(material / "models" / "stories260K"), "chat_template": "alpaca"}
    lineage = pipeline(small_recipe(dataset=str(path), learning_rate=1e-3, merged_16bit=True, **base))
    found = {}
    for name in STAGES_OF_THE_ENGINE:
        output = artifact(lineage, name)
        found[name] = {
            "version": STAGES[name].load().version,
            "metadata": outline(without_texts(output.metadata.to_json()), values=True),
            "files": {file: outline_of_file(output.local() / file) for file in sorted(output.manifest["files"])},
        }
    trained = artifact(lineage, "train").local()
    for registry in ("small", "small-merged"):
        version = FolderRegistry(var / "registry" / registry).fetch("v1")
        found["publish"][registry] = outline_of_version(version, trained / "adapter", trained)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    known = json.loads(GOLDEN.read_text())
    for name in STAGES_OF_THE_ENGINE:
        wrong = differences({**found[name], "version": None}, {**known[name], "version": None})
        raised = found[name]["version"] > known[name]["version"]
        assert not wrong or raised, f"the output of {name} changed: raise its version ({'; '.join(wrong[:5])})"
        assert not raised, f"{name} has a new version: write its golden outline (WRITE_GOLDEN=1)"


def without_texts(value: Any) -> Any:
    """Return a JSON value with its texts replaced by their type: answers, sentences, digests and places."""
    if isinstance(value, dict):
        return {name: without_texts(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_texts(part) for part in value]
    return "str" if isinstance(value, str) else value
