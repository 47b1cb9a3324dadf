"""JSON schemas in a recipe (`expect_json`): check a schema, and validate an answer against it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson
from jsonschema_specifications import REGISTRY

FENCE = re.compile(r"```\w*\s*\n(.*?)\n?\s*```", re.DOTALL)


def check_schema(schema: dict[str, Any]) -> None:
    """Check that a value is a JSON schema (of the draft in its `$schema`, by default 2020-12) without external parts.

    Raises:
        ValueError: it is not; the message says where.
    """
    from jsonschema import SchemaError
    from referencing import Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    if not isinstance(schema.get("$schema", ""), str):
        raise ValueError(f"not a JSON schema: its $schema is {schema['$schema']!r}")
    try:
        _validator(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON schema: at {error.json_path} {error.message}") from None
    resolver = REGISTRY.resolver_with_root(Resource.from_contents(schema, DRAFT202012))
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise ValueError(f"not a complete JSON schema: it refers to '{reference}', which is not in it") from None


def problem(schema: dict[str, Any], text: str) -> str | None:
    """Return why a text is not JSON that is valid for the schema, as a sentence; None if it is valid.

    Args:
        schema: see `check_schema`.
        text: JSON, or JSON in one ``` fence with nothing around it.
    """
    from jsonschema.exceptions import best_match

    fenced = FENCE.fullmatch(text.strip())
    try:
        value = orjson.loads(fenced.group(1) if fenced else text)
    except orjson.JSONDecodeError as error:
        return f"it is not JSON (line {error.lineno}, column {error.colno})"
    broken = best_match(_validator(schema).iter_errors(value))
    return f"its JSON is not valid for the schema at {broken.json_path}: {broken.message}" if broken else None


def _validator(schema: dict[str, Any]) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    # with a registry, jsonschema fetches no references from the network
    return validator_for(schema, Draft202012Validator)(schema, registry=REGISTRY)


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _references(inner)
