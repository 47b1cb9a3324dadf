"""Where things are: the checkout, the state folder and the store. Read from the environment, never cached."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
HEADLESS = "RETUNE_HEADLESS"  # set for `retune run`, where no scheduler watches deadlines and there is no UI


def var() -> Path:
    """The state folder of this machine (`RETUNE_VAR`, by default `var/` in the checkout)."""
    return Path(os.environ.get("RETUNE_VAR", PROJECT / "var")).resolve()


def store_uri() -> str:
    """The URI of the artifact store (`RETUNE_STORE`, by default `file://<var>/store`)."""
    return os.environ.get("RETUNE_STORE", f"file://{var() / 'store'}").rstrip("/")


def registry_root() -> str:
    """The URI under which each recipe that names no registry has one (`RETUNE_REGISTRY`, by default
    `file://<var>/registry`)."""
    return os.environ.get("RETUNE_REGISTRY", f"file://{var() / 'registry'}").rstrip("/")


def recipe_files() -> list[Path]:
    """Every recipe file: `include/recipes/*.yaml`, then the files and folders named in `RETUNE_RECIPES`
    (separated by colons)."""
    places = [PROJECT / "include" / "recipes"]
    places += [Path(place) for place in os.environ.get("RETUNE_RECIPES", "").split(":") if place]
    files: list[Path] = []
    for place in places:
        files += sorted(place.glob("*.yaml")) if place.is_dir() else [place]
    return files


# State that libraries would otherwise write into the home folder, and manners; a value from outside wins.
for _name, _value in {
    "HF_HOME": str(var() / "cache" / "huggingface"),
    "MPLCONFIGDIR": str(var() / "cache" / "matplotlib"),
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # some S3 stores send the whole object's checksum with a part of it; files are compared with their manifest anyway
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns in every process that forks afterwards
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # rows of many lengths would leave half of the memory in pieces
    "GOMP_SPINCOUNT": "10000",  # torch's waiting threads yield: on busy cores spinning doubles the time of training
}.items():
    os.environ.setdefault(_name, _value)
