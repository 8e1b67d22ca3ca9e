"""Chats by the openai client."""

import asyncio
import json
from typing import Literal

import openai
import pytest
from openai.types.chat import (
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageParam,
    ChatCompletionToolChoiceOptionParam,
)
from pydantic import BaseModel, Field

FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
WEATHER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
TOOL: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 40},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
NAMED: ChatCompletionToolChoiceOptionParam = {"type": "function", "function": {"name": "get_time"}}


class City(BaseModel):
    name: str = Field(max_length=40)
    continent: Literal["Africa", "America", "Asia", "Europe"]
    millions: int = Field(ge=0, le=40)


def is_weather(arguments: str) -> bool:
    """Whether the arguments are what the tool takes."""
    given = json.loads(arguments)
    return set(given) == {"city", "unit"} and isinstance(given["city"], str) and given["unit"] in ("celsius", "fahrenheit")


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_completion_tokens=40)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=FRANCE,
            temperature=0,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_asynchronous_chats_run_side_by_side(asynchronous: openai.AsyncOpenAI, model: str) -> None:
    async def chat() -> str:
        stream = await asynchronous.chat.completions.create(
            model=model, messages=FRANCE, temperature=0, max_tokens=20, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert all("Paris" in answer for answer in await asyncio.gather(*(chat() for _ in range(4))))


def test_n_answers_differ(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me a story."}], n=2, seed=1, max_tokens=24
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len({choice.message.content for choice in answer.choices}) == 2


def test_logprobs_name_the_likeliest_tokens(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=FRANCE, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(token.token for token in told.content).startswith(answer.choices[0].message.content or "")
    for token in told.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "a greedy choice is the likeliest token"
        assert [top.logprob for top in token.top_logprobs] == sorted((top.logprob for top in token.top_logprobs), reverse=True)


def test_required_and_named_tools_are_called(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=WEATHER,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert is_weather(call.function.arguments)
    assert call.id
    named = client.chat.completions.create(
        model=model, messages=WEATHER, tools=[TOOL, CLOCK], tool_choice=NAMED, temperature=0, max_tokens=100
    )
    (call,) = named.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_time"
    assert json.loads(call.function.arguments) == {}


def test_with_auto_the_model_calls_or_answers(client: openai.OpenAI, model: str) -> None:
    auto = client.chat.completions.create(model=model, messages=WEATHER, tools=[TOOL], temperature=0, max_tokens=60)
    choice = auto.choices[0]
    if choice.message.tool_calls:
        assert choice.finish_reason == "tool_calls"
    else:
        assert choice.message.content
        assert choice.finish_reason in ("stop", "length")
    none = client.chat.completions.create(
        model=model, messages=WEATHER, tools=[TOOL], tool_choice="none", temperature=0, max_tokens=20
    )
    assert none.choices[0].message.content
    assert not none.choices[0].message.tool_calls


def test_a_streamed_call_adds_up_to_the_whole_one(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model,
        messages=WEATHER,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    name, identifier, arguments, finish = "", "", "", None
    for chunk in client.chat.completions.create(
        model=model,
        messages=WEATHER,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
        stream=True,
    ):
        finish = chunk.choices[0].finish_reason or finish
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            assert delta.function is not None
            identifier += delta.id or ""
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (name, arguments, finish) == ("get_weather", call.function.arguments, "tool_calls")
    assert identifier.startswith("call_")


def test_a_tools_result_is_answered(client: openai.OpenAI, model: str) -> None:
    asked = client.chat.completions.create(
        model=model,
        messages=WEATHER,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    messages: list[ChatCompletionMessageParam] = [*WEATHER, asked.choices[0].message.to_dict()]  # type: ignore[list-item]
    for call in asked.choices[0].message.tool_calls or []:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21, "sky": "clear"}'})
    answer = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], temperature=0, max_tokens=40)
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls
    assert answer.usage is not None
    assert asked.usage is not None
    assert answer.usage.prompt_tokens > asked.usage.prompt_tokens + 10, "call and result are part of the prompt"


def test_parse_gives_a_pydantic_model(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format=City,
        temperature=0,
        max_tokens=100,
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_parse_gives_a_tools_arguments(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": "Describe Paris."}],
        tools=[openai.pydantic_function_tool(City)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, City)


def test_json_mode_gives_an_object(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": 'Answer in JSON: {"capital": "..."} of France'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=400,
    )
    content = answer.choices[0].message.content or ""
    assert content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


def test_the_stream_helper_gives_events_and_a_parsed_end(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format=City,
        temperature=0,
        max_tokens=100,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(deltas) > 3
    assert "".join(deltas) == final.choices[0].message.content
    assert isinstance(final.choices[0].message.parsed, City)


def test_errors_are_the_clients_own(client: openai.OpenAI, url: str, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=FRANCE)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=model, messages=FRANCE, temperature=9)
    assert wrong.value.param == "temperature"
    assert wrong.value.type == "invalid_request_error"
    assert wrong.value.request_id
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=FRANCE, max_tokens=10**6)
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_the_raw_response_has_the_requests_id(client: openai.OpenAI, model: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model=model, messages=FRANCE, max_tokens=1)
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    assert answer._request_id == raw.headers["x-request-id"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1
