"""Messages by the anthropic client."""

import asyncio
from collections.abc import Iterator

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam, Usage

FRANCE: list[MessageParam] = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
WEATHER: list[MessageParam] = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY = {"temperature": 0}
"""Of the API, but no argument of the client any more."""
TOOL: ToolParam = {
    "name": "get_weather",
    "description": "The weather of a city now.",
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 40},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


def prompt_tokens(usage: Usage) -> int:
    """Those that were computed and those that were found in a slot."""
    told: int = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    return told


@pytest.fixture
def client(url: str, key: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as client:
        yield client


def test_a_message_is_answered_with_its_usage(client: anthropic.Anthropic, model: str) -> None:
    answer = client.messages.create(model=model, max_tokens=40, messages=FRANCE, extra_body=GREEDY)
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == ("message", "assistant", model, "end_turn")
    (block,) = answer.content
    assert block.type == "text"
    assert "Paris" in block.text
    assert prompt_tokens(answer.usage) > 5
    assert answer.usage.output_tokens > 1
    cut = client.messages.create(model=model, max_tokens=2, messages=FRANCE, extra_body=GREEDY)
    assert cut.stop_reason == "max_tokens"
    assert cut.usage.output_tokens == 2


def test_the_stream_helper_adds_up_to_the_whole_message(client: anthropic.Anthropic, model: str) -> None:
    whole = client.messages.create(model=model, max_tokens=40, messages=FRANCE, extra_body=GREEDY)
    with client.messages.stream(model=model, max_tokens=40, messages=FRANCE, extra_body=GREEDY) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(texts) > 3
    assert whole.content[0].type == "text"
    assert "".join(texts) == whole.content[0].text
    assert [block.type for block in final.content] == ["text"]
    assert final.stop_reason == whole.stop_reason
    assert prompt_tokens(final.usage) == prompt_tokens(whole.usage)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_events_come_in_their_order(client: anthropic.Anthropic, model: str) -> None:
    events = [
        event.type
        for event in client.messages.create(model=model, max_tokens=8, messages=FRANCE, extra_body=GREEDY, stream=True)
        if event.type != "ping"
    ]
    assert events[:2] == ["message_start", "content_block_start"]
    assert set(events[2:-3]) == {"content_block_delta"}
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


async def test_asynchronous_messages_run_side_by_side(url: str, key: str, model: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as client:
        answers = await asyncio.gather(
            *(client.messages.create(model=model, max_tokens=20, messages=FRANCE, extra_body=GREEDY) for _ in range(3))
        )
    assert all(answer.content[0].type == "text" and "Paris" in answer.content[0].text for answer in answers)


def test_a_system_prompt_and_a_conversation_are_read(client: anthropic.Anthropic, model: str) -> None:
    bare = client.messages.count_tokens(model=model, messages=WEATHER)
    turns: list[MessageParam] = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello Ada!"}]},
        *WEATHER,
    ]
    told = client.messages.count_tokens(model=model, system="Be brief, be polite, and be quick.", messages=turns)
    assert told.input_tokens > bare.input_tokens
    answer = client.messages.create(
        model=model, max_tokens=4, system="Be brief, be polite, and be quick.", messages=turns, extra_body=GREEDY
    )
    assert prompt_tokens(answer.usage) == told.input_tokens, "what is counted is what is used"


def test_a_stop_sequence_ends_the_message(client: anthropic.Anthropic, model: str) -> None:
    answer = client.messages.create(model=model, max_tokens=40, messages=FRANCE, stop_sequences=["Paris"], extra_body=GREEDY)
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == "Paris"
    assert all(block.type == "text" and "Paris" not in block.text for block in answer.content)


def test_a_tool_is_used_and_its_result_answered(client: anthropic.Anthropic, model: str) -> None:
    asked = client.messages.create(
        model=model,
        max_tokens=100,
        messages=WEATHER,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body=GREEDY,
    )
    assert asked.stop_reason == "tool_use"
    (use,) = asked.content
    assert use.type == "tool_use"
    assert use.name == "get_weather"
    assert isinstance(use.input, dict)
    assert set(use.input) == {"city", "unit"}
    answer = client.messages.create(
        model=model,
        max_tokens=40,
        extra_body=GREEDY,
        tools=[TOOL],
        messages=[
            *WEATHER,
            {"role": "assistant", "content": asked.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees, clear"}]},
        ],
    )
    assert answer.content
    assert prompt_tokens(answer.usage) > prompt_tokens(asked.usage) + 10


def test_a_named_tools_input_is_streamed(client: anthropic.Anthropic, model: str) -> None:
    with client.messages.stream(
        model=model,
        max_tokens=100,
        messages=WEATHER,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "get_weather"},
        extra_body=GREEDY,
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (use,) = final.content
    assert use.type == "tool_use"
    assert len(pieces) > 1
    assert isinstance(use.input, dict)
    assert set(use.input) == {"city", "unit"}
    assert final.stop_reason == "tool_use"


def test_errors_are_the_clients_own(client: anthropic.Anthropic, url: str, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude-9", max_tokens=4, messages=FRANCE)
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(model=model, max_tokens=4, messages=FRANCE, extra_body={"temperature": 9})
    assert wrong.value.type == "invalid_request_error"
    stranger = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as unknown:
        stranger.messages.create(model=model, max_tokens=4, messages=FRANCE)
    assert unknown.value.type == "authentication_error"


def test_a_bearer_token_opens_the_server_too(url: str, key: str, model: str) -> None:
    with anthropic.Anthropic(base_url=url, auth_token=key, api_key=None, max_retries=0) as client:
        assert client.messages.count_tokens(model=model, messages=FRANCE).input_tokens > 5
