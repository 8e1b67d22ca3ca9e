"""Google's Gemini API: what it asks for, what is answered, and errors in its shape."""

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web

from runtime.messages import Generate, Progress, Row
from server import app, keys
from server.access import Access
from server.api.google.bodies import GenerateContentBody, normal
from server.api.google.gemini import Array, _Writer, chat
from server.api.google.schema import json_schema
from server.asked import Asked, SamplingParams
from server.errors import ApiError
from server.generation import Piece, PromptDetails, Usage
from server.keys import Keys
from server.tools import Arguments, CallEnded, CallStarted
from tests.unit.server.events import named
from tests.unit.server.house import House

MODEL = "/v1beta/models/tiny"
HI: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
WEATHER = {"name": "weather", "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}}
TOOLS = {"tools": [{"functionDeclarations": [WEATHER, {"name": "clock"}]}]}
ASKED = Asked()


def body(**fields: Any) -> GenerateContentBody:
    return msgspec.convert(normal({**HI, **fields}), GenerateContentBody)


async def whole(house: House, fields: dict[str, Any], *says: tuple[str, Any]) -> tuple[dict[str, Any], Generate]:
    asking = asyncio.ensure_future(house.http.post(f"{MODEL}:generateContent", json={**HI, **fields}))
    request = await house.worker.next(Generate)
    for text, finish in says:
        await house.worker.say(request, text, finish, cached=3)
    async with await asking as answer:
        assert answer.status == 200, await answer.text()
        told: dict[str, Any] = await answer.json()
        return told, request


async def refused(house: House, fields: Any, path: str = f"{MODEL}:generateContent", method: str = "POST") -> tuple[int, Any]:
    async with house.http.request(method, path, json=fields) as response:
        answer = await response.json()
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"code", "message", "status"}
        assert answer["error"]["code"] == response.status
        return response.status, answer["error"]


def written(*pieces: Piece, **fields: Any) -> list[dict[str, Any]]:
    """The array of a stream of these pieces."""
    choices = cast(Any, SimpleNamespace(usage=Usage(7, 5, 12, PromptDetails(3)), count=1))
    form = Array(_Writer(cast(Any, SimpleNamespace(name="tiny")), body(**fields), choices))
    made: list[dict[str, Any]] = json.loads(form.begin() + b"".join(map(form.piece, pieces)) + form.end(choices))
    return made


# What is asked for -------------------------------------------------------------------------------------------------


def test_names_may_be_in_either_case_but_for_those_that_are_the_clients_own() -> None:
    camel = {
        "systemInstruction": {"parts": [{"text": "snake_case stays"}]},
        "generationConfig": {"maxOutputTokens": 5, "topK": 3.0, "responseMimeType": "text/plain"},
        "tools": [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": {"properties": {"my_key": {}}}}]}],
    }
    snake = {
        "system_instruction": {"parts": [{"text": "snake_case stays"}]},
        "generation_config": {"max_output_tokens": 5.0, "top_k": 3, "response_mime_type": "text/plain"},
        "tools": [{"function_declarations": [{"name": "f", "parameters_json_schema": {"properties": {"my_key": {}}}}]}],
    }
    assert body(**camel) == body(**snake)
    assert body(**snake).config.top_k == 3
    assert chat(body(**snake), ASKED).tools[0].parameters == {"properties": {"my_key": {}}}


def test_contents_are_the_turns_of_a_chat_and_results_find_their_calls() -> None:
    contents = [
        {"parts": [{"text": "hi"}]},
        {
            "role": "model",
            "parts": [
                {"text": "hm", "thought": True},
                {"text": "I "},
                {"text": "look."},
                {"functionCall": {"name": "weather", "args": {"city": "Bern"}}},
                {"functionCall": {"name": "weather", "args": {"city": "Rom"}, "id": "mine"}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "weather", "response": {"output": "warm"}, "id": "mine"}},
                {"functionResponse": {"name": "weather", "response": {"output": "cold"}}},
                {"text": "And?"},
                {"text": "Well?"},
            ],
        },
    ]

    def call(id: str, arguments: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}

    def result(id: str, content: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": id, "name": "weather", "content": content}

    asked = chat(body(contents=contents, systemInstruction={"parts": [{"text": "Be"}, {"text": "brief."}]}), ASKED)
    assert asked.messages == [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [call("call_0", '{"city": "Bern"}'), call("mine", '{"city": "Rom"}')],
        },
        result("mine", '{"output": "warm"}'),
        result("call_0", '{"output": "cold"}'),
        {"role": "user", "content": "And?\nWell?"},
    ]
    assert asked.fields.messages == "contents"


