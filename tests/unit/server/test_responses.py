"""OpenAI's responses: what they ask for, and what is answered, by the models of OpenAI's own client."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from runtime.bundle import SamplingDefaults
from runtime.messages import Generate, Progress, Row
from server.api.openai.responses import ResponseStream, chat
from server.api.openai.responses_bodies import ResponsesBody
from server.conversation import Named
from server.generation import Piece, PromptDetails, Usage
from server.served import Served
from server.tools import Arguments, CallEnded, CallStarted, Content, Event, Tool
from tests.unit.server.events import named
from tests.unit.server.house import House

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def body(**fields: Any) -> ResponsesBody:
    return msgspec.convert({"input": "hi", **fields}, ResponsesBody)


async def whole(house: House, fields: dict[str, Any], *says: tuple[str, Any]) -> tuple[Response, Generate]:
    asking = asyncio.ensure_future(house.http.post(PATH, json={"input": "hi", **fields}))
    request = await house.worker.next(Generate)
    for text, finish in says:
        await house.worker.say(request, text, finish, cached=3)
    async with await asking as answer:
        assert answer.status == 200, await answer.text()
        return Response.model_validate(await answer.json(), strict=True), request


async def refused(house: House, fields: Any) -> tuple[int, dict[str, Any]]:
    async with house.http.post(PATH, json=fields) as response:
        return response.status, (await response.json())["error"]


def events_of(stream: ResponseStream, *pieces: Piece) -> list[dict[str, Any]]:
    usage = Usage(7, 5, 12, PromptDetails(3))
    written = stream.begin() + b"".join(map(stream.piece, pieces)) + stream.end(cast(Any, SimpleNamespace(usage=usage)))
    return [check(name, data) for name, data in named(written.decode())]


def check(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """The event, which OpenAI's client takes for what it says it is."""
    assert name == data["type"]
    assert EVENT.validate_python(data).type == name
    return data


def stream_of(house: House, **fields: Any) -> ResponseStream:
    served = SimpleNamespace(text=house.text, name="tiny", sampling=SamplingDefaults())
    return ResponseStream(cast(Served, served), body(**fields))


# What is asked for -------------------------------------------------------------------------------------------------


def test_a_text_is_what_the_user_says_after_the_instructions() -> None:
    asked = chat(body(instructions="Be brief."))
    assert asked.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert (asked.choice, asked.parallel, asked.fields.messages) == ("auto", True, "input")


def test_items_are_the_turns_of_a_chat_and_calls_that_follow_a_message_are_part_of_it() -> None:
    items = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Bern"}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Rom"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "cold"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "warm"}]},
        {"type": "function_call", "call_id": "c3", "name": "weather", "arguments": "{}"},
    ]

    def call(id: str, arguments: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}

    assert chat(body(input=items)).messages == [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "tool_calls": [call("c1", '{"city": "Bern"}'), call("c2", '{"city": "Rom"}')],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "cold"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "warm"}]},
        {"role": "assistant", "content": "", "tool_calls": [call("c3", "{}")]},
    ]


@pytest.mark.parametrize(
    ("choice", "wanted", "names"),
    [
        (None, "auto", ["weather", "clock"]),
        ("none", "none", ["weather", "clock"]),
        ("required", "required", ["weather", "clock"]),
        ({"type": "function", "name": "clock"}, Named("clock"), ["clock"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}, "auto", ["clock"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]},
            "required",
            ["clock"],
        ),
    ],
)
def test_a_tool_choice_says_which_tools_may_and_must_be_called(choice: Any, wanted: Any, names: list[str]) -> None:
    asked = chat(body(tools=[WEATHER, {"type": "function", "name": "clock"}], tool_choice=choice, parallel_tool_calls=False))
    assert (asked.choice, [tool.name for tool in asked.tools], asked.parallel) == (wanted, names, False)


def test_a_tool_is_told_with_its_schema() -> None:
    (tool,) = chat(body(tools=[{**WEATHER, "description": "Looks.", "strict": True}])).tools
    assert tool == Tool("weather", "Looks.", cast(Any, WEATHER["parameters"]), True)


def test_a_format_is_a_constraint() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = chat(body(text={"format": {"type": "json_schema", "name": "n", "schema": schema}})).asked
    assert asked.constraint is not None
    assert (asked.constraint.kind, asked.form) == ("json_schema", "text.format.schema")
    assert msgspec.json.decode(asked.constraint.source) == schema | {"additionalProperties": False}
    assert chat(body(text={"format": {"type": "json_object"}})).asked.constraint is not None
    assert chat(body(text={"format": {"type": "text"}, "verbosity": "low"})).asked.constraint is None


# What is answered --------------------------------------------------------------------------------------------------


