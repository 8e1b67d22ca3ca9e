"""Anthropic's messages: what they ask for, what is answered, and errors in their shape."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from runtime.messages import Cancel, Generate
from server.api.anthropic.bodies import MessagesBody
from server.api.anthropic.messages import MessageStream, chat
from server.api.bodies import MAX_BODY
from server.asked import Asked
from server.conversation import Named
from server.generation import Piece, PromptDetails, Usage
from server.tools import Arguments, CallEnded, CallStarted
from tests.unit.server.events import named
from tests.unit.server.house import House

PATH = "/v1/messages"
HI: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
WEATHER = {"name": "weather", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
ASKED = Asked()


def body(**fields: Any) -> MessagesBody:
    return msgspec.convert({**HI, **fields}, MessagesBody)


async def whole(house: House, fields: dict[str, Any], *says: tuple[str, Any]) -> tuple[dict[str, Any], Generate]:
    asking = asyncio.ensure_future(house.http.post(PATH, json={**HI, **fields}, headers={"anthropic-version": "2023-06-01"}))
    request = await house.worker.next(Generate)
    for text, finish in says:
        await house.worker.say(request, text, finish, cached=3)
    async with await asking as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["request-id"] == answer.headers["X-Request-Id"]
        told: dict[str, Any] = await answer.json()
        return told, request


async def refused(house: House, fields: Any, path: str = PATH) -> tuple[int, dict[str, Any]]:
    content = {"data": fields} if isinstance(fields, bytes) else {"json": fields}
    async with house.http.post(path, **content) as response:
        answer = await response.json()
        assert set(answer) == {"type", "error", "request_id"}
        assert answer["type"] == "error"
        assert set(answer["error"]) == {"type", "message"}
        assert answer["request_id"] == response.headers["request-id"]
        return response.status, answer["error"]


def events_of(*pieces: Piece) -> list[dict[str, Any]]:
    """What the stream of an answer of these pieces says."""
    choices = cast(Any, SimpleNamespace(usage=Usage(7, 5, 12, PromptDetails(3))))
    stream = MessageStream(cast(Any, None), cast(Any, SimpleNamespace(name="tiny")), choices)
    return check((stream.begin() + b"".join(map(stream.piece, pieces)) + stream.end(choices)).decode())


def check(written: str) -> list[dict[str, Any]]:
    """The events, each of which has its type as its name."""
    events = named(written)
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    return [data for _, data in events]


# What is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["One\nTwo", [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]])
def test_the_system_is_the_first_turn(system: Any) -> None:
    messages = chat(body(system=system), ASKED).messages
    assert messages == [{"role": "system", "content": "One\nTwo"}, {"role": "user", "content": "hi"}]


def test_calls_and_their_results_are_turns_of_a_chat() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "cold"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "warm"}], "is_error": False},
                {"type": "text", "text": "And?"},
            ],
        },
    ]

    def call(id: str, arguments: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}

    assert chat(body(messages=messages), ASKED).messages == [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [call("t1", '{"city": "Bern"}'), call("t2", "{}")],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "cold"},
        {"role": "tool", "tool_call_id": "t2", "content": "warm"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]


def test_turns_of_one_speaker_that_follow_one_another_are_one() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]},
        {"role": "user", "content": "d"},
    ]
    turns = chat(body(messages=messages), ASKED).messages
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "user"]
    assert turns[0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns[1]["content"] == "c"
    assert turns[1]["tool_calls"][0]["id"] == "t"
    assert (turns[2]["content"], turns[3]["content"]) == ("", "d")


@pytest.mark.parametrize(
    ("choice", "wanted", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "weather"}, Named("weather"), True),
        ({"type": "none"}, "none", True),
    ],
)
def test_a_tool_choice_says_whether_tools_are_called(choice: Any, wanted: Any, parallel: bool) -> None:
    asked = chat(body(tools=[WEATHER], tool_choice=choice), ASKED)
    assert (asked.choice, asked.parallel) == (wanted, parallel)
    assert [(tool.name, tool.description, tool.parameters) for tool in asked.tools] == [
        ("weather", "Looks.", WEATHER["input_schema"])
    ]


@pytest.mark.parametrize(("last", "continued"), [("user", False), ("assistant", True)])
def test_the_assistants_turn_at_the_end_is_continued(last: str, continued: bool) -> None:
    messages = [*HI["messages"], {"role": last, "content": "The answer is"}]
    assert chat(body(messages=messages), ASKED).continue_final_message is continued


def test_the_texts_of_an_assistants_turn_are_one_that_is_continued_where_it_ends() -> None:
    blocks = [{"type": "text", "text": "The answer"}, {"type": "text", "text": " is"}]
    asked = chat(body(messages=[*HI["messages"], {"role": "assistant", "content": blocks}]), ASKED)
    assert asked.messages[-1] == {"role": "assistant", "content": "The answer is"}
    assert asked.continue_final_message


def test_how_it_is_made_has_anthropics_names() -> None:
    asked = body(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["a", "b"]).asked()
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (0.5, 0.9, 7)
    assert (asked.max_tokens, asked.limit, asked.stops) == (9, "max_tokens", ("a", "b"))


def test_an_output_format_is_a_constraint() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = body(output_config={"format": {"type": "json_schema", "schema": schema}}).asked()
    assert asked.constraint is not None
    assert msgspec.json.decode(asked.constraint.source) == schema | {"additionalProperties": False}


# What is answered --------------------------------------------------------------------------------------------------


async def test_a_message_is_answered_whole(house: House) -> None:
    answer, request = await whole(house, {"system": "Be.", "metadata": {"user_id": "u"}}, ("Hello", None), (" you", "stop"))
    assert house.text.stream().push(request.prompt) == "s:Be.\nu:hi\na:"
    assert (request.max_tokens, request.sampling.temperature) == (9, 1.0)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello you"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("s:Be.\nu:hi\na:") - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 9,
        },
    }


async def test_an_answer_that_reaches_its_limit_says_so(house: House) -> None:
    answer, _ = await whole(house, {"max_tokens": 2}, ("He", "length"))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)


async def test_a_stop_sequence_is_named(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post(PATH, json={**HI, "stop_sequences": ["XX", "END", "D"]}))
    request = await house.worker.next(Generate)
    await house.worker.say(request, "one E")
    await house.worker.say(request, "ND two")
    answer = await (await asking).json()
    assert answer["content"] == [{"type": "text", "text": "one "}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    assert (await house.worker.next(Cancel)).id == request.id


async def test_a_message_is_streamed(house: House) -> None:
    response, request = await house.open(PATH, {**HI, "stream": True, "stop_sequences": ["!"]}, "He")
    await house.worker.say(request, "llo!")
    assert response.content_type == "text/event-stream"
    start, ping, *events = check(await response.text())
    assert start["message"].pop("id").startswith("msg_")
    assert start["message"] == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        },
    }
    assert ping == {"type": "ping"}
    assert events == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "He"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "llo"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "stop_sequence", "stop_sequence": "!"},
            "usage": {
                "input_tokens": 7,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 6,
            },
        },
        {"type": "message_stop"},
    ]


def test_a_call_is_a_block_of_its_own_and_the_reason_for_the_end() -> None:
    events = events_of(
        Piece("I look.", [1], [0.0]),
        Piece("", [2], [0.0], parts=[CallStarted(0, "weather"), Arguments(0, '{"city"')]),
        Piece("", [3], [0.0], parts=[Arguments(0, ': "Bern"}'), CallEnded(0), CallStarted(1, "clock")]),
        Piece("", [4], [0.0], "tool_calls", parts=[Arguments(1, "{}"), CallEnded(1)]),
    )
    blocks = [event for event in events if event["type"].startswith("content_block")]
    assert [(event["type"].removeprefix("content_block_"), event["index"]) for event in blocks] == [
        *(("start", 0), ("delta", 0), ("stop", 0)),
        *(("start", 1), ("delta", 1), ("delta", 1), ("stop", 1)),
        *(("start", 2), ("delta", 2), ("stop", 2)),
    ]
    start = blocks[3]["content_block"]
    assert start.pop("id").startswith("toolu_")
    assert start == {"type": "tool_use", "name": "weather", "input": {}}
    inputs = [
        event["delta"]["partial_json"] for event in blocks if event["type"] == "content_block_delta" and event["index"] == 1
    ]
    assert inputs == ['{"city"', ': "Bern"}']
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["cache_read_input_tokens"] == 3


def test_a_call_that_is_no_object_is_no_reason_to_call() -> None:
    events = events_of(
        Piece("", [1], [0.0], "tool_calls", parts=[CallStarted(0, "weather"), Arguments(0, '{"ci'), CallEnded(0, False)])
    )
    assert events[-2]["delta"]["stop_reason"] == "end_turn"


async def test_a_conversation_is_counted_without_the_engine(house: House) -> None:
    counted = {name: value for name, value in HI.items() if name != "max_tokens"}
    async with house.http.post(f"{PATH}/count_tokens", json={**counted, "system": "Be."}) as response:
        assert response.status == 200
        assert await response.json() == {"input_tokens": len("s:Be.\nu:hi\na:")}
    assert house.worker.received.empty()


# What is refused ---------------------------------------------------------------------------------------------------


def turn(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (turn({"type": "image", "source": {}}), "messages[0].content[0].type"),
        (turn({"type": "document", "source": {}}), "messages[0].content[0].type"),
        (turn({"type": "tool_use", "id": "t", "name": "n", "input": {}}), "messages[0].content"),
        (turn({"type": "tool_result", "tool_use_id": "t"}, role="assistant"), "messages[0].content"),
        (turn({"type": "tool_use", "id": "t", "name": "n", "input": {}}, role="assistant"), "last message"),
        ({"messages": [{"role": "user", "content": "x" * 64}]}, "prompt"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"model": None}, "model"),
        ({"system": 7}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": 1.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"stream": "yes"}, "stream"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"metadata": {"user_id": 7}}, "metadata.user_id"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "input_schema": {}}]}, "tools[0].type"),
        ({"tools": [{"name": "weather"}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "clock"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "any"},
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            "output_config.format",
        ),
    ],
)
async def test_an_impossible_value_is_refused_by_name(house: House, fields: Any, name: str) -> None:
    given = {key: value for key, value in {**HI, **fields}.items() if value is not None}
    status, error = await refused(house, given)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert name in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "disabled"}},
        {"service_tier": "auto"},
        {"container": None},
        {"tools": [], "tool_choice": {"type": "none"}},
    ],
)
async def test_what_changes_nothing_is_taken(house: House, fields: dict[str, Any]) -> None:
    answer, _ = await whole(house, fields, ("!", "stop"))
    assert answer["content"] == [{"type": "text", "text": "!"}]


async def test_errors_have_the_types_that_anthropics_clients_know(house: House) -> None:
    assert (await refused(house, {**HI, "model": "other"}))[1]["type"] == "not_found_error"
    assert (await refused(house, HI, f"{PATH}/batches"))[1]["type"] == "not_found_error"
    assert (await refused(house, b"{"))[1]["type"] == "invalid_request_error"
    status, error = await refused(house, b" " * (MAX_BODY + 1))
    assert (status, error["type"]) == (413, "request_too_large")
    asking = asyncio.ensure_future(refused(house, HI))
    await house.worker.refuse(await house.worker.next(Generate))
    status, error = await asking
    assert (status, error["type"]) == (429, "rate_limit_error")
    asking = asyncio.ensure_future(refused(house, HI))
    await house.worker.fail(await house.worker.next(Generate), "out of memory")
    assert await asking == (500, {"type": "api_error", "message": "out of memory"})
    house.service.draining = True
    status, error = await refused(house, HI)
    assert (status, error["type"]) == (503, "overloaded_error")


async def test_a_stream_that_fails_says_so(house: House) -> None:
    response, request = await house.open(PATH, {**HI, "stream": True}, "He")
    await house.worker.fail(request, "out of memory")
    *_, last = check(await response.text())
    assert last == {
        "type": "error",
        "error": {"type": "api_error", "message": "out of memory"},
        "request_id": response.headers["request-id"],
    }