def test_a_turn_of_thoughts_alone_is_left_out_and_the_one_before_it_answered() -> None:
    thought = {"role": "model", "parts": [{"text": "hm", "thought": True}]}
    asked = chat(body(contents=[*HI["contents"], thought]), ASKED)
    assert asked.messages == [{"role": "user", "content": "hi"}]
    assert not asked.continue_final_message
    assert chat(body(contents=[*HI["contents"], {"role": "model", "parts": [{"text": "So"}]}]), ASKED).continue_final_message
    with pytest.raises(ApiError, match="nothing to answer"):
        chat(body(contents=[thought]), ASKED)


@pytest.mark.parametrize(
    ("calling", "wanted", "names"),
    [
        ({}, "auto", ["weather", "clock"]),
        ({"mode": "AUTO"}, "auto", ["weather", "clock"]),
        ({"mode": "NONE"}, "none", ["weather", "clock"]),
        ({"mode": "ANY"}, "required", ["weather", "clock"]),
        ({"mode": "ANY", "allowedFunctionNames": ["clock"]}, "required", ["clock"]),
    ],
)
def test_a_tool_config_says_which_functions_may_and_must_be_called(calling: Any, wanted: str, names: list[str]) -> None:
    asked = chat(body(**TOOLS, toolConfig={"functionCallingConfig": calling}), ASKED)
    assert (asked.choice, [tool.name for tool in asked.tools]) == (wanted, names)
    described = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}
    assert [tool.parameters for tool in asked.tools if tool.name == "weather"] == ([described] if "weather" in names else [])


def test_how_it_is_made_has_googles_names() -> None:
    config = {"temperature": 0.5, "topP": 0.9, "topK": 7, "candidateCount": 2, "maxOutputTokens": 5, "stopSequences": ["a"]}
    asked = body(generationConfig={**config, "seed": 3, "presencePenalty": 0.1, "frequencyPenalty": 0.2}).config.asked()
    assert asked.sampling == SamplingParams(
        temperature=0.5, top_k=7, top_p=0.9, seed=3, presence_penalty=0.1, frequency_penalty=0.2
    )
    assert (asked.count, asked.max_tokens, asked.limit) == (2, 5, "generationConfig.maxOutputTokens")
    assert asked.stops == ("a",)


@pytest.mark.parametrize(
    ("config", "kind", "source"),
    [
        ({}, "json_schema", {"type": "object"}),
        ({"responseSchema": {"type": "ARRAY", "items": {"type": "INTEGER"}}}, "json_schema", None),
        ({"responseJsonSchema": {"type": "array", "items": {"type": "integer"}}}, "json_schema", None),
    ],
)
def test_a_json_answer_is_a_constraint(config: Any, kind: str, source: Any) -> None:
    asked = body(generationConfig={"responseMimeType": "application/json", **config}).config.asked()
    assert asked.constraint is not None
    assert asked.constraint.kind == kind
    assert msgspec.json.decode(asked.constraint.source) == source or {"type": "array", "items": {"type": "integer"}}


