"""Google's `Schema`, a subset of OpenAPI 3.0's with types in capitals, as a JSON schema.

https://ai.google.dev/api/caching#Schema
"""

from typing import Any

from server.errors import ApiError, bad_request

DEEPEST = 64
"""Schemas inside one another."""

_TYPES = {name.upper(): name for name in ("string", "number", "integer", "boolean", "array", "object", "null")}
_FORMATS = frozenset(("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"))
"""Formats of strings that JSON schema has; Google's others, such as int32 and enum, say nothing that the type does not."""
_AS_THEY_ARE = ("title", "description", "enum", "required", "pattern", "minimum", "maximum", "$ref")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def json_schema(schema: Any, *, of: str, depth: int = 0) -> dict[str, Any]:
    """`schema`, which the body's field `of` holds, as a JSON schema. Raises ApiError 400.

    An object has no properties but those that are named. Names may be in camelCase or in snake_case. What has no meaning for an
    answer's form (`example`, `default`) is left out.
    """
    if not isinstance(schema, dict):
        raise _wrong(of, "expected an object")
    if depth > DEEPEST:
        raise _wrong(of, f"more than {DEEPEST} schemas are inside one another")
    given = {_NAMES.get(name, name): value for name, value in schema.items()}
    made = {name: given[name] for name in _AS_THEY_ARE if given.get(name) is not None}
    made |= {name: _count(given[name], f"{of}.{name}") for name in _COUNTS if given.get(name) is not None}
    if (type_ := given.get("type")) is not None:
        made["type"] = _type(type_, f"{of}.type")
    if given.get("format") is not None:
        format = _kind(given["format"], str, f"{of}.format", "a text")
        made |= {"format": format} if made.get("type") == "string" and format in _FORMATS else {}

    def inner(name: str, value: Any) -> dict[str, Any]:
        return json_schema(value, of=f"{of}.{name}", depth=depth + 1)

    if given.get("items") is not None:
        made["items"] = inner("items", given["items"])
    for name in ("anyOf", "prefixItems"):
        if given.get(name) is not None:
            listed = _kind(given[name], list, f"{of}.{name}", "a list")
            made[name] = [inner(f"{name}[{index}]", each) for index, each in enumerate(listed)]
    for name in ("properties", "$defs"):
        if given.get(name) is not None:
            named = _kind(given[name], dict, f"{of}.{name}", "an object")
            made[name] = {key: inner(f"{name}.{key}", each) for key, each in named.items()}
    if (others := given.get("additionalProperties")) is not None:
        made["additionalProperties"] = others if isinstance(others, bool) else inner("additionalProperties", others)
    elif "properties" in made:
        made["additionalProperties"] = False  # Google's answers have the properties that are named and no others.
    if (order := given.get("propertyOrdering")) is not None and "properties" in made:
        _order(made, _kind(order, list, f"{of}.propertyOrdering", "a list"))
    return _nullable(made) if given.get("nullable") is True else made


_NAMES = {
    "min_items": "minItems",
    "max_items": "maxItems",
    "min_length": "minLength",
    "max_length": "maxLength",
    "min_properties": "minProperties",
    "max_properties": "maxProperties",
    "any_of": "anyOf",
    "prefix_items": "prefixItems",
    "additional_properties": "additionalProperties",
    "property_ordering": "propertyOrdering",
    "defs": "$defs",
    "ref": "$ref",
}


def _type(value: Any, of: str) -> str:
    if not isinstance(value, str) or value.upper() not in _TYPES:
        raise _wrong(of, f"it is one of {', '.join(_TYPES)}")
    return _TYPES[value.upper()]


def _count(value: Any, of: str) -> int:
    """A number of 64 bits, which Google's JSON may write as a string."""
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _wrong(of, "expected a whole number that is not negative")
    return int(text)


def _kind(value: Any, kind: type, of: str, called: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong(of, f"expected {called}")
    return value


def _order(schema: dict[str, Any], order: list[Any]) -> None:
    """Have the properties in `order`, in which an answer then gives them."""
    properties = schema["properties"]
    first = {name: properties[name] for name in order if isinstance(name, str) and name in properties}
    schema["properties"] = first | {name: each for name, each in properties.items() if name not in first}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") is None:
        return {"anyOf": [schema, {"type": "null"}]}
    made = schema | {"type": [schema["type"], "null"]}
    if isinstance(made.get("enum"), list):
        made["enum"] = [*made["enum"], None]
    return made


def _wrong(of: str, reason: str) -> ApiError:
    return bad_request(f"The value of {of!r} is wrong: {reason}.", of)
