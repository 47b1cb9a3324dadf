"""Base models: pin one to a revision, fetch what was pinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from include.data.sources import absolute, is_hub_id
from include.errors import NotFound
from include.paths import PROJECT, var
from include.recipe import Recipe
from include.storage.artifacts import Store
from include.storage.files import file_digest, fingerprint
from include.storage.hub import hub_api, hub_errors

DEMO_BASE = "demo://little-llama"
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "config.json", "chat_template*", "generation_config.json"]


def pin_base(recipe: Recipe) -> str:
    """The revision of the recipe's base model as it is now.

    Raises:
        NotFound, NoPermission, Unreachable: it is not there, not readable, or the Hub does not answer.
    """
    name = recipe.base_model
    if name == DEMO_BASE:
        return file_digest(PROJECT / "include" / "demo" / "village.py")[:16]  # the model is what that file makes
    if is_hub_id(name):
        with hub_errors(f"the model {name}", "base_model"):
            info = hub_api().model_info(name, revision=recipe.base_revision)
        names = {file.rfilename for file in info.siblings or ()}
        if not any(file.endswith(".safetensors") for file in names):
            raise NotFound(f"field 'base_model': {name} has no safetensors files", "Choose a model that has")
        return str(info.sha)
    folder = Path(absolute(name))
    files = sorted(p for p in folder.glob("*") if p.suffix in (".json", ".safetensors", ".jinja", ".model"))
    if not (folder / "config.json").is_file() or not any(p.suffix == ".safetensors" for p in files):
        raise NotFound(
            f"field 'base_model': there is no model in {folder} (config.json and *.safetensors)",
            "Name a folder that save_pretrained wrote, or a model on the Hub as owner/name",
        )
    return fingerprint([[p.name, file_digest(p)] for p in files])


def fetch_base(recipe: Recipe, store: Store, tokenizer_only: bool = False) -> Path:
    """The folder with the pinned base model on this machine; fetched once into its cache.

    Raises:
        NotFound, NoPermission, Unreachable: see `pin_base`.
    """
    if recipe.base_model == DEMO_BASE:
        artifact = store.find(recipe.name, "pretrain", str(recipe.base_revision))
        if artifact is None:
            raise NotFound(
                f"the demo's base model {recipe.base_revision} is not in {store.uri}", "Clear the task pretrain"
            )
        return artifact.local()
    if is_hub_id(recipe.base_model):
        with hub_errors(f"the model {recipe.base_model}", "base_model"):
            return Path(
                hub_api().snapshot_download(
                    recipe.base_model,
                    revision=recipe.base_revision,
                    allow_patterns=TOKENIZER_FILES if tokenizer_only else [*TOKENIZER_FILES, "*.safetensors*"],
                    cache_dir=var() / "cache" / "hub",
                )
            )
    return Path(absolute(recipe.base_model))


def base_license(recipe: Recipe) -> dict[str, str]:
    """What the base model's card says of its licence: `license`, and `license_name` and `license_link` of its own kind.

    Empty where the card says nothing, or there is none.
    """
    from huggingface_hub import ModelCard

    card: Any = None
    if is_hub_id(recipe.base_model):
        with hub_errors(f"the model {recipe.base_model}", "base_model"):
            card = hub_api().model_info(recipe.base_model, revision=recipe.base_revision).card_data
    elif recipe.base_model != DEMO_BASE:
        readme = Path(absolute(recipe.base_model)) / "README.md"
        card = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
    values = {name: card.get(name) for name in ("license", "license_name", "license_link")} if card else {}
    return {name: value for name, value in values.items() if isinstance(value, str)}