@pytest.mark.parametrize(
    ("schema", "made"),
    [
        ({"type": "STRING", "format": "enum", "enum": ["a", "b"]}, {"type": "string", "enum": ["a", "b"]}),
        ({"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}),
        ({"type": "INTEGER", "format": "int32", "minimum": 1}, {"type": "integer", "minimum": 1}),
        ({"type": "STRING", "nullable": True}, {"type": ["string", "null"]}),
        ({"type": "STRING", "enum": ["a"], "nullable": True}, {"type": ["string", "null"], "enum": ["a", None]}),
        ({"anyOf": [{"type": "NULL"}], "nullable": True}, {"anyOf": [{"anyOf": [{"type": "null"}]}, {"type": "null"}]}),
        (
            {"type": "ARRAY", "min_items": "2", "maxItems": 3, "items": {}},
            {"type": "array", "minItems": 2, "maxItems": 3, "items": {}},
        ),
        (
            {"type": "OBJECT", "properties": {"min_items": {"type": "NUMBER"}}, "required": ["min_items"], "example": {}},
            {
                "type": "object",
                "properties": {"min_items": {"type": "number"}},
                "additionalProperties": False,
                "required": ["min_items"],
            },
        ),
        (
            {"type": "OBJECT", "additional_properties": {"type": "STRING"}},
            {"type": "object", "additionalProperties": {"type": "string"}},
        ),
        ({"any_of": [{"type": "BOOLEAN"}, {"type": "NULL"}]}, {"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
    ],
)
def test_googles_schema_is_a_json_schema(schema: Any, made: Any) -> None:
    assert json_schema(schema, of="s") == made


def test_the_order_of_properties_is_that_of_the_answer() -> None:
    schema = {"type": "OBJECT", "properties": {"a": {}, "b": {}, "c": {}}, "propertyOrdering": ["c", "a", "x"]}
    assert list(json_schema(schema, of="s")["properties"]) == ["c", "a", "b"]


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"type": "TUPLE"}, "s.type"),
        ({"type": 7}, "s.type"),
        ({"type": "STRING", "format": []}, "s.format"),
        ({"items": []}, "s.items"),
        ({"properties": {"a": 7}}, "s.properties.a"),
        ({"properties": []}, "s.properties"),
        ({"anyOf": [{}, {"minItems": -1}]}, "s.anyOf[1].minItems"),
        ({"maxLength": "many"}, "s.maxLength"),
        (nested(65), "s" + ".items" * 65),
    ],
)
def test_what_is_no_schema_is_refused_by_name(schema: Any, param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        json_schema(schema, of="s")
    assert (refusal.value.status, refusal.value.param) == (400, param)


# What is answered --------------------------------------------------------------------------------------------------


async def test_contents_are_answered_whole(house: House) -> None:
    fields = {
        "systemInstruction": {"parts": [{"text": "Be."}]},
        "generationConfig": {"maxOutputTokens": 9},
        "safetySettings": [],
    }
    answer, request = await whole(house, fields, ("Hello", None), (" you", "stop"))
    assert house.text.stream().push(request.prompt) == "s:Be.\nu:hi\na:"
    assert request.max_tokens == 9
    assert answer.pop("responseId")
    assert answer == {
        "candidates": [
            {"content": {"parts": [{"text": "Hello you"}], "role": "model"}, "finishReason": "STOP", "index": 0},
        ],
        "usageMetadata": {
            "promptTokenCount": 13,
            "candidatesTokenCount": 9,
            "totalTokenCount": 22,
            "cachedContentTokenCount": 3,
        },
        "modelVersion": "tiny",
    }


async def test_the_other_version_answers_the_same(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/models/tiny:generateContent", json=HI))
    await house.worker.say(await house.worker.next(Generate), "Hello", "stop")
    (candidate,) = (await (await asking).json())["candidates"]
    assert candidate["content"]["parts"] == [{"text": "Hello"}]
    status, error = await refused(house, {}, "/v1/models/tiny:countTokens")
    assert (status, error["status"]) == (400, "INVALID_ARGUMENT")


async def test_an_answer_that_reaches_its_limit_says_so(house: House) -> None:
    answer, _ = await whole(house, {"generationConfig": {"maxOutputTokens": 2}}, ("He", "length"))
    assert answer["candidates"][0]["finishReason"] == "MAX_TOKENS"


async def test_every_candidate_is_answered(house: House) -> None:
    asking = asyncio.ensure_future(
        house.http.post(f"{MODEL}:generateContent", json={**HI, "generationConfig": {"candidateCount": 2}})
    )
    for text in ("one", "two"):
        await house.worker.say(await house.worker.next(Generate), text, "stop")
    answer = await (await asking).json()
    found = [(candidate["index"], candidate["content"]["parts"][0]["text"]) for candidate in answer["candidates"]]
    assert found == [(0, "one"), (1, "two")]


async def test_logprobs_are_told(house: House) -> None:
    config = {"responseLogprobs": True, "logprobs": 1}
    asking = asyncio.ensure_future(house.http.post(f"{MODEL}:generateContent", json={**HI, "generationConfig": config}))
    request = await house.worker.next(Generate)
    assert request.top_logprobs == 1
    a, b = house.text.encode("ab")
    await house.worker.send(Progress([Row(request.id, [a, b], [-0.5, -3.0], "stop", tops=[[(a, -0.5)], [(a, -0.1)]])]))
    (candidate,) = (await (await asking).json())["candidates"]
    assert candidate["logprobsResult"] == {
        "chosenCandidates": [
            {"token": "a", "tokenId": a, "logProbability": -0.5},
            {"token": "b", "tokenId": b, "logProbability": -3.0},
        ],
        "topCandidates": [
            {"candidates": [{"token": "a", "tokenId": a, "logProbability": -0.5}]},
            {"candidates": [{"token": "a", "tokenId": a, "logProbability": -0.1}]},
        ],
    }


async def test_a_stream_is_an_array(house: House) -> None:
    response, request = await house.open(f"{MODEL}:streamGenerateContent", HI, "He")
    await house.worker.say(request, "llo", "stop")
    assert response.content_type == "application/json"
    first, last = await response.json()
    assert first["candidates"] == [{"content": {"parts": [{"text": "He"}], "role": "model"}, "index": 0}]
    assert last["candidates"][0]["finishReason"] == "STOP"
    assert first["responseId"] == last["responseId"]
    assert (first["usageMetadata"]["candidatesTokenCount"], last["usageMetadata"]["candidatesTokenCount"]) == (2, 5)


async def test_a_stream_may_be_server_sent_events(house: House) -> None:
    response, request = await house.open(f"{MODEL}:streamGenerateContent?alt=sse", HI, "He")
    await house.worker.say(request, "llo", "length")
    assert response.content_type == "text/event-stream"
    (_, first), (_, last) = named(await response.text())
    assert first["candidates"][0]["content"]["parts"] == [{"text": "He"}]
    assert last["candidates"][0]["finishReason"] == "MAX_TOKENS"


@pytest.mark.parametrize("alt", ["json", "sse"])
async def test_a_stream_that_fails_says_so(house: House, alt: str) -> None:
    response, request = await house.open(f"{MODEL}:streamGenerateContent?alt={alt}", HI, "He")
    await house.worker.fail(request, "out of memory")
    _, last = (await response.json()) if alt == "json" else [data for _, data in named(await response.text())]
    assert last == {"error": {"code": 500, "message": "out of memory", "status": "INTERNAL"}}


def test_a_call_is_told_once_it_is_whole() -> None:
    text, weather, clock = written(
        Piece("I look.", [1], [0.0]),
        Piece("", [2], [0.0], parts=[CallStarted(0, "weather"), Arguments(0, '{"city"')]),
        Piece("", [3], [0.0], parts=[Arguments(0, ': "Bern"}'), CallEnded(0), CallStarted(1, "clock")]),
        Piece("", [4], [0.0], "tool_calls", parts=[Arguments(1, "{}"), CallEnded(1)]),
        **TOOLS,
    )
    assert text["candidates"][0]["content"]["parts"] == [{"text": "I look."}]
    (part,) = weather["candidates"][0]["content"]["parts"]
    assert part["functionCall"].pop("id")
    assert part == {"functionCall": {"name": "weather", "args": {"city": "Bern"}}}
    assert clock["candidates"][0]["content"]["parts"][0]["functionCall"]["name"] == "clock"
    assert clock["candidates"][0]["finishReason"] == "STOP"


@pytest.mark.parametrize(("finish", "reason"), [("tool_calls", "MALFORMED_FUNCTION_CALL"), ("length", "MAX_TOKENS")])
def test_a_call_that_is_no_object_is_not_told(finish: Any, reason: str) -> None:
    (only,) = written(
        Piece("", [1], [0.0], finish, parts=[CallStarted(0, "weather"), Arguments(0, '{"ci'), CallEnded(0, False)]), **TOOLS
    )
    assert only["candidates"] == [{"content": {"parts": [], "role": "model"}, "finishReason": reason, "index": 0}]


@pytest.mark.parametrize("asked", [HI, {"generateContentRequest": {"model": "models/tiny", **HI}}])
async def test_contents_are_counted_without_the_engine(house: House, asked: Any) -> None:
    async with house.http.post(f"{MODEL}:countTokens", json=asked) as response:
        assert response.status == 200
        assert await response.json() == {"totalTokens": len("u:hi\na:")}
    assert house.worker.received.empty()


async def test_models_are_described(house: House) -> None:
    async with house.http.get("/v1beta/models") as response:
        (model,) = (await response.json())["models"]
    async with house.http.get(MODEL) as response:
        assert await response.json() == model
    assert (model["name"], model["baseModelId"], model["inputTokenLimit"]) == ("models/tiny", "tiny", 64)
    assert "generateContent" in model["supportedGenerationMethods"]


async def test_the_models_of_v1_are_googles_for_googles_client(house: House) -> None:
    google = {"x-goog-api-client": "google-genai-sdk/3.6.1"}
    for path in ("/models", "/models/tiny"):
        async with (
            house.http.get(f"/v1beta{path}") as beta,
            house.http.get(f"/v1{path}", headers=google) as stable,
            house.http.get(f"/v1{path}") as openai,
        ):
            assert await stable.json() == await beta.json()
            assert (await openai.json())["object"] in ("list", "model")
    async with house.http.get("/v1/models/other", headers=google) as response:
        assert (await response.json())["error"]["status"] == "NOT_FOUND"


# What is refused ---------------------------------------------------------------------------------------------------


def config(**fields: Any) -> dict[str, Any]:
    return {"generationConfig": fields}


def part(**fields: Any) -> dict[str, Any]:
    return {"contents": [{"role": "user", "parts": [fields]}]}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"contents": None}, "contents"),
        ({"contents": []}, "contents"),
        ({"contents": [{"parts": []}]}, "contents[0].parts"),
        ({"contents": [{"role": "assistant", "parts": [{"text": "hi"}]}]}, "contents[0].role"),
        (part(), "contents[0].parts[0].text"),
        (part(inlineData={"mimeType": "image/png", "data": ""}), "contents[0].parts[0].inlineData"),
        (part(inline_data={}), "contents[0].parts[0].inlineData"),
        (part(fileData={}), "contents[0].parts[0].fileData"),
        (part(text="hi", functionResponse={"name": "f", "response": {}}), "contents[0].parts[0].functionResponse"),
        (part(functionCall={"name": "f"}), "contents[0].parts"),
        (part(functionResponse={"name": "f"}), "contents[0].parts[0].functionResponse.response"),
        (part(text="x" * 64), "prompt"),
        ({"systemInstruction": "Be."}, "systemInstruction"),
        (config(temperature=3), "generationConfig.temperature"),
        (config(top_p=0), "generationConfig.topP"),
        (config(topK=1.5), "generationConfig.topK"),
        (config(candidateCount=9), "generationConfig.candidateCount"),
        (config(maxOutputTokens=0), "generationConfig.maxOutputTokens"),
        (config(maxOutputTokens=1000), "generationConfig.maxOutputTokens"),
        (config(stopSequences=[""]), "generationConfig.stopSequences[0]"),
        (config(seed="x"), "generationConfig.seed"),
        (config(presencePenalty=3), "generationConfig.presencePenalty"),
        (config(responseMimeType="text/html"), "generationConfig.responseMimeType"),
        (config(responseMimeType="text/x.enum"), "generationConfig.responseMimeType"),
        (config(responseMimeType="text/x.enum", responseSchema={"type": "STRING"}), "generationConfig.responseSchema.enum"),
        (config(responseSchema={"type": "STRING"}), "generationConfig.responseSchema"),
        (config(responseMimeType="application/json", responseSchema={"type": "X"}), "generationConfig.responseSchema.type"),
        (
            config(responseMimeType="application/json", responseSchema={}, responseJsonSchema={}),
            "generationConfig.responseJsonSchema",
        ),
        (config(logprobs=2), "generationConfig.logprobs"),
        (config(responseModalities=["AUDIO"]), "generationConfig.responseModalities"),
        (config(speechConfig={}), "generationConfig.speechConfig"),
        ({"cachedContent": "cachedContents/1"}, "cachedContent"),
        ({"tools": [{"googleSearch": {}}]}, "tools[0].googleSearch"),
        ({"tools": [{"code_execution": {}}]}, "tools[0].codeExecution"),
        ({"tools": [{"functionDeclarations": [{"name": "a b"}]}]}, "tools[0].functionDeclarations[0].name"),
        ({"tools": [{"functionDeclarations": [WEATHER, WEATHER]}]}, "tools"),
        (
            {"tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "X"}}]}]},
            "tools[0].functionDeclarations[0].parameters.type",
        ),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "toolConfig.functionCallingConfig.mode"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "SOME"}}}, "toolConfig.functionCallingConfig.mode"),
        (
            {**TOOLS, "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["x"]}}},
            "toolConfig.functionCallingConfig.allowedFunctionNames",
        ),
        (
            {**TOOLS, "toolConfig": {"functionCallingConfig": {"mode": "AUTO", "allowedFunctionNames": ["clock"]}}},
            "toolConfig.functionCallingConfig.allowedFunctionNames",
        ),
    ],
)
async def test_an_impossible_value_is_refused_by_name(house: House, fields: Any, name: str) -> None:
    given = {key: value for key, value in {**HI, **fields}.items() if value is not None}
    status, error = await refused(house, given)
    assert (status, error["status"]) == (400, "INVALID_ARGUMENT")
    assert name in error["message"]


