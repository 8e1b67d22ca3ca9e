"""Google's google-genai client."""

from collections.abc import Iterator
from typing import Literal

import pytest
from google import genai
from google.genai import errors, types
from pydantic import BaseModel, Field

FRANCE = "Complete the sentence: The capital of France is"
GREEDY = types.GenerateContentConfig(temperature=0, max_output_tokens=40)
WEATHER = types.FunctionDeclaration(
    name="get_weather",
    description="The weather of a city now.",
    parameters=types.Schema(
        type=types.Type.OBJECT,
        properties={
            "city": types.Schema(type=types.Type.STRING, max_length=40),
            "unit": types.Schema(type=types.Type.STRING, enum=["celsius", "fahrenheit"]),
        },
        required=["city", "unit"],
    ),
)


class City(BaseModel):
    name: str = Field(max_length=40)
    continent: Literal["Africa", "America", "Asia", "Europe"]


@pytest.fixture
def client(url: str, key: str) -> Iterator[genai.Client]:
    with genai.Client(api_key=key, http_options=types.HttpOptions(base_url=url)) as client:
        yield client


def test_content_is_generated_with_its_usage(client: genai.Client, model: str) -> None:
    answer = client.models.generate_content(model=model, contents=FRANCE, config=GREEDY)
    assert "Paris" in (answer.text or "")
    assert answer.candidates
    assert answer.candidates[0].finish_reason == types.FinishReason.STOP
    usage = answer.usage_metadata
    assert usage is not None
    assert usage.total_token_count == (usage.prompt_token_count or 0) + (usage.candidates_token_count or 0)
    cut = client.models.generate_content(
        model=model, contents=FRANCE, config=types.GenerateContentConfig(temperature=0, max_output_tokens=2)
    )
    assert cut.candidates
    assert cut.candidates[0].finish_reason == types.FinishReason.MAX_TOKENS


def test_a_stream_adds_up_to_the_whole(client: genai.Client, model: str) -> None:
    whole = client.models.generate_content(model=model, contents=FRANCE, config=GREEDY)
    chunks = list(client.models.generate_content_stream(model=model, contents=FRANCE, config=GREEDY))
    assert len(chunks) > 3
    assert "".join(chunk.text or "" for chunk in chunks) == whole.text
    assert whole.usage_metadata is not None
    assert chunks[-1].usage_metadata is not None
    assert chunks[-1].usage_metadata.candidates_token_count == whole.usage_metadata.candidates_token_count


async def test_the_asynchronous_client_streams(client: genai.Client, model: str) -> None:
    stream = await client.aio.models.generate_content_stream(model=model, contents=FRANCE, config=GREEDY)
    assert "Paris" in "".join([chunk.text or "" async for chunk in stream])


def test_a_chat_remembers_what_was_said(client: genai.Client, model: str) -> None:
    chat = client.chats.create(
        model=model,
        config=types.GenerateContentConfig(system_instruction="You are polite.", temperature=0, max_output_tokens=20),
    )
    first = chat.send_message("My name is Ada.")
    second = chat.send_message("What is my name?")
    assert first.usage_metadata is not None
    assert second.usage_metadata is not None
    assert (second.usage_metadata.prompt_token_count or 0) > (first.usage_metadata.prompt_token_count or 0) + 10
    assert len(chat.get_history()) == 4
    assert "".join(chunk.text or "" for chunk in chat.send_message_stream("Thank you."))


def test_several_candidates_are_given(client: genai.Client, model: str) -> None:
    config = types.GenerateContentConfig(candidate_count=2, seed=1, max_output_tokens=16)
    answer = client.models.generate_content(model=model, contents="Tell me a story.", config=config)
    assert len(answer.candidates or []) == 2


