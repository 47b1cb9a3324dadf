"""Save whole models so that transformers 4.57 and 5, and programs that read config.json themselves, load the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from include.storage.files import to_json

CONFIG = "config.json"
# of the base's config.json: the saved weights are not quantized, no code is run, and it was saved somewhere else
NOT_INHERITED = ("quantization_config", "auto_map", "_name_or_path")


def save_model(model: Any, base: Path, folder: Path) -> None:
    """Write a model: safetensors, generation_config.json, and a config.json in the words of transformers 4.57 and 5.

    Args:
        model: weights as they are to be saved.
        base: folder of the base model; its config.json has names that transformers 5 replaces when it saves.
        folder: created if it does not exist.
    """
    model.save_pretrained(str(folder), safe_serialization=True)
    saved, original = (orjson.loads((path / CONFIG).read_bytes()) for path in (folder, base))
    (folder / CONFIG).write_bytes(to_json(with_older_names(saved, original)))


def with_older_names(saved: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json of transformers 5 with the names that transformers 4.57 reads added to it.

    transformers 4.57 ignores `rope_parameters` silently and computes with a `rope_theta` of 10,000 and no scaling.

    Args:
        saved: content of the config.json that transformers 5 wrote.
        original: content of the base's config.json, whose own names both versions read.
    """
    inherited = {name: value for name, value in original.items() if name not in NOT_INHERITED}
    config = {**inherited, **_older_rope(saved.get("rope_parameters") or {}, inherited), **saved}
    if "dtype" in saved:
        config["torch_dtype"] = saved["dtype"]  # before 4.56 the only name
    for name, part in saved.items():
        if isinstance(part, dict) and isinstance(original.get(name), dict) and "model_type" in part:
            config[name] = with_older_names(part, original[name])  # `text_config` of a model of several parts
    return config


def _older_rope(rope: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
    """Return the position embedding's settings as transformers 4.57 names them; the base's own words come first."""
    older: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in rope.values()):  # one for each kind of layer, as in Gemma 3
        if local := rope.get("sliding_attention"):
            older["rope_local_base_freq"] = local["rope_theta"]
        rope = rope.get("full_attention") or {}
    if rope:
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        older["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
        older |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return {name: value for name, value in older.items() if name not in inherited}