async def test_what_is_counted_is_one_thing(house: House) -> None:
    for given in ({}, {**HI, "generateContentRequest": HI}):
        status, error = await refused(house, given, f"{MODEL}:countTokens")
        assert status == 400
        assert "contents" in error["message"]


async def test_errors_have_the_statuses_that_googles_clients_know(house: House) -> None:
    assert (await refused(house, HI, "/v1beta/models/other:generateContent"))[1]["status"] == "NOT_FOUND"
    for name in ("other:one", "", "a%0Ab", "%C3%85%1B", "a/b"):
        assert (await refused(house, HI, f"/v1/models/{name}:generateContent"))[1]["status"] == "NOT_FOUND"
        assert (await refused(house, HI, f"/v1beta/models/{name}:countTokens"))[1]["status"] == "NOT_FOUND"
    assert (await refused(house, None, "/v1beta/models/other", "GET"))[1]["status"] == "NOT_FOUND"
    assert (await refused(house, HI, f"{MODEL}:embedContent"))[1]["status"] == "NOT_FOUND"
    assert (await refused(house, HI, f"{MODEL}:streamGenerateContent?alt=xml"))[1]["status"] == "INVALID_ARGUMENT"
    asking = asyncio.ensure_future(refused(house, HI))
    await house.worker.refuse(await house.worker.next(Generate))
    status, error = await asking
    assert (status, error["status"]) == (429, "RESOURCE_EXHAUSTED")
    house.service.draining = True
    status, error = await refused(house, HI)
    assert (status, error["status"]) == (503, "UNAVAILABLE")