async def test_a_response_is_answered_whole(house: House) -> None:
    fields = {
        "instructions": "Be.",
        "max_output_tokens": 9,
        "temperature": 0.5,
        "metadata": {"a": "b"},
        "user": "u",
        "store": True,
    }
    answer, request = await whole(house, fields, ("Hello", None), (" you", "stop"))
    assert house.text.stream().push(request.prompt) == "s:Be.\nu:hi\na:"
    assert (request.max_tokens, request.sampling.temperature) == (9, 0.5)
    assert (answer.status, answer.output_text, answer.error, answer.incomplete_details) == (
        "completed",
        "Hello you",
        None,
        None,
    )
    assert answer.id.startswith("resp_")
    assert (answer.model, answer.instructions, answer.metadata, answer.user) == ("tiny", "Be.", {"a": "b"}, "u")
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 1.0, 9)
    assert answer.usage is not None
    assert answer.usage.input_tokens == len("s:Be.\nu:hi\na:")
    assert (answer.usage.output_tokens, answer.usage.input_tokens_details.cached_tokens) == (9, 3)
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert answer.to_dict()["store"] is False


@pytest.mark.parametrize(
    "choice",
    [
        "none",
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
    ],
)
async def test_what_was_asked_is_told_again(house: House, choice: Any) -> None:
    fields = {
        "tools": [WEATHER],
        "tool_choice": choice,
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low"},
    }
    stream = stream_of(house, **fields, parallel_tool_calls=False)
    events = events_of(stream, Piece("{}", [1], [0.0], "stop"))
    for response in (events[0]["response"], events[-1]["response"]):
        assert Response.model_validate(response, strict=True)
        assert response["tools"] == [{**WEATHER, "strict": None, "description": None}]
        assert response["tool_choice"] == choice
        assert (response["text"]["format"], response["reasoning"]) == ({"type": "json_object"}, {"effort": "low"})
        assert response["parallel_tool_calls"] is False


async def test_an_answer_that_reaches_its_limit_is_incomplete_and_so_is_its_message(house: House) -> None:
    answer, _ = await whole(house, {"max_output_tokens": 2}, ("He", "length"))
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert cast(Any, answer.output[0]).status == "incomplete"


async def test_an_answer_without_a_token_is_a_message_without_text(house: House) -> None:
    answer, _ = await whole(house, {}, ("", "stop"))
    assert (answer.status, answer.output_text, len(answer.output)) == ("completed", "", 1)


async def test_a_response_is_streamed_in_the_order_that_is_documented(house: House) -> None:
    response, request = await house.open(PATH, {"input": "hi", "stream": True}, "He")
    await house.worker.say(request, "llo", "stop")
    assert response.content_type == "text/event-stream"
    events = [check(name, data) for name, data in named(await response.text())]
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert [event["delta"] for event in events[4:6]] == ["He", "llo"]
    assert events[6]["text"] == "Hello"
    assert len({event["item_id"] for event in events if "item_id" in event} | {events[2]["item"]["id"]}) == 1
    assert events[0]["response"]["output"] == []
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[-1]["response"]["usage"]["output_tokens"] == 5


async def test_logprobs_are_told_with_each_delta_and_with_the_whole_text(house: House) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    asking = asyncio.ensure_future(house.http.post(PATH, json={"input": "hi", "stream": True, **fields}))
    request = await house.worker.next(Generate)
    assert request.top_logprobs == 2
    a, b = house.text.encode("ab")
    rows = [Row(request.id, [a, b], [-0.5, float("-inf")], "stop", tops=[[(a, -0.5), (b, -1.0)], [(a, -0.1), (b, -3.0)]])]
    await house.worker.send(Progress(rows))
    events = [check(name, data) for name, data in named(await (await asking).text())]
    delta = next(event for event in events if event["type"] == "response.output_text.delta")
    assert delta["logprobs"] == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "b", "logprob": -1.0, "bytes": [98]},
            ],
        },
        {
            "token": "b",
            "logprob": -9999.0,
            "bytes": [98],
            "top_logprobs": [
                {"token": "a", "logprob": -0.1, "bytes": [97]},
                {"token": "b", "logprob": -3.0, "bytes": [98]},
            ],
        },
    ]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == delta["logprobs"]


async def test_calls_are_items_of_their_own_behind_the_text(house: House) -> None:
    events = events_of(
        stream_of(house, tools=[WEATHER]),
        Piece("I look.", [1], [0.0]),
        Piece("", [2], [0.0], parts=[CallStarted(0, "weather"), Arguments(0, '{"city"')]),
        Piece("", [3], [0.0], parts=[Arguments(0, ': "Bern"}'), CallEnded(0), CallStarted(1, "weather")]),
        Piece("", [4], [0.0], "tool_calls", parts=[Arguments(1, "{}"), CallEnded(1)]),
    )
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    response = Response.model_validate(events[-1]["response"], strict=True)
    message, *calls = [cast(dict[str, Any], item.to_dict()) for item in response.output]
    assert message["content"][0]["text"] == "I look."
    assert [(call["name"], call["arguments"], call["status"]) for call in calls] == [
        ("weather", '{"city": "Bern"}', "completed"),
        ("weather", "{}", "completed"),
    ]
    assert len({call["call_id"] for call in calls}) == 2
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2]


