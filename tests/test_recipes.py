"""Shipped recipes as they stand, with their names of the Hub: small models and a few rows are published there.

The recipes of the demos and of SmolLM2 run on their real bases, in tests of their own.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.architectures import config_of
from tests.conftest import PROJECT
from tests.services.hub import Hub

pytestmark = pytest.mark.engine
# what a GPU would do in minutes, a CPU does on fewer and shorter rows
SMALL = {"engine": "transformers", "max_steps": 2, "max_new_tokens": 8, "holdout_share": 0.2, "max_holdout_rows": 8}
ROWS = 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub; the environment has its address and token."""
    with Hub(user="my-name") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.write_token)
        yield hub


def publish_base(hub: Hub, name: str, architecture: str, tokenizer: Path, tmp_path: Path) -> None:
    """Publish a tiny model with random weights and a real tokenizer."""
    folder = tmp_path / "base"
    config = config_of(architecture)
    text = config.get_text_config()
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    text.vocab_size = len(loaded)
    text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {path.name: path.read_bytes() for path in tokenizer.glob("*token*")}
    files |= {path.name: path.read_bytes() for path in tokenizer.glob("chat_template.jinja")}
    hub.put(name, files)


def question(i: int) -> str:
    """Return the question of row i; no two are near-duplicates."""
    letters = random.Random(i)
    words = ["".join(letters.choices(ascii_lowercase, k=5)) for _ in range(8)]
    return f"What is {i} plus 3? And say: {' '.join(words)}"


def finetome() -> list[dict[str, Any]]:
    """Rows as FineTome-100k has them."""
    return [
        {"conversations": [{"from": "human", "value": question(i)}, {"from": "gpt", "value": f"{i + 3}."}],
         "source": "test", "score": 5.0}
        for i in range(ROWS)
    ]  # fmt: skip


def thoughts() -> list[dict[str, Any]]:
    """Rows as Mixture-of-Thoughts has them; in the last one the thought does not end."""
    answers = [f"<think>\nThree more than {i}.\n</think>\n\nIt is {i + 3}." for i in range(ROWS - 1)]
    return [
        {"messages": [{"role": "user", "content": question(i)}, {"role": "assistant", "content": answer}],
         "num_tokens": 30, "source": "test"}
        for i, answer in enumerate([*answers, "<think>\nLet me see, and see, and"])
    ]  # fmt: skip


def preferences() -> list[dict[str, Any]]:
    """Rows as orpo-dpo-mix-40k has them."""

    def conversation(i: int, answer: str) -> list[dict[str, str]]:
        return [{"content": question(i), "role": "user"}, {"content": answer, "role": "assistant"}]

    return [
        {"source": "test", "chosen": conversation(i, f"It is {i + 3}."), "rejected": conversation(i, "No idea."),
         "prompt": question(i), "question": question(i)}
        for i in range(ROWS)
    ]  # fmt: skip


def run(
    hub: Hub, retune: Callable, var: Path, name: str, dataset: str, rows: list[dict[str, Any]], folder: str = "data",
    **fields: Any,
) -> Callable[[str], Any]:  # fmt: skip
    """Run a shipped recipe up to the gate, as a person would; return a function for the manifest of a stage."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    config = "default" if folder == "data" else folder
    front = f"---\nconfigs:\n- config_name: {config}\n  data_files: {folder}/*.jsonl\n---\n".encode()
    hub.put(dataset, {f"{folder}/train-0.jsonl": content, "README.md": front}, kind="dataset")
    values = [part for field, value in {**SMALL, **fields}.items() for part in ("--set", f"{field}={value}")]
    done = retune("stage", name, "--until", "evaluate", *values)
    assert done.returncode == 0, done.stderr + done.stdout
    return lambda stage: next((var / "store" / name / stage).iterdir())


def metadata(folder: Path) -> dict[str, Any]:
    """Return what a stage left beside its files."""
    return json.loads((folder / "manifest.json").read_text())["metadata"]


def test_qwen3_trains_on_the_thoughts_of_its_answers(
    hub: Hub, retune: Callable, var: Path, published: Callable, tmp_path: Path
) -> None:
    publish_base(hub, "Qwen/Qwen3-4B", "Qwen3", published("qwen3"), tmp_path)
    dataset = "open-r1/Mixture-of-Thoughts"
    of = run(hub, retune, var, "qwen3_4b_reasoning", dataset, thoughts(), "all", max_seq_length=512)
    assert metadata(of("validate"))["refused"] == 1
    sample = (of("template") / "samples.txt").read_text()
    assert "<|im_start|>assistant\n»<think>\nThree more than " in sample
    assert metadata(of("train"))["steps"] == 2
    assert "publish" in metadata(of("evaluate"))["verdict"]


def test_gemma_3_trains_its_text_model(
    hub: Hub, retune: Callable, var: Path, published: Callable, tmp_path: Path
) -> None:
    publish_base(hub, "unsloth/gemma-3-4b-it", "Gemma 3 with images", published("gemma3"), tmp_path)
    of = run(hub, retune, var, "gemma3_4b", "mlabonne/FineTome-100k", finetome(), max_seq_length=512)
    assert "<start_of_turn>model\n»" in (of("template") / "samples.txt").read_text()
    assert metadata(of("train"))["steps"] == 2
    assert "publish" in metadata(of("evaluate"))["verdict"]


def test_preferences_train_llama(hub: Hub, retune: Callable, var: Path, material: Path, tmp_path: Path) -> None:
    publish_base(hub, "unsloth/Llama-3.2-1B-Instruct", "Llama", material / "tokenizers" / "llama-3.2", tmp_path)
    of = run(hub, retune, var, "dpo_preferences", "mlabonne/orpo-dpo-mix-40k", preferences())
    assert metadata(of("train"))["steps"] == 2
    assert "publish" in metadata(of("evaluate"))["verdict"]


def test_the_reference_recipe_ends_before_its_registry(
    hub: Hub, retune: Callable, var: Path, material: Path, tmp_path: Path
) -> None:
    publish_base(hub, "unsloth/Llama-3.2-3B-Instruct", "Llama", material / "tokenizers" / "llama-3.2", tmp_path)
    of = run(hub, retune, var, "llama32_3b_finetome", "mlabonne/FineTome-100k", finetome())
    assert metadata(of("train"))["steps"] == 2
    assert "publish" in metadata(of("evaluate"))["verdict"]


def test_the_example_of_the_readme_runs_to_its_gate(
    hub: Hub, retune: Callable, var: Path, published: Callable, write_recipe: Callable, tmp_path: Path
) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (PROJECT / "README.md").read_text("utf-8"), re.DOTALL)
    fields = yaml.safe_load(next(block for block in blocks if "dataset:" in block))
    publish_base(hub, fields["base_model"], "Llama", published("smollm2"), tmp_path)
    data = tmp_path / "support.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in finetome()))
    write_recipe("my_model", **fields | {"dataset": str(data)})
    done = retune("stage", "my_model", *(p for k, v in SMALL.items() if k != "engine" for p in ("--set", f"{k}={v}")))
    assert "publish failed: the candidate is not published: smoke test: 1 of 1 answers fail as_expected" in done.stderr
