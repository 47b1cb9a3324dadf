"""New tokens: room for them in a base's embeddings, and which rows an adapter trains for them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import orjson


def make_room(model: Any, ids: Collection[int]) -> None:
    """Enlarge the embeddings and the head of a model if they lack some of the ids; other rows stay.

    Each row for them becomes the mean of the other rows, so that it is the same wherever the base is loaded.
    """
    if not ids:
        return
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    others = [id for id in range(rows) if id not in ids]
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in _layers(model):
            layer.weight[sorted(ids)] = layer.weight[others].float().mean(0).to(layer.weight.dtype)


def trainable_rows(model: Any, ids: Collection[int]) -> dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices` for the rows of new tokens; None if there are none."""
    if not ids:
        return None
    layers = _layers(model)
    paths = [path for path, module in model.named_modules() if any(module is layer for layer in layers)]
    return {path.rpartition(".")[2]: sorted(ids) for path in paths}


def tokens_of_adapter(folder: Path) -> list[int]:
    """Return the ids whose rows a saved adapter brings; [] for a whole model."""
    file = folder / "adapter_config.json"
    rows = orjson.loads(file.read_bytes()).get("trainable_token_indices") if file.is_file() else None
    return sorted({id for ids in (rows or {}).values() for id in ids})


def _layers(model: Any) -> list[Any]:
    """Return the embeddings, and the head if it has weights of its own."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