async def test_the_logprobs_of_a_piece_with_text_and_a_call_are_told(house: House) -> None:
    (a,) = house.text.encode("a")
    parts: list[Event] = [Content("a"), CallStarted(0, "weather"), Arguments(0, "{}"), CallEnded(0)]
    stream = stream_of(house, tools=[WEATHER], include=["message.output_text.logprobs"])
    events = events_of(stream, Piece("a", [a], [-0.5], "tool_calls", parts=parts))
    (delta,) = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [(each["token"], each["logprob"]) for each in delta["logprobs"]] == [("a", -0.5)]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == delta["logprobs"]


async def test_a_call_that_the_limit_cuts_is_incomplete(house: House) -> None:
    events = events_of(
        stream_of(house, tools=[WEATHER]),
        Piece("", [2], [0.0], "length", parts=[CallStarted(0, "weather"), Arguments(0, '{"ci'), CallEnded(0, False)]),
    )
    assert events[-1]["type"] == "response.incomplete"
    (call,) = events[-1]["response"]["output"]
    assert (call["arguments"], call["status"]) == ('{"ci', "incomplete")


async def test_a_stream_that_fails_says_so_and_gives_what_there_was(house: House) -> None:
    response, request = await house.open(PATH, {"input": "hi", "stream": True}, "He")
    await house.worker.fail(request, "out of memory")
    events = [check(name, data) for name, data in named(await response.text())]
    error, failed = events[-2:]
    assert (error["type"], error["code"], error["message"]) == ("error", "engine_error", "out of memory")
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "out of memory"}
    assert failed["response"]["output"][0]["content"][0]["text"] == "He"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
        ({"input": [{"role": "king", "content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"content": "hi"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "reasoning_text", "text": "x"}]}]}, "input[0].content"),
        ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "hi", "max_output_tokens": 1000}, "max_output_tokens"),
        ({"input": "x" * 64}, "input"),
        ({"input": "hi", "instructions": 1}, "instructions"),
        ({"input": "hi", "temperature": 3}, "temperature"),
        ({"input": "hi", "top_p": 0}, "top_p"),
        ({"input": "hi", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "hi", "include": ["everything"]}, "include[0]"),
        ({"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "hi", "conversation": "conv_1"}, "conversation"),
        ({"input": "hi", "background": True}, "background"),
        ({"input": "hi", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "hi", "truncation": "auto"}, "truncation"),
        ({"input": "hi", "truncation": "some"}, "truncation"),
        ({"input": "hi", "stream_options": {}}, "stream_options"),
        ({"input": "hi", "metadata": {"a": 1}}, "metadata[...]"),
        ({"input": "hi", "metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"input": "hi", "text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"input": "hi", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "hi", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"input": "hi", "tools": [WEATHER, WEATHER]}, "tools"),
        ({"input": "hi", "tool_choice": "required"}, "tool_choice"),
        ({"input": "hi", "tool_choice": "sometimes"}, "tool_choice"),
        ({"input": "hi", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "clock"}}, "tool_choice"),
        ({"input": "hi", "tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        (
            {"input": "hi", "tools": [WEATHER], "tool_choice": "required", "text": {"format": {"type": "json_object"}}},
            "text.format",
        ),
    ],
)
async def test_an_impossible_value_is_refused_by_name(house: House, fields: Any, param: str) -> None:
    status, error = await refused(house, fields)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"] or "prompt" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "truncation": "disabled", "background": False, "service_tier": "auto", "reasoning": {"effort": "low"}},
        {"prompt_cache_key": "k", "safety_identifier": "s", "max_tool_calls": 3, "include": ["reasoning.encrypted_content"]},
        {"tools": [], "tool_choice": "auto", "previous_response_id": None, "text": {}},
    ],
)
async def test_what_changes_nothing_is_taken(house: House, fields: dict[str, Any]) -> None:
    answer, _ = await whole(house, fields, ("!", "stop"))
    assert answer.output_text == "!"


async def test_no_response_is_stored(house: House) -> None:
    async with house.http.get(f"{PATH}/resp_1") as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (404, "response_not_found")
        assert "stores none" in error["message"]


async def test_an_unknown_model_is_not_found(house: House) -> None:
    status, error = await refused(house, {"input": "hi", "model": "other"})
    assert (status, error["code"]) == (404, "model_not_found")
