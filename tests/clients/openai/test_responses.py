"""Responses by the openai client."""

import json
from typing import Literal

import openai
import pytest
from openai.types.responses import FunctionToolParam, ResponseInputParam
from pydantic import BaseModel, Field

PROMPT = "Complete the sentence: The capital of France is"
TOOL: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city now.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class City(BaseModel):
    name: str = Field(max_length=40)
    continent: Literal["Africa", "America", "Asia", "Europe"]


def test_a_response_is_text_with_its_usage(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.create(model=model, input=PROMPT, temperature=0, max_output_tokens=40)
    assert answer.status == "completed"
    assert "Paris" in answer.output_text
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    cut = client.responses.create(model=model, input=PROMPT, temperature=0, max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_instructions_and_a_conversation_are_read(client: openai.OpenAI, model: str) -> None:
    turns: ResponseInputParam = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": [{"type": "input_text", "text": "What is my name?"}]},
    ]
    answer = client.responses.create(
        model=model, instructions="You are polite.", input=turns, temperature=0, max_output_tokens=20
    )
    assert answer.output_text
    assert answer.usage is not None
    plain = client.responses.create(model=model, input="What is my name?", temperature=0, max_output_tokens=1)
    assert plain.usage is not None
    assert answer.usage.input_tokens > plain.usage.input_tokens


def test_a_stream_of_events_adds_up_to_the_response(client: openai.OpenAI, model: str) -> None:
    whole = client.responses.create(model=model, input=PROMPT, temperature=0, max_output_tokens=40)
    events = list(client.responses.create(model=model, input=PROMPT, temperature=0, max_output_tokens=40, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    with client.responses.stream(model=model, input=PROMPT, temperature=0, max_output_tokens=40) as stream:
        assert sum(event.type == "response.output_text.delta" for event in stream) > 1
        assert stream.get_final_response().output_text == whole.output_text


def test_parse_gives_a_pydantic_model(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.parse(
        model=model, input="Describe Paris.", text_format=City, temperature=0, max_output_tokens=100
    )
    assert isinstance(answer.output_parsed, City)


def test_a_function_is_called_and_its_result_answered(client: openai.OpenAI, model: str) -> None:
    asked: ResponseInputParam = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.responses.create(
        model=model,
        input=asked,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=100,
    )
    (call,) = answer.output
    assert call.type == "function_call"
    assert call.name == "get_weather"
    assert set(json.loads(call.arguments)) == {"city"}
    result = client.responses.create(
        model=model,
        input=[
            *asked,
            call.to_dict(),  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'},
        ],
        tools=[TOOL],
        temperature=0,
        max_output_tokens=40,
    )
    assert result.output
    assert result.status in ("completed", "incomplete")


def test_a_streamed_call_comes_in_pieces(client: openai.OpenAI, model: str) -> None:
    events = list(
        client.responses.create(
            model=model,
            input="What is the weather in Paris?",
            tools=[TOOL],
            tool_choice={"type": "function", "name": "get_weather"},
            temperature=0,
            max_output_tokens=100,
            stream=True,
        )
    )
    pieces = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert pieces == done.arguments
    assert set(json.loads(pieces)) == {"city"}


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="gpt-9", input=PROMPT)
    assert missing.value.code == "model_not_found"
