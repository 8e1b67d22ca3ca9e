"""JSON schemas whose objects have the properties that are named, and no others.

A schema that says nothing of further properties allows them, and hardly anybody means it: a small model that may invent more
and more of them does, until max_tokens. OpenAI wants `additionalProperties: false` written out where a schema is strict, vLLM's
grammars assume it, and so does this server. What fits the closed schema fits the one that the client sent.
"""

from collections.abc import Iterator
from typing import Any

_ONE = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_COMPOSING = frozenset(("allOf", "if", "then", "else", "not", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"))
_ELSEWHERE = frozenset(("anyOf", "oneOf", "$ref"))
_OPENING = _ELSEWHERE | {"additionalProperties", "patternProperties", "propertyNames", "minProperties"}


def closed(schema: Any) -> Any:
    """`schema` with `additionalProperties: false` in every object that names its properties and says nothing of others.

    A schema that describes one object in several places is left as it is: each would forbid what the others name.
    """
    return schema if any(map(_composes, _within(schema))) else _closed(schema)


def _within(schema: Any) -> Iterator[dict[str, Any]]:
    """`schema` and all schemas in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for part in _parts(schema):
        yield from _within(part)


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    for key in _ONE:
        yield schema.get(key)
    for key in _LISTS:
        yield from parts if isinstance(parts := schema.get(key), list) else ()
    for key in _MAPS:
        yield from parts.values() if isinstance(parts := schema.get(key), dict) else ()


def _composes(schema: dict[str, Any]) -> bool:
    """Whether it describes one value in several places."""
    elsewhere = len(_ELSEWHERE & schema.keys())
    return bool(_COMPOSING & schema.keys()) or elsewhere > 1 or bool(elsewhere and "properties" in schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in _ONE:
        if key in schema:
            made[key] = _closed(schema[key])
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            made[key] = [_closed(part) for part in schema[key]]
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            made[key] = {name: _closed(part) for name, part in schema[key].items()}
    if _is_closed(schema):
        made["additionalProperties"] = False
    return made


def _is_closed(schema: dict[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not properties or not isinstance(required, list) or _OPENING & schema.keys():
        return False
    return all(isinstance(name, str) and name in properties for name in required)
