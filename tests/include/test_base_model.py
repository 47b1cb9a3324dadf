"""Base models and their revisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from include.base_model import (
    DEMO_BASES,
    LITTLE_LLAMA,
    SMOLLM2,
    BaseLimits,
    base_license,
    base_limits,
    untrained_tokens,
)
from include.errors import BadRecipe
from include.paths import PROJECT
from include.recipe import validate_recipe
from include.storage.tensors import INDEX
from tests.services.hub import Hub


def test_a_demos_base_has_another_revision_when_any_of_its_sources_changes() -> None:
    modules = {path.name for path in (PROJECT / "include" / "demo").glob("*.py")} - {"__init__.py"}
    assert {file for files in DEMO_BASES.values() for file in files} == modules


def test_the_card_of_an_adapter_has_the_licence_of_a_demos_base() -> None:
    found = {name: base_license(validate_recipe({"name": "x", "base_model": name}, "x")) for name in DEMO_BASES}
    assert found == {LITTLE_LLAMA: {}, SMOLLM2: {"license": "apache-2.0"}}


@pytest.mark.parametrize(
    ("config", "embeddings", "positions"),
    [
        ({}, None, None),
        ({"vocab_size": 512, "max_position_embeddings": 2048}, 512, 2048),
        ({"n_positions": 1024}, None, 1024),
        ({"text_config": {"vocab_size": 7, "max_position_embeddings": 99}}, 7, 99),
        # Llama 3 writes the number after scaling, linear scaling and YaRN the one before it
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, None, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, None, 8192),
        ({"max_position_embeddings": 40960,
          "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
         None, 131072),
        ({"model_type": "gemma3_text", "max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, None, 131072),
    ],
)  # fmt: skip
def test_limits_of_a_base_are_those_of_its_configuration(
    tmp_path: Path, config: dict[str, Any], embeddings: int | None, positions: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert base_limits(tmp_path) == BaseLimits(embeddings, positions)


# ids 0 and 1 were trained; 2 is zero, also with negative zeros; 3 and 4 are equal
EMBEDDINGS = np.array([[1, 2], [3, 4], [0, -0.0], [7, 8], [7, 8], [0, 0]], np.float32)
TOKENS = {"a": 0, "b": 1, "zero": 2, "same": 3, "twin": 4, "none": -1, "beyond": 6}


def test_untrained_tokens_are_those_with_empty_or_equal_rows(tmp_path: Path) -> None:
    recipe = validate_recipe({"name": "x", "base_model": str(tmp_path)}, "x")
    assert untrained_tokens(recipe, tmp_path, TOKENS) == [], "no weights in this form"
    save_file(
        {"model.embed_tokens.weight": EMBEDDINGS, "model.norm.weight": EMBEDDINGS[0] * 0}, tmp_path / "a.safetensors"
    )
    assert untrained_tokens(recipe, tmp_path, TOKENS) == ["zero", "same", "twin"]
    assert untrained_tokens(recipe, tmp_path, {"a": 0, "same": 3}) == [], "no other of the tokens is equal"
    # the head counts, too, in the file that the index names
    head = EMBEDDINGS + np.arange(12, dtype=np.float32).reshape(6, 2) + 1
    head[1] = 0
    save_file({"lm_head.weight": head}, tmp_path / "b.safetensors")
    save_file({"model.embed_tokens.weight": EMBEDDINGS * 0}, tmp_path / "old.safetensors")
    places = {"model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert untrained_tokens(recipe, tmp_path, TOKENS) == ["b", "zero", "same", "twin"]


def test_of_a_base_on_the_hub_only_these_rows_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.concatenate([EMBEDDINGS, np.ones((1_000_000, 2), np.float32)])  # 8 MB
    save_file({"model.embed_tokens.weight": many}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer").mkdir()
    with Hub() as hub:
        sha = hub.put("owner/base", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.cut("GET", r"/owner/base/resolve/.*", after_bytes=1_000_000, times=99)  # no longer answer arrives
        recipe = validate_recipe({"name": "x", "base_model": "owner/base", "base_revision": sha}, "x")
        assert untrained_tokens(recipe, tmp_path / "tokenizer", TOKENS) == ["zero", "same", "twin"]


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x09" + bytes(7)]
)
def test_weights_that_cannot_be_read_are_refused_by_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    recipe = validate_recipe({"name": "x", "base_model": str(tmp_path)}, "x")
    with pytest.raises(
        BadRecipe, match="model.safetensors is not a safetensors file; it may be cut short, or a Git LFS"
    ):
        untrained_tokens(recipe, tmp_path, TOKENS)
