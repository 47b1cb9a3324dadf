"""Recipe files: find them, read them, put what was typed in place of their values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from include.errors import BadRecipe, NotFound
from include.paths import recipe_files
from include.recipe.schema import Recipe, describe_error


def validate_recipe(values: dict[str, Any], where: str) -> Recipe:
    """The values as a recipe.

    Raises:
        BadRecipe: names every wrong field, its value and what is expected there.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise BadRecipe(
            f"{where}: " + "; ".join(describe_error(e) for e in error.errors()), "Correct it and run again"
        ) from None


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, with the values given at trigger time in place of the file's.

    Raises:
        NotFound: there is no such file.
        BadRecipe: the file is not YAML, or a field is unknown, of the wrong type or out of range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"the recipe file {path} cannot be read ({error.strerror})", "Check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise BadRecipe(f"{path} is not a YAML file: {problem}", "Correct the line it names") from None
    if not isinstance(values, dict):
        raise BadRecipe(f"{path} holds no fields", "Write `field: value` lines, see include/recipes/demo.yaml")
    if (overrides or {}).get("sweep") and not values.get("sweep"):
        raise BadRecipe(
            f"{path}: field 'sweep': the file has none, so its DAG trains one candidate",
            "Write a sweep into the file; then other values may be given for a run",
        )
    return validate_recipe({"name": path.stem, **values, **(overrides or {})}, str(path))


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """`field=value` texts as typed values, read as YAML reads them.

    Raises:
        BadRecipe: a text has no equals sign, or its value is not YAML.
    """
    values = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        try:
            values[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise BadRecipe(f"'{pair}' is not field=value", "Write for example --set max_steps=20")
    return values


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe that is given by name, or by path.

    Raises:
        NotFound: lists the recipes that there are.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path).resolve()
        if path.is_file():
            return path
        raise NotFound(f"there is no recipe file {path}", "Check the path")
    files = {file.stem: file for file in recipe_files()}
    if name_or_path not in files:
        raise NotFound(f"there is no recipe '{name_or_path}'", f"Choose one of: {', '.join(sorted(files))}; or a path")
    return files[name_or_path]
