"""Calls of tools by the APIs that are translations of a chat: the real format, over HTTP, whole and streamed."""

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec
import pytest

from runtime.bundle import Bundle
from runtime.messages import Generate
from server.api.anthropic import messages
from server.api.anthropic.bodies import MessagesBody, MessagesTurn, TextBlock
from server.api.google import gemini
from server.api.google.bodies import FunctionCall, FunctionResponse, GeminiContent, GeminiPart, GenerateContentBody
from server.asked import Asked
from server.conversation import Chat
from tests.pace import LINEAR, growth
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


async def streamed(house: House, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of an answer whose call goes on only when the client has its beginning."""
    *begun, rest = CALL.partition('"place"')
    response, request = await house.open(path, {**body, "stream": True}, "".join(["I look. ", *begun]))
    written = await response.content.readuntil(b"place")
    await house.worker.say(request, rest, "stop")
    return [data for _, data in named((written + await response.read()).decode())]


async def test_a_responses_call_is_an_item(house: House) -> None:
    answer = json.loads((await asked(house, "/v1/responses", RESPONSES))[0])
    message, call = answer["output"]
    assert message["content"][0]["text"].strip() == "I look."
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert json.loads(call["arguments"]) == {"place": "Ulm"}


async def test_a_responses_stream_gives_a_calls_arguments_piece_by_piece(house: House) -> None:
    events = await streamed(house, "/v1/responses", RESPONSES)
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
    events = await streamed(house, "/v1/messages", MESSAGES)
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


# Where an answer is cut --------------------------------------------------------------------------------------------

FIRST = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rom"}}\n</tool_call>'
ULM, ROME = ("call", {"place": "Ulm"}), ("call", {"place": "Rom"})
WHOLE = ("I look.\n" + FIRST + "\n" + SECOND + "\nDone", [("text", "I look."), ULM, ROME, ("text", "Done")])
BROKEN = ("I look." + FIRST + '<tool_call>\n{"name": "weather", "arguments": {"place": xx', [*WHOLE[1][:2], ("text", "xx")])
"""What the model writes, and what of it is told: of a call that is no JSON, only the text behind it."""
CHAT_BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
}
Parts = list[tuple[str, Any]]


def joined(parts: Iterable[tuple[str, Any]]) -> Parts:
    """Texts that follow one another as one, without the whitespace around it."""
    told: Parts = []
    for kind, value in parts:
        if kind == "text" and told and told[-1][0] == "text":
            told[-1] = ("text", told[-1][1] + value)
        else:
            told.append((kind, value))
    return [(kind, value.strip() if kind == "text" else value) for kind, value in told]


def responses_told(answer: Any) -> Parts:
    return joined(
        ("text", item["content"][0]["text"]) if item["type"] == "message" else ("call", json.loads(item["arguments"]))
        for item in answer["output"]
        if item["type"] == "message" or item["status"] == "completed"
    )


def responses_streamed(events: list[Any]) -> Parts:
    """What the deltas say of each item, in the order of the items; it has to be what the last event says."""
    items: dict[str, Any] = {}
    for event in events:
        match event["type"]:
            case "response.output_item.added":
                items[event["item"]["id"]] = event["item"] | {"content": [{"text": ""}]}
            case "response.output_text.delta":
                items[event["item_id"]]["content"][0]["text"] += event["delta"]
            case "response.function_call_arguments.delta":
                items[event["item_id"]]["arguments"] += event["delta"]
            case "response.output_item.done":
                items[event["item"]["id"]]["status"] = event["item"]["status"]
    told = responses_told({"output": list(items.values())})
    assert told == responses_told(events[-1]["response"])
    return told


def messages_told(answer: Any) -> Parts:
    return joined(("text", each["text"]) if each["type"] == "text" else ("call", each["input"]) for each in answer["content"])


def messages_streamed(events: list[Any]) -> Parts:
    """What each block's deltas say, which are of its kind; a client cannot read a call that is no JSON."""
    blocks: list[tuple[str, str]] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append((event["content_block"]["type"], ""))
            case "content_block_delta":
                kind, text = blocks[-1]
                assert event["index"] == len(blocks) - 1
                added = event["delta"]["text"] if kind == "text" else event["delta"]["partial_json"]
                blocks[-1] = (kind, text + added)
    told: Parts = []
    for kind, text in blocks:
        if kind == "text":
            told.append(("text", text))
        elif text.endswith("}"):
            told.append(("call", json.loads(text)))
    return joined(told)


def gemini_told(*answers: Any) -> Parts:
    return joined(
        ("text", part["text"]) if "text" in part else ("call", part["functionCall"]["args"])
        for answer in answers
        for part in answer["candidates"][0]["content"]["parts"]
    )


def chat_told(texts: Sequence[str | None], calls: Sequence[Any]) -> Parts:
    """A chat has its text and its calls apart; the calls that are JSON."""
    arguments = [each["function"]["arguments"] for each in calls]
    return [*(("call", json.loads(each)) for each in arguments if each.endswith("}")), ("text", "".join(filter(None, texts)))]


def chat_streamed(chunks: list[Any]) -> Parts:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls: list[Any] = []
    for added in (call for delta in deltas for call in delta.get("tool_calls", ())):
        if added["index"] == len(calls):
            calls.append(added)
        else:
            calls[-1]["function"]["arguments"] += added["function"]["arguments"]
    return chat_told([delta.get("content") for delta in deltas], calls)


def chat_form(truth: Parts) -> Parts:
    """What a chat says of `truth`."""
    return [*(part for part in truth if part[0] == "call"), ("text", "".join(text for kind, text in truth if kind == "text"))]


async def said(house: House, path: str, body: dict[str, Any], rows: Sequence[str]) -> str:
    asking = asyncio.ensure_future(house.http.post(path, json=body))
    request = await house.worker.next(Generate)
    for row in rows[:-1]:
        await house.worker.say(request, row)
    await house.worker.say(request, rows[-1], "stop")
    async with await asking as response:
        assert response.status == 200, await response.text()
        return await response.text()


async def told(house: House, api: str, rows: Sequence[str]) -> Parts:
    stream = {"stream": True}
    match api:
        case "responses":
            return responses_told(json.loads(await said(house, "/v1/responses", RESPONSES, rows)))
        case "responses, streamed":
            return responses_streamed([data for _, data in named(await said(house, "/v1/responses", RESPONSES | stream, rows))])
        case "messages":
            return messages_told(json.loads(await said(house, "/v1/messages", MESSAGES, rows)))
        case "messages, streamed":
            return messages_streamed([data for _, data in named(await said(house, "/v1/messages", MESSAGES | stream, rows))])
        case "gemini":
            return gemini_told(json.loads(await said(house, "/v1beta/models/tiny:generateContent", GEMINI, rows)))
        case "gemini, streamed":
            return gemini_told(*(data for _, data in named(await said(house, STREAM, GEMINI, rows))))
        case "chat":
            (choice,) = json.loads(await said(house, "/v1/chat/completions", CHAT_BODY, rows))["choices"]
            return chat_told([choice["message"]["content"]], choice["message"]["tool_calls"])
        case _:
            written = (await said(house, "/v1/chat/completions", CHAT_BODY | stream, rows)).removesuffix("data: [DONE]\n\n")
            return chat_streamed([data for _, data in named(written)])


@pytest.mark.parametrize(
    "api",
    [
        *("responses", "responses, streamed", "messages", "messages, streamed"),
        *("gemini", "gemini, streamed", "chat", "chat, streamed"),
    ],
)
@pytest.mark.parametrize(("say", "truth"), [WHOLE, BROKEN])
async def test_wherever_an_answer_is_cut_it_is_told_in_its_order(house: House, api: str, say: str, truth: Parts) -> None:
    expected = chat_form(truth) if api.startswith("chat") else truth
    for cut in range(len(say)):
        rows = [say[:cut], say[cut:]] if cut else [say]
        found = await told(house, api, rows)
        if api.startswith("chat"):
            found = [(kind, "".join(value.split()) if kind == "text" else value) for kind, value in found]
            expected = [(kind, "".join(value.split()) if kind == "text" else value) for kind, value in expected]
        assert found == expected, rows


# How much is taken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "of"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 4097}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}] * 4097}, "messages"),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 4097}, "input"),
        ("/v1/messages", MESSAGES | {"messages": [{"role": "user", "content": "a"}] * 4097}, "messages"),
        ("/v1beta/models/tiny:generateContent", {"contents": [{"parts": [{"text": "a"}]}] * 4097}, "contents"),
    ],
)
async def test_more_turns_than_any_context_holds_are_refused(house: House, path: str, body: dict[str, Any], of: str) -> None:
    async with house.http.post(path, json=body) as response:
        assert response.status == 400
        assert of in (told := await response.text())
        assert "4096" in told


def turns_of_messages(count: int) -> Callable[[], Chat]:
    turn = MessagesTurn("assistant", [TextBlock("a")])
    body = msgspec.convert(MESSAGES, MessagesBody)
    return partial(messages.chat, msgspec.structs.replace(body, messages=[turn] * count), Asked())


def turns_of_gemini(count: int) -> Callable[[], Chat]:
    """Calls, and their results in the opposite order."""
    calls = [GeminiPart(function_call=FunctionCall("weather", id=str(index))) for index in range(count)]
    results = [GeminiPart(function_response=FunctionResponse("weather", {}, str(index))) for index in reversed(range(count))]
    body = GenerateContentBody(contents=[GeminiContent(calls, "model"), GeminiContent(results, "user")])
    return partial(gemini.chat, body, Asked())


@pytest.mark.parametrize("turns", [turns_of_messages, turns_of_gemini])
def test_the_time_grows_as_the_turns_do(turns: Callable[[int], Callable[[], Chat]]) -> None:
    assert growth(turns, 2_000) < LINEAR
