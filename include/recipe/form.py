"""The trigger form of a recipe, made from the schema."""

from __future__ import annotations

from typing import Any

from include.recipe.schema import SECTIONS, Recipe


def form(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the fields of the trigger form.

    The JSON schema of a field is pydantic's, with `anyOf [X, null]` changed to `type: [X, null]`, which Airflow's form
    supports.

    Returns:
        By field: `value` (in this recipe), `section` (heading in the form), `schema` (JSON schema).
    """
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    values = recipe.model_dump(mode="json")
    fields = {}
    for section, model in SECTIONS.items():
        for name in model.model_fields:
            if name == "sweep" and not recipe.sweep:
                continue  # without a sweep, the DAG has one train task, not a mapped one
            entry = dict(schema["properties"][name])
            if "anyOf" in entry:
                alternatives = entry.pop("anyOf")
                for alternative in alternatives:
                    entry.update({key: value for key, value in alternative.items() if key != "type"})
                entry["type"] = [alternative["type"] for alternative in alternatives]
            if entry.get("items", {}).get("$ref"):
                entry["items"] = definitions[entry["items"]["$ref"].rsplit("/", 1)[-1]]
            if isinstance(values[name], str) and "\n" in values[name]:
                entry["format"] = "multiline"  # Airflow's field of one line would drop the line breaks
                entry.pop("examples", None)
            entry.pop("default", None)
            entry["description_md"] = entry.pop("description")
            fields[name] = {"value": values[name], "section": section, "schema": {**entry, "title": name}}
    return fields
