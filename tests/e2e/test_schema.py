"""Whatever is sent to a route, the answer is one that `/openapi.json` announces.

Schemathesis makes the requests from the document, right ones and wrong ones. Over a tiny model, whose answers take no time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from export.recipe import Build
from server import keys
from server.api.generate import NDJSON
from server.api.openapi import SSE, document
from tests import tiny
from tests.e2e.conftest import Server, serving

DOCUMENT = document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
"""All that the document promises; not that everything of the right form is taken, as a prompt may not fit the context."""


KEY: dict[str, str] = {}
"""An admin's, so that requests come as far as they can."""


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    engines = tmp_path_factory.mktemp("schema") / "engines"
    bundle = tiny.exporting(engines, verify=False).run(tiny.recipe(tiny_model, Build("cpu", "fp32")))
    entry, key = keys.new("schema", admin=True)
    path = engines.parent / "keys.toml"
    keys.update(path, lambda others: [*others, entry])
    KEY["Authorization"] = f"Bearer {key}"
    with serving(f"--model={bundle}", "--context=64", "--log-level=warning", f"--keys={path}") as running:
        yield running


@SCHEMA.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_announced(case: schemathesis.Case[Any], tiny_server: Server) -> None:
    response = case.call(base_url=tiny_server.url, timeout=20, headers=KEY)
    # What has too many items is mostly too large, too: it is refused for that, which schemathesis does not know as a refusal.
    too_large: list[Any] = [negative_data_rejection] if response.status_code == 413 else []
    case.validate_response(response, checks=CHECKS, excluded_checks=too_large)
    media = response.headers.get("content-type", [""])[0].partition(";")[0]
    if response.status_code == 200 and media in (SSE, NDJSON):
        item = case.operation.definition.raw["responses"]["200"]["content"][media]["x-item-schema"]
        for piece in pieces(response.text, media):
            jsonschema_rs.validate({**item, "components": DOCUMENT["components"]}, piece)


def pieces(text: str, media: str) -> Iterator[Any]:
    """The objects of a stream."""
    for line in text.split("\n"):
        if media == SSE and not line.startswith("data: "):
            continue  # an event's name, or the line behind it
        data = line.removeprefix("data: ") if media == SSE else line
        if data and data != "[DONE]":
            yield json.loads(data)
