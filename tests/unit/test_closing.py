"""Objects get no properties that their schema does not name."""

from typing import Any

import jsonschema
import pytest

from server.closing import closed
from tests import schemas

NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_an_object_that_names_its_properties_is_closed_at_every_depth() -> None:
    schema = {
        "type": "object",
        "properties": {"one": NAMED, "many": {"type": "array", "items": NAMED}, "either": {"anyOf": [NAMED, {"type": "null"}]}},
        "$defs": {"other": NAMED},
    }
    made = closed(schema)
    places = [
        made,
        made["properties"]["one"],
        made["properties"]["many"]["items"],
        made["properties"]["either"]["anyOf"][0],
        made["$defs"]["other"],
    ]
    assert all(place["additionalProperties"] is False for place in places)
    assert "additionalProperties" not in schema, "what the client sent stays as it is"
    assert "additionalProperties" not in NAMED


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}},
        NAMED | {"additionalProperties": True},
        NAMED | {"additionalProperties": {"type": "string"}},
        NAMED | {"patternProperties": {"^x": {}}},
        NAMED | {"minProperties": 2},
        NAMED | {"required": ["b"]},
        {"allOf": [NAMED, {"type": "object", "properties": {"b": {}}}]},
        NAMED | {"anyOf": [{"type": "object", "properties": {"b": {}}}]},
        {"properties": {"x": {"$ref": "#/$defs/n", "properties": {"b": {}}}}, "$defs": {"n": NAMED}},
        {"const": NAMED},
        {"properties": NAMED["properties"], "not": {"required": ["a"]}},
        True,
        [],
        {"properties": 7, "items": 7, "anyOf": 7},
    ],
)
def test_what_speaks_of_others_or_is_described_in_several_places_stays(schema: Any) -> None:
    assert closed(schema) == schema


def test_a_property_may_be_called_like_a_keyword() -> None:
    made = closed({"type": "object", "properties": {"allOf": {"type": "string"}, "not": {"type": "string"}}})
    assert made["additionalProperties"] is False


def opened(part: Any) -> Any:
    """A schema without its words on further properties."""
    if isinstance(part, list):
        return [opened(each) for each in part]
    if isinstance(part, dict):
        return {key: opened(value) for key, value in part.items() if key != "additionalProperties"}
    return part


def test_what_is_made_is_a_schema_and_closed() -> None:
    changed = 0
    for seed in range(300):
        schema = opened(schemas.schema(seed))
        made = closed(schema)
        changed += made != schema
        jsonschema.Draft202012Validator.check_schema(made)
        assert closed(made) == made
    assert changed > 100
