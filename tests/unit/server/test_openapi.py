"""The description of the interface: it is valid, and it is of this application."""

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from server import app
from server.api.bodies import GenerateBody
from server.api.openai.bodies import ChatBody, CompletionBody
from server.api.openapi import OPERATIONS, Schema, document
from tests.unit.server.house import House


def test_it_is_valid_openapi() -> None:
    validate(document(), cls=OpenAPIV31SpecValidator)


async def test_it_has_every_route_of_the_application_and_nothing_else(house: House) -> None:
    routes = app.build(house.service).router.routes()
    served = {(route.method, route.resource.canonical) for route in routes if route.resource is not None}
    described = {(method.upper(), path) for path, item in document()["paths"].items() for method in item}
    assert described == {route for route in served if route[0] != "HEAD"}


def test_no_two_operations_share_a_name() -> None:
    names = [operation.id for operation in OPERATIONS.values()]
    assert len(names) == len(set(names))


async def test_it_is_served(house: House) -> None:
    async with house.http.get("/openapi.json") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.json() == document()


def test_the_numbers_of_engines_say_nothing_of_who_asked_for_them() -> None:
    assert "number" not in document()["components"]["schemas"]["Heartbeat"]["properties"]


@pytest.mark.parametrize("type_", [ChatBody, CompletionBody, GenerateBody])
def test_a_body_has_the_fields_that_are_read(type_: type[msgspec.Struct]) -> None:
    properties = document()["components"]["schemas"][type_.__name__]["properties"]
    assert set(properties) == {field.encode_name for field in msgspec.structs.fields(type_)}


def test_the_limits_of_values_are_in_it() -> None:
    properties: dict[str, Schema] = document()["components"]["schemas"]["ChatBody"]["properties"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in properties["temperature"]["anyOf"]
    assert {"type": "integer", "minimum": 1} in properties["max_tokens"]["anyOf"]


@pytest.mark.parametrize("operation", ["/healthz", "/readyz"])
def test_what_needs_no_key_says_so(operation: str) -> None:
    described = document()["paths"][operation]["get"]
    assert "security" not in described
    assert "401" not in described["responses"]


@pytest.mark.parametrize(("status", "header"), [("429", "Retry-After"), ("503", "Retry-After"), ("401", "WWW-Authenticate")])
def test_an_error_names_the_header_that_says_what_to_do(status: str, header: str) -> None:
    assert header in document()["paths"]["/v1/generate"]["post"]["responses"][status]["headers"]