def test_a_function_is_called_and_its_result_answered(client: genai.Client, model: str) -> None:
    config = types.GenerateContentConfig(
        tools=[types.Tool(function_declarations=[WEATHER])],
        tool_config=types.ToolConfig(
            function_calling_config=types.FunctionCallingConfig(mode=types.FunctionCallingConfigMode.ANY)
        ),
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        temperature=0,
        max_output_tokens=100,
    )
    question = types.Content(role="user", parts=[types.Part.from_text(text="What is the weather in Paris?")])
    asked = client.models.generate_content(model=model, contents=[question], config=config)
    assert asked.function_calls
    call = asked.function_calls[0]
    assert call.name == "get_weather"
    assert set(call.args or {}) == {"city", "unit"}
    assert asked.candidates
    assert asked.candidates[0].content is not None
    result = types.Part.from_function_response(name="get_weather", response={"degrees": 21})
    answer = client.models.generate_content(
        model=model,
        contents=[question, asked.candidates[0].content, types.Content(role="user", parts=[result])],
        config=types.GenerateContentConfig(
            tools=[types.Tool(function_declarations=[WEATHER])], temperature=0, max_output_tokens=40
        ),
    )
    assert answer.candidates
    assert answer.candidates[0].content is not None
    assert answer.candidates[0].content.parts


def test_a_streamed_call_is_the_whole_one(client: genai.Client, model: str) -> None:
    config = types.GenerateContentConfig(
        tools=[types.Tool(function_declarations=[WEATHER])],
        tool_config=types.ToolConfig(
            function_calling_config=types.FunctionCallingConfig(
                mode=types.FunctionCallingConfigMode.ANY, allowed_function_names=["get_weather"]
            )
        ),
        temperature=0,
        max_output_tokens=100,
    )
    question = "What is the weather in Paris?"
    whole = client.models.generate_content(model=model, contents=question, config=config)
    chunks = client.models.generate_content_stream(model=model, contents=question, config=config)
    calls = [call for chunk in chunks for call in chunk.function_calls or []]
    assert [call.args for call in calls] == [call.args for call in whole.function_calls or []]
    assert calls


def test_a_pydantic_schema_gives_a_pydantic_model(client: genai.Client, model: str) -> None:
    config = types.GenerateContentConfig(
        response_mime_type="application/json", response_schema=City, temperature=0, max_output_tokens=100
    )
    answer = client.models.generate_content(model=model, contents="Describe Paris.", config=config)
    assert isinstance(answer.parsed, City)


def test_a_json_schema_is_kept_to(client: genai.Client, model: str) -> None:
    config = types.GenerateContentConfig(
        response_mime_type="application/json",
        response_json_schema=City.model_json_schema(),
        temperature=0,
        max_output_tokens=100,
    )
    answer = client.models.generate_content(model=model, contents="Describe Paris.", config=config)
    City.model_validate_json(answer.text or "")


def test_tokens_are_counted_as_they_are_used(client: genai.Client, model: str) -> None:
    counted = client.models.count_tokens(model=model, contents=FRANCE)
    used = client.models.generate_content(model=model, contents=FRANCE, config=GREEDY).usage_metadata
    assert used is not None
    assert counted.total_tokens == used.prompt_token_count


def test_the_models_are_listed_and_described(client: genai.Client, model: str) -> None:
    assert f"models/{model}" in [each.name for each in client.models.list()]
    assert client.models.get(model=model).name == f"models/{model}"


def test_errors_are_the_clients_own(client: genai.Client, url: str, model: str) -> None:
    with pytest.raises(errors.ClientError) as missing:
        client.models.generate_content(model="gemini-9", contents=FRANCE)
    assert (missing.value.code, missing.value.status) == (404, "NOT_FOUND")
    with pytest.raises(errors.ClientError) as wrong:
        client.models.generate_content(model=model, contents=FRANCE, config=types.GenerateContentConfig(temperature=9))
    assert (wrong.value.code, wrong.value.status) == (400, "INVALID_ARGUMENT")
    stranger = genai.Client(api_key="wrong", http_options=types.HttpOptions(base_url=url))
    with pytest.raises(errors.ClientError) as unknown:
        stranger.models.generate_content(model=model, contents=FRANCE)
    assert (unknown.value.code, unknown.value.status) == (401, "UNAUTHENTICATED")