async def test_a_key_may_stand_in_the_address_and_is_not_logged(
    house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry, key = keys.new("someone")
    keys.update(tmp_path / "keys.toml", lambda _: [entry])
    runner = app.runner(app.build(house.service, Access(Keys(tmp_path / "keys.toml"))))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    caplog.set_level(logging.DEBUG)
    async with aiohttp.ClientSession(f"http://{host}:{port}") as http:
        for path, status in [
            (f"{MODEL}?key={key}", 200),
            (f"{MODEL}?key=wrong", 401),
            (MODEL, 401),
            (f"/v1beta/nothing?key={key}", 404),
            (f"/v1/models?key={key}", 401),
            (f"/v1/models/tiny?key={key}", 401),  # Only where Google's clients put it.
        ]:
            async with http.get(path) as response:
                assert response.status == status, path
                assert key not in await response.text()
        async with http.get(MODEL, headers={"x-goog-api-key": key}) as response:
            assert response.status == 200
        async with http.get(MODEL) as response:
            assert (await response.json())["error"]["status"] == "UNAUTHENTICATED"
        async with http.post("/v1/messages", json={}) as response:
            assert (await response.json())["error"]["type"] == "authentication_error"
    await runner.cleanup()
    assert "someone" in "".join(str(record.__dict__) for record in caplog.records)
    assert not any(key in str(record.__dict__) for record in caplog.records)
