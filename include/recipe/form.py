"""The trigger form of a recipe."""

from __future__ import annotations

from typing import Any

from include.recipe.schema import SECTIONS, Recipe


def form(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For each field: its value in this recipe, and the JSON schema and section that the trigger form shows.

    The schema is pydantic's own, with `anyOf [X, null]` folded into `type: [X, null]`, which the form understands.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    values = recipe.model_dump(mode="json")
    fields = {}
    for section, model in SECTIONS.items():
        for name in model.model_fields:
            if name == "sweep" and not recipe.sweep:
                continue  # the DAG of such a recipe has one train task, not a mapped one
            entry = dict(schema["properties"][name])
            if "anyOf" in entry:
                kinds = entry.pop("anyOf")
                for kind in kinds:
                    entry.update({key: value for key, value in kind.items() if key != "type"})
                entry["type"] = [kind["type"] for kind in kinds]
            if entry.get("items", {}).get("$ref"):
                entry["items"] = definitions[entry["items"]["$ref"].rsplit("/", 1)[-1]]
            entry.pop("default", None)
            entry["description_md"] = entry.pop("description")
            fields[name] = {"value": values[name], "section": section, "schema": {**entry, "title": name}}
    return fields
