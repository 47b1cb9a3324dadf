"""A base of the published Llama tokenizer for the stages up to `template`, and the list of rows that do not train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture(scope="session")
def llama_base(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published tokenizer of Llama 3.2 beside a configuration, and embeddings of two numbers for each token."""
    folder = tmp_path_factory.mktemp("llama") / "base"
    shutil.copytree(material / "tokenizers" / "llama-3.2", folder)
    config = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
    (folder / "config.json").write_text(json.dumps(config))
    numbers = np.arange(128256 * 2, dtype=np.float32).reshape(-1, 2) + 1
    save_file({"model.embed_tokens.weight": numbers}, folder / "model.safetensors")
    return folder


@pytest.fixture
def left_out() -> Callable[[Any], list[dict[str, Any]]]:
    """The lines of the list of rows that `template` has left out."""
    return lambda made: [json.loads(line) for line in (made.local() / made.metadata.LEFT_OUT).open()]
