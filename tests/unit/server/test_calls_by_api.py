"""Calls of tools by the APIs that are translations of a chat: the real format, over HTTP, whole and streamed."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from runtime.bundle import Bundle
from runtime.messages import Generate
from tests.unit.server.events import named
from tests.unit.server.house import House

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>'
RESPONSES: dict[str, Any] = {"input": "hi", "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}]}
MESSAGES: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 99,
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"name": "weather", "input_schema": SCHEMA}],
}
GEMINI: dict[str, Any] = {
    "contents": [{"parts": [{"text": "hi"}]}],
    "tools": [{"functionDeclarations": [{"name": "weather", "parametersJsonSchema": SCHEMA}]}],
}
STREAM = "/v1beta/models/tiny:streamGenerateContent?alt=sse"


@pytest.fixture
def bundle(bundle: Bundle) -> Bundle:
    """A model with room for the description of tools."""
    return msgspec.structs.replace(bundle, max_length=2048)


async def asked(house: House, path: str, body: dict[str, Any], say: str = "I look. " + CALL) -> tuple[str, Generate]:
    """The answer, which the engine gives seven characters at a time."""
    asking = asyncio.ensure_future(house.http.post(path, json=body))
    request = await house.worker.next(Generate)
    assert "weather" in house.text.stream().push(request.prompt)
    for start in range(0, len(say), 7):
        await house.worker.say(request, say[start : start + 7])
    await house.worker.say(request, "", "stop")
    async with await asking as response:
        assert response.status == 200, await response.text()
        return await response.text(), request


async def test_a_responses_call_is_an_item(house: House) -> None:
    answer = json.loads((await asked(house, "/v1/responses", RESPONSES))[0])
    message, call = answer["output"]
    assert message["content"][0]["text"].strip() == "I look."
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert json.loads(call["arguments"]) == {"place": "Ulm"}


async def test_a_responses_stream_gives_a_calls_arguments_piece_by_piece(house: House) -> None:
    events = [data for _, data in named((await asked(house, "/v1/responses", {**RESPONSES, "stream": True}))[0])]
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert len(deltas) > 1
    assert "".join(deltas) == done["arguments"]
    assert json.loads(done["arguments"]) == {"place": "Ulm"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


async def test_a_messages_call_is_a_block_and_the_reason_for_the_end(house: House) -> None:
    answer = json.loads((await asked(house, "/v1/messages", MESSAGES))[0])
    text, call = answer["content"]
    assert text["text"].strip() == "I look."
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"place": "Ulm"})
    assert answer["stop_reason"] == "tool_use"


async def test_a_messages_stream_gives_a_calls_input_piece_by_piece(house: House) -> None:
    events = [data for _, data in named((await asked(house, "/v1/messages", {**MESSAGES, "stream": True}))[0])]
    parts = [event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("type") == "input_json_delta"]
    assert len(parts) > 1
    assert json.loads("".join(parts)) == {"place": "Ulm"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("path", ["/v1beta/models/tiny:generateContent", STREAM])
async def test_a_gemini_call_is_a_part(house: House, path: str) -> None:
    written, _ = await asked(house, path, GEMINI)
    answers = [data for _, data in named(written)] if path == STREAM else [json.loads(written)]
    parts = [part for answer in answers for part in answer["candidates"][0]["content"]["parts"]]
    assert "".join(part.get("text", "") for part in parts).strip() == "I look."
    (call,) = [part["functionCall"] for part in parts if "functionCall" in part]
    assert (call["name"], call["args"]) == ("weather", {"place": "Ulm"})
    assert answers[-1]["candidates"][0]["finishReason"] == "STOP"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {**RESPONSES, "tool_choice": "required"}),
        ("/v1/responses", {**RESPONSES, "tool_choice": {"type": "function", "name": "weather"}}),
        ("/v1/messages", {**MESSAGES, "tool_choice": {"type": "any"}}),
        ("/v1/messages", {**MESSAGES, "tool_choice": {"type": "tool", "name": "weather"}}),
        (STREAM, {**GEMINI, "toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}),
    ],
)
async def test_a_call_that_is_required_is_a_constraint(house: House, path: str, body: dict[str, Any]) -> None:
    _, request = await asked(house, path, body, CALL)
    assert request.constraint is not None
    assert request.constraint.kind == "lark"
    assert "weather" in request.constraint.source


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/responses",
            {
                "input": [
                    {"role": "user", "content": "hi"},
                    {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"place": "Ulm"}'},
                    {"type": "function_call_output", "call_id": "c", "output": "rain"},
                ]
            },
        ),
        (
            "/v1/messages",
            {
                **MESSAGES,
                "messages": [
                    {"role": "user", "content": "hi"},
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "c", "name": "weather", "input": {"place": "Ulm"}}],
                    },
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "rain"}]},
                ],
            },
        ),
        (
            "/v1beta/models/tiny:generateContent",
            {
                "contents": [
                    {"parts": [{"text": "hi"}]},
                    {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"place": "Ulm"}}}]},
                    {"parts": [{"functionResponse": {"name": "weather", "response": {"sky": "rain"}}}]},
                ]
            },
        ),
    ],
)
async def test_a_call_and_its_result_go_back_through_the_template(house: House, path: str, body: dict[str, Any]) -> None:
    _, request = await asked(house, path, body, "It rains.")
    prompt = house.text.stream().push(request.prompt)
    _, call, rest = prompt.partition('{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>')
    assert call
    assert "rain" in rest


@pytest.mark.parametrize("depth", [800, 900, 950, 980, 10_000])
async def test_what_is_nested_too_deeply_is_refused(house: House, depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    body = '{"contents":[{"role":"model","parts":[{"functionCall":{"name":"f","args":' + nested + "}}]}]}"
    async with house.http.post("/v1beta/models/tiny:generateContent", data=body) as response:
        assert response.status == 400, await response.text()
