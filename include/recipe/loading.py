"""Recipe files: find them, load them, apply the values given at trigger time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from include.errors import BadRecipe, NotFound, RetuneError
from include.paths import recipe_files
from include.recipe.schema import Recipe, describe_error

RESERVED = ("maintenance", "rollback")  # names of Retune's own DAGs, which a recipe's DAG would replace


def validate_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Return the values as a recipe.

    Args:
        values: fields by name.
        where: source of the values, for the error message.

    Raises:
        BadRecipe: names every wrong field, its value and what is expected.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise BadRecipe(
            f"{where}: " + "; ".join(describe_error(e) for e in error.errors()), "Correct it and run again"
        ) from None


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe file.

    Args:
        path: a YAML file. Its name without the extension is the name of the recipe.
        overrides: values given at trigger time, which replace those of the file.

    Raises:
        NotFound: there is no such file.
        BadRecipe: the file is not YAML; a field is unknown, of the wrong type or out of range; the name is reserved, or
            the field `name` differs from it.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"the recipe file {path} cannot be read ({error.strerror})", "Check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise BadRecipe(f"{path} is not a YAML file: {message}", "Correct the line that the message names") from None
    if not isinstance(values, dict):
        raise BadRecipe(f"{path} has no fields", "Write `field: value` lines, see include/recipes/demo.yaml")
    if path.stem in RESERVED:
        raise BadRecipe(f"{path}: the name '{path.stem}' is reserved for Retune's DAG {path.stem}", "Rename the file")
    if (overrides or {}).get("sweep") and not values.get("sweep"):
        raise BadRecipe(
            f"{path}: field 'sweep': the file has none, so its DAG trains one candidate",
            "Write a sweep into the file; a run may then change its values",
        )
    recipe = validate_recipe({"name": path.stem, **values, **(overrides or {})}, str(path))
    if recipe.name != path.stem:
        raise BadRecipe(
            f"{path}: field 'name': a recipe is called like its file, '{path.stem}', got '{recipe.name}'",
            f"Remove the field, or rename the file to {recipe.name}{path.suffix}",
        )
    return recipe


def load_all() -> dict[str, Recipe | RetuneError]:
    """Load every recipe file.

    Returns:
        By the id of its DAG, each recipe, or the error that explains why there is none: the file is not a valid recipe,
        or several files have the same name. No id is one of `RESERVED`.
    """
    files: dict[str, list[Path]] = {}
    for file in recipe_files():
        dag_id = "".join(c if c.isalnum() or c in "._-" else "_" for c in file.stem)
        files.setdefault(file.name if file.stem in RESERVED else dag_id, []).append(file)
    return {dag_id: _load_or_error(same_name) for dag_id, same_name in files.items()}


def _load_or_error(files: list[Path]) -> Recipe | RetuneError:
    try:
        _refuse_duplicates(files)
        return load_recipe(files[0])
    except RetuneError as error:
        return error


def _refuse_duplicates(files: list[Path]) -> None:
    if len(files) > 1:
        raise BadRecipe(
            f"{len(files)} recipe files have the name '{files[0].stem}': {', '.join(map(str, files))}",
            "Rename all but one of them, or remove them from RETUNE_RECIPES",
        )


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `field=value` texts. Values are parsed as YAML.

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
    """Return the file of a recipe, given by its name or by a path that ends in .yaml or .yml.

    Raises:
        NotFound: there is no such recipe; the message lists all recipes.
        BadRecipe: several recipe files have this name; the message lists them.
    """
    files = recipe_files()
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path).resolve()
        if not path.is_file():
            raise NotFound(f"there is no recipe file {path}", "Check the path")
        others = [file for file in files if file.stem == path.stem and file.resolve() != path]
        _refuse_duplicates([path, *others])
        return path
    found = [file for file in files if file.stem == name_or_path]
    if not found:
        names = ", ".join(sorted({file.stem for file in files}))
        raise NotFound(f"there is no recipe '{name_or_path}'", f"Choose one of: {names}; or a path")
    _refuse_duplicates(found)
    return found[0]
