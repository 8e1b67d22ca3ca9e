"""Answers of the real model that keep to what they have to, asked for as clients ask."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import aiohttp
import jsonschema
import pytest

from tests import schemas
from tests.default_model import MODEL, STANDS_IN
from tests.e2e.conftest import Server, serving

TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
SCHEMAS = 200
MOST_TOKENS = 256


@pytest.fixture(scope="module")
def wide() -> Iterator[Server]:
    """A server whose engine answers eight at a time."""
    with serving("--slots=8", "--context=1024", f"--queue={SCHEMAS}") as running:
        yield running


async def answers(server: Server, bodies: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each chat's text and finish reason, all of them asked for at once."""
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(None)) as http:

        async def ask(body: dict[str, Any]) -> tuple[str, str]:
            async with http.post("/v1/chat/completions", json={"model": MODEL, "seed": 7, **body}) as response:
                told = await response.json()
                assert response.status == 200, (told, body)
            choice = told["choices"][0]
            return choice["message"]["content"], choice["finish_reason"]

        return await asyncio.gather(*map(ask, bodies))


def chat(question: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": MOST_TOKENS, **fields}


@pytest.mark.timeout(900)
async def test_answers_that_finish_fit_their_schemas_at_every_temperature(wide: Server) -> None:
    documents = [schemas.schema(seed) for seed in range(SCHEMAS)]
    bodies = [
        chat(
            f"Make up a JSON document that fits this schema: {json.dumps(document)[:600]}",
            temperature=TEMPERATURES[seed % len(TEMPERATURES)],
            response_format={"type": "json_schema", "json_schema": {"name": "made-up", "strict": True, "schema": document}},
        )
        for seed, document in enumerate(documents)
    ]
    told = await answers(wide, bodies)
    assert {finish for _, finish in told} <= {"stop", "length"}
    finished = 0
    for document, (text, finish) in zip(documents, told, strict=True):
        if finish == "stop":
            finished += 1
            value = json.loads(text.replace('"0000-', '"0004-'))  # RFC 3339 has a year 0, Python has none
            jsonschema.Draft202012Validator(document, format_checker=jsonschema.FormatChecker()).validate(value)
    assert finished > (0.25 if STANDS_IN else 0.75) * SCHEMAS  # at a temperature of 2, numbers can have any number of digits


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_choices_expressions_and_grammars(wide: Server, temperature: float) -> None:
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("Is the sky blue?", {"guided_choice": ["yes", "no", "per|haps"]}, r"yes|no|per\|haps"),
        ("A phone number?", {"guided_regex": r"\+49 [0-9]{3} [0-9]{6}"}, r"\+49 \d{3} \d{6}"),
        ("A sum?", {"guided_grammar": 'start: N ("+" N){1,3}\nN: /[1-9][0-9]{0,2}/'}, r"\d+(\+\d+){1,3}"),
        ("A flag?", {"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
    ]
    told = await answers(wide, [chat(question, temperature=temperature, **wish) for question, wish, _ in asked])
    for (_, _, pattern), (text, finish) in zip(asked, told, strict=True):
        assert re.fullmatch(pattern, text), text
        assert finish == "stop"


async def test_any_json_object(wide: Server) -> None:
    ((text, finish),) = await answers(
        wide, [chat("Give me a person as JSON.", temperature=0, response_format={"type": "json_object"})]
    )
    assert text.startswith("{")
    assert finish == "length" or isinstance(json.loads(text), dict)


TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book a table.",
        "parameters": {
            "type": "object",
            "properties": {
                "guests": {"type": "integer", "minimum": 1, "maximum": 12},
                "place": {"type": "string", "maxLength": 24},
                "near": {"$ref": "#/$defs/place"},
            },
            "required": ["guests", "place"],
            "additionalProperties": False,
            "$defs": {
                "place": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "maxLength": 12}, "in": {"$ref": "#/$defs/place"}},
                    "additionalProperties": False,
                }
            },
        },
    },
}
"""A schema that refers to itself."""
BROKEN = {"type": "object", "properties": {"a": {"type": "strange"}}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
async def test_calls_that_are_required_always_parse(wide: Server, choice: Any) -> None:
    async with aiohttp.ClientSession(wide.url) as http:
        for temperature in TEMPERATURES:
            body = chat("A table for four in Ulm, please.", temperature=temperature, tools=[TOOL], tool_choice=choice, seed=3)
            async with http.post("/v1/chat/completions", json={"model": MODEL, **body}) as response:
                assert response.status == 200
                answer = (await response.json())["choices"][0]
            if answer["finish_reason"] == "length":  # the places may be in places without end
                continue
            assert answer["finish_reason"] == "tool_calls"
            for call in answer["message"]["tool_calls"]:
                assert call["function"]["name"] == "book"
                parameters: Any = TOOL["function"]["parameters"]  # type: ignore[index]
                jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": {"type": "array", "contains": {}}}, "guided_json"),
        ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "endless",
                        "schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
                    },
                }
            },
            "response_format",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": BROKEN}}], "tool_choice": "required"},
            "tools",
        ),
    ],
)
async def test_what_no_answer_can_keep_to_is_refused_with_the_reason(wide: Server, wish: dict[str, Any], param: str) -> None:
    async with aiohttp.ClientSession(wide.url) as http:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with http.post("/v1/chat/completions", json={"model": MODEL, **chat("Well?"), **wish}) as response:
            told = await response.json()
        assert (response.status, told["error"]["param"]) == (400, param), told
        assert len(told["error"]["message"]) > 40
        assert loop.time() - begin < 100
    ((text, _),) = await answers(wide, [chat("Say yes.", guided_choice=["yes"])])
    assert text == "yes"


@pytest.mark.parametrize("pattern", ["(a{1,1000}){1,1000}", "((a{1,1000}){1,1000}){1,1000}b", "(?:a|aa|aaa|aaaa)*b" * 400])
async def test_a_bomb_is_answered_in_bounded_time(wide: Server, pattern: str) -> None:
    async with aiohttp.ClientSession(wide.url) as http:
        begin = asyncio.get_running_loop().time()
        async with http.post(
            "/v1/chat/completions", json={"model": MODEL, **chat("Well?"), "guided_regex": pattern}
        ) as response:
            told = await response.json()
        assert response.status in (200, 400, 503), told
        if response.status == 400:
            assert told["error"]["param"] == "guided_regex" or told["error"]["code"] == "constraint_unmet"
        assert asyncio.get_running_loop().time() - begin < 100
    wide.wait("engineshed_requests_running", 0)
