"""litellm, by its OpenAI and its Anthropic provider."""

import json
import os
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read on import, which would fetch a list of prices otherwise

import litellm

FRANCE = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
REQUIRED = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0, "max_tokens": 100}
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: str = Field(max_length=40)
    continent: Literal["Africa", "America", "Asia", "Europe"]


@pytest.fixture(params=["openai", "anthropic"])
def there(request: pytest.FixtureRequest, url: str, key: str, model: str) -> dict[str, Any]:
    """The arguments that point litellm at the server, by each provider."""
    base = f"{url}/v1" if request.param == "openai" else url
    return {"model": f"{request.param}/{model}", "api_base": base, "api_key": key, "max_retries": 0}


def test_a_completion_whole_and_streamed_is_the_same(there: dict[str, Any]) -> None:
    whole = litellm.completion(**there, messages=FRANCE, temperature=0, max_tokens=40)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 1
    chunks = list(
        litellm.completion(
            **there, messages=FRANCE, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == whole.usage.completion_tokens


async def test_an_asynchronous_completion_is_answered(there: dict[str, Any]) -> None:
    answer = await litellm.acompletion(**there, messages=FRANCE, temperature=0, max_tokens=20)
    assert "Paris" in answer.choices[0].message.content
    stream = await litellm.acompletion(**there, messages=FRANCE, temperature=0, max_tokens=20, stream=True)
    assert "Paris" in "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_a_tool_is_called_and_its_result_answered(there: dict[str, Any]) -> None:
    asked = litellm.completion(**there, messages=WEATHER, tools=[TOOL], **REQUIRED).choices[0]
    assert asked.finish_reason == "tool_calls"
    for call in asked.message.tool_calls:
        assert call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city"}
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in asked.message.tool_calls]
    answer = litellm.completion(
        **there, messages=[*WEATHER, asked.message, *results], tools=[TOOL], temperature=0, max_tokens=40
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls


def test_a_streamed_call_adds_up(there: dict[str, Any]) -> None:
    chunks = list(litellm.completion(**there, messages=WEATHER, tools=[TOOL], **REQUIRED, stream=True))
    calls = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city"}


def test_a_pydantic_schema_is_kept_to(url: str, key: str, model: str) -> None:
    answer = litellm.completion(
        model=f"openai/{model}",
        api_base=f"{url}/v1",
        api_key=key,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format=City,
        temperature=0,
        max_tokens=100,
    )
    City.model_validate_json(answer.choices[0].message.content)


def test_a_wrong_key_is_an_authentication_error(there: dict[str, Any]) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**there, "api_key": "wrong"}, messages=FRANCE, max_tokens=1)


def test_a_wrong_value_is_a_bad_request(there: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**there, messages=FRANCE, temperature=9, max_tokens=1)
