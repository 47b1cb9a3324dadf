"""Base models: pin one to a revision, and fetch the pinned one.

A base model is a Hub id (`owner/name`), a local folder, or one of the demos' bases, which the stage `make_base` makes:
`demo://little-llama`, pretrained by the project, and `demo://smollm2-135m-instruct`, taken from a Python package.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from fsspec.implementations.local import LocalFileSystem

from include.data.sources import absolute_path, is_hub_id
from include.errors import BadRecipe, NotFound
from include.paths import PROJECT, var
from include.recipe import Recipe
from include.storage.artifacts import Store
from include.storage.files import file_digest, fingerprint
from include.storage.hub import hub_api, hub_errors, hub_file_system
from include.storage.tensors import find_matrices, read_matrix_rows

LITTLE_LLAMA, SMOLLM2 = "demo://little-llama", "demo://smollm2-135m-instruct"
DEMO_BASES = {  # by the base's name, the files of include/demo/ that decide its weights
    LITTLE_LLAMA: ("village.py", "pretraining.py"),
    SMOLLM2: ("smollm2.py",),
}
DEMO_LICENSES = {SMOLLM2: {"license": "apache-2.0"}}  # as the package's metadata and the GGUF file name it
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "config.json", "chat_template*", "generation_config.json"]

# one row per token: the input embeddings and, where it is not the same matrix, the output layer
WEIGHTS_BY_TOKEN = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def pin_base(recipe: Recipe) -> str:
    """Return the current revision of the recipe's base model: a commit sha on the Hub, otherwise a digest of its files.

    Raises:
        NotFound: the model does not exist, or has no safetensors files.
        BadRecipe: it is an adapter.
        NoPermission: it cannot be read with this account.
        Unreachable: the Hub does not answer.
    """
    name = recipe.base_model
    if name in DEMO_BASES:
        return fingerprint([[file, file_digest(PROJECT / "include" / "demo" / file)] for file in DEMO_BASES[name]])
    if is_hub_id(name):
        with hub_errors(f"the model {name}", "base_model"):
            info = hub_api().model_info(name, revision=recipe.base_revision)
        names = {file.rfilename for file in info.siblings or ()}
        if ADAPTER_CONFIG in names:
            _refuse_adapter(name, (info.card_data or {}).get("base_model"))
        if not any(file.endswith(".safetensors") for file in names):
            raise NotFound(f"field 'base_model': {name} has no safetensors files", "Choose a model that has them")
        return str(info.sha)
    folder = Path(absolute_path(name))
    if (folder / ADAPTER_CONFIG).is_file():
        _refuse_adapter(str(folder), _base_of_adapter(folder / ADAPTER_CONFIG))
    files = sorted(p for p in folder.glob("*") if p.suffix in (".json", ".safetensors", ".jinja", ".model"))
    if not (folder / "config.json").is_file() or not any(p.suffix == ".safetensors" for p in files):
        raise NotFound(
            f"field 'base_model': there is no model in {folder} (config.json and *.safetensors)",
            "Name a folder that save_pretrained wrote, or a model on the Hub as owner/name",
        )
    return fingerprint([[p.name, file_digest(p)] for p in files])


def fetch_config(recipe: Recipe) -> Path | None:
    """Return a local folder with the config.json of the pinned base; None for a demo's base, which is made later.

    Raises:
        NotFound, NoPermission, Unreachable: see `pin_base`.
    """
    if recipe.base_model in DEMO_BASES:
        return None
    if not is_hub_id(recipe.base_model):
        return Path(absolute_path(recipe.base_model))
    with hub_errors(f"the model {recipe.base_model}", "base_model"):
        return Path(
            hub_api().snapshot_download(
                recipe.base_model, revision=recipe.base_revision, allow_patterns=["config.json"],
                cache_dir=var() / "cache" / "hub",
            )
        )  # fmt: skip


def _refuse_adapter(name: str, base: Any) -> None:
    at = f"Name its base{f' {base}' if isinstance(base, str) else ''} as base_model"
    raise BadRecipe(f"field 'base_model': {name} is an adapter (adapter_config.json), not a whole model", at)


def _base_of_adapter(path: Path) -> Any:
    with suppress(orjson.JSONDecodeError, AttributeError):
        return orjson.loads(path.read_bytes()).get("base_model_name_or_path")
    return None


def fetch_base(recipe: Recipe, store: Store, tokenizer_only: bool = False) -> Path:
    """Return the local folder of the pinned base model. A model of the Hub is fetched into the machine's cache once.

    Args:
        recipe: its `base_revision` is the pinned one.
        store: the artifact store, which has the demos' base models.
        tokenizer_only: fetch no weights from the Hub.

    Raises:
        NotFound, NoPermission, Unreachable: see `pin_base`.
    """
    if recipe.base_model in DEMO_BASES:
        artifact = store.find(recipe.name, "make_base", str(recipe.base_revision))
        if artifact is None:
            raise NotFound(
                f"the demo's base model {recipe.base_revision} is not in {store.uri}", "Clear the task make_base"
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
    return Path(absolute_path(recipe.base_model))


def base_license(recipe: Recipe) -> dict[str, str]:
    """Return the licence fields of the base model's card: `license`, `license_name`, `license_link`.

    A field that the card does not have is left out. Without a card the result is empty.

    Raises:
        NotFound, NoPermission, Unreachable: see `pin_base`.
    """
    from huggingface_hub import ModelCard

    card: Any = None
    if recipe.base_model in DEMO_BASES:
        return dict(DEMO_LICENSES.get(recipe.base_model, {}))
    if is_hub_id(recipe.base_model):
        with hub_errors(f"the model {recipe.base_model}", "base_model"):
            card = hub_api().model_info(recipe.base_model, revision=recipe.base_revision).card_data
    else:
        readme = Path(absolute_path(recipe.base_model)) / "README.md"
        card = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
    values = {name: card.get(name) for name in ("license", "license_name", "license_link")} if card else {}
    return {name: value for name, value in values.items() if isinstance(value, str)}


@dataclass(frozen=True)
class BaseLimits:
    """What a base model can take in.

    Attributes:
        embeddings: number of token ids that have an embedding; None if it is not known.
        positions: number of tokens in a sequence; None if the model has no limit, or it is not known.
    """

    embeddings: int | None
    positions: int | None


def base_limits(folder: Path) -> BaseLimits:
    """Return the limits of a base model by its `config.json`.

    Scaled rotary embeddings count as vLLM counts them (`_get_and_verify_max_len`): Gemma 3 and the types llama3 and
    longrope write the scaled number of positions into the configuration, the others the number before scaling.
    """
    file = folder / "config.json"
    config = orjson.loads(file.read_bytes()) if file.is_file() else {}
    config |= config.get("text_config") or {}  # of models that also read images
    positions = next((config[name] for name in POSITION_FIELDS if isinstance(config.get(name), int)), None)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaled = kind in ("default", "llama3", "longrope", "su") or str(config.get("model_type")).startswith("gemma3")
    if positions and not scaled:
        before = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(before * rope.get("factor", 1)))
    size = config.get("vocab_size")
    return BaseLimits(size if isinstance(size, int) else None, positions)


def untrained_tokens(recipe: Recipe, folder: Path, tokens: Mapping[str, int]) -> list[str]:
    """Return the tokens that the base model has never been trained on, by their rows in the embeddings and the head.

    Such a row is all zeros, or equals the row of another of the tokens. Only these rows are read, also from the Hub.

    Args:
        recipe: names the base model and its pinned revision.
        folder: the folder of the base; without weights, they are read from the Hub.
        tokens: ids by the tokens' texts.

    Raises:
        NotFound, NoPermission, Unreachable: see `pin_base`.
        BadRecipe: a file of the weights cannot be read.
    """
    known = {text: id for text, id in tokens.items() if id >= 0}
    found: set[str] = set()
    with hub_errors(f"the model {recipe.base_model}", "base_model"):
        fs, place = LocalFileSystem(), str(folder)
        if is_hub_id(recipe.base_model) and not any(folder.glob("*.safetensors")):
            fs, place = hub_file_system(), f"{recipe.base_model}@{recipe.base_revision}"
        for matrix in find_matrices(fs, place, WEIGHTS_BY_TOKEN):
            texts = [text for text, id in known.items() if id < matrix.rows]
            rows = read_matrix_rows(fs, matrix, [known[text] for text in texts])
            found |= {
                text
                for text, row in zip(texts, rows, strict=True)
                if not row.strip(b"\x00\x80") or rows.count(row) > 1  # zeros, also negative ones
            }
    return [text for text in tokens if text in found]
