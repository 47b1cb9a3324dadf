"""Paths: the checkout, the state folder, the artifact store, the registry, recipe files.

Each function reads the environment on every call.
"""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
HEADLESS = "RETUNE_HEADLESS"  # set by `retune run`, where there is no scheduler and no UI


def var() -> Path:
    """Return the state folder of this machine (`RETUNE_VAR`, by default `var/` in the checkout)."""
    return Path(os.environ.get("RETUNE_VAR", PROJECT / "var")).resolve()


def store_uri() -> str:
    """Return the URI of the artifact store (`RETUNE_STORE`, by default `file://<var>/store`)."""
    return os.environ.get("RETUNE_STORE", f"file://{var() / 'store'}").rstrip("/")


def registry_root() -> str:
    """Return the URI below which recipes without a `registry` publish (`RETUNE_REGISTRY`, by default
    `file://<var>/registry`)."""
    return os.environ.get("RETUNE_REGISTRY", f"file://{var() / 'registry'}").rstrip("/")


def recipe_files() -> list[Path]:
    """Return every recipe file once: `include/recipes/*.yaml`, then the files and folders of `RETUNE_RECIPES`.

    `RETUNE_RECIPES` is a list separated by colons. Two files of the result may have the same name, see
    `include.recipe.find_recipe`.
    """
    sources = [PROJECT / "include" / "recipes"]
    sources += [Path(source) for source in os.environ.get("RETUNE_RECIPES", "").split(":") if source]
    files: dict[Path, Path] = {}
    for source in sources:
        for file in sorted(source.glob("*.yaml")) if source.is_dir() else [source]:
            files.setdefault(file.resolve(), file)
    return list(files.values())


# Settings of libraries; a value that is set in the environment takes precedence. The first two keep library state out
# of the home folder.
for _name, _value in {
    "HF_HOME": str(var() / "cache" / "huggingface"),
    "MPLCONFIGDIR": str(var() / "cache" / "matplotlib"),
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # some S3 stores send the checksum of the whole object with a part of it; Retune compares files with the manifest
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "TOKENIZERS_PARALLELISM": "false",  # otherwise tokenizers warns in every process forked later
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # less fragmentation: rows differ in length
    "GOMP_SPINCOUNT": "10000",  # waiting threads of torch yield; spinning doubles training time on busy cores
}.items():
    os.environ.setdefault(_name, _value)
