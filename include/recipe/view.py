"""A recipe of which a reader sees only the fields that it declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, cast

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from include.errors import UndeclaredField
from include.recipe.schema import Recipe


class RecipeView:
    """Some fields of a recipe, read as attributes like those of the recipe itself.

    Make one with `RecipeView.of`, which returns it as a `Recipe`, so that mypy checks the names that are read.

    Args:
        values: the fields that may be read, by name.
        reader: who reads them, for the error's message.
    """

    __slots__ = ("_reader", "_values")

    def __init__(self, values: Mapping[str, Any], reader: str):
        self._values, self._reader = dict(values), reader

    @classmethod
    def of(cls, recipe: Recipe, fields: Iterable[str], reader: str) -> Recipe:
        """Return a view of a recipe, or of another view.

        Raises:
            UndeclaredField: the other view does not hold one of the fields.
        """
        return cast(Recipe, cls({name: getattr(recipe, name) for name in fields}, reader))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], reader: str) -> Recipe:
        """Return the view that `to_json` serialized, each field with the type that the recipe declares.

        Raises:
            pydantic.ValidationError: a value is wrong for its field.
            KeyError: the recipe has no such field.
        """
        fields = Recipe.model_fields
        typed = {
            name: TypeAdapter(fields[name].rebuild_annotation()).validate_python(value)
            for name, value in values.items()
        }
        return cast(Recipe, cls(typed, reader))

    def __getattr__(self, name: str) -> Any:
        """Return a field's value.

        Raises:
            UndeclaredField: the recipe has this field, but the view does not.
            AttributeError: the recipe has no such field.
        """
        if name in RecipeView.__slots__:  # an instance that copy or pickle has not filled yet
            raise AttributeError(name)
        if name in self._values:
            return self._values[name]
        if name in Recipe.model_fields:
            raise UndeclaredField(
                f"{self._reader} reads the recipe field '{name}', which its recipe_fields do not name",
                "Add the field there: otherwise a change of it would reuse an artifact made with the old value",
            )
        raise AttributeError(f"a recipe view has no attribute '{name}'")

    def __repr__(self) -> str:
        return f"RecipeView({self._values!r}, {self._reader!r})"

    def subset(self, fields: Iterable[str]) -> dict[str, Any]:
        """Return the named fields as plain JSON values.

        Raises:
            UndeclaredField: the view does not hold one of them.
        """
        return RecipeView.of(cast(Recipe, self), fields, self._reader).to_json()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return Recipe.model_construct(**self._values).model_dump(mode="json", include=set(self._values))


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe, or those that a view of it holds, as plain JSON values."""
    return recipe.to_json() if isinstance(recipe, RecipeView) else recipe.model_dump(mode="json")


def _as_recipe(value: Any) -> Any:
    if isinstance(value, Recipe | RecipeView):
        return value
    if isinstance(value, Mapping):
        return RecipeView.from_json(value, "the engine")
    raise ValueError("not a recipe")


# A field of a pydantic model that holds a recipe or a view of one; read from JSON it is always a view.
AnyRecipe = Annotated[Recipe, PlainValidator(_as_recipe), PlainSerializer(recipe_to_json)]
