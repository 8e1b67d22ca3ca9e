"""LangChain's ChatOpenAI."""

from typing import Literal

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field, SecretStr

FRANCE = "Complete the sentence: The capital of France is"


@tool  # type: ignore[untyped-decorator]
def get_weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather of a city now."""
    return f"21 {unit} in {city}"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=40)
    continent: Literal["Africa", "America", "Asia", "Europe"]


@pytest.fixture(params=["chat completions", "responses"])
def chat(request: pytest.FixtureRequest, url: str, key: str, model: str) -> ChatOpenAI:
    """By each of the two APIs that it speaks."""
    return ChatOpenAI(
        base_url=f"{url}/v1",
        api_key=SecretStr(key),
        model=model,
        temperature=0,
        max_completion_tokens=100,
        max_retries=0,
        use_responses_api=request.param == "responses",
    )


def test_an_answer_whole_and_streamed_is_the_same(chat: ChatOpenAI) -> None:
    whole = chat.invoke(FRANCE)
    assert "Paris" in whole.text
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 1
    chunks = list(chat.stream(FRANCE))
    assert len(chunks) > 3
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_a_batch_is_answered_in_its_order(chat: ChatOpenAI) -> None:
    prompts = [FRANCE, "Complete the sentence: One, two, three,"]
    both = chat.batch(prompts)
    assert "Paris" in both[0].text
    assert both[1].text


async def test_the_asynchronous_client_streams(url: str, key: str, model: str) -> None:
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=SecretStr(key), model=model, temperature=0, max_completion_tokens=20)
    assert "Paris" in "".join([chunk.text async for chunk in chat.astream(FRANCE)])


def test_a_bound_tool_is_called_and_its_result_answered(chat: ChatOpenAI) -> None:
    question = HumanMessage("What is the weather in Paris, in celsius?")
    asked = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False, strict=True).invoke([question])
    (call,) = asked.tool_calls
    assert call["name"] == "get_weather"
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools([get_weather]).invoke([question, asked, result])
    assert answer.text or answer.tool_calls


def test_a_streamed_call_adds_up(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([get_weather], tool_choice="get_weather")
    total: AIMessageChunk | None = None
    for chunk in bound.stream("What is the weather in Paris, in celsius?"):
        assert isinstance(chunk, AIMessageChunk)
        total = chunk if total is None else total + chunk
    assert total is not None
    assert set(total.tool_calls[0]["args"]) == {"city", "unit"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_a_pydantic_model(chat: ChatOpenAI, method: Literal["json_schema", "function_calling"]) -> None:
    assert isinstance(chat.with_structured_output(City, method=method).invoke("Describe Paris."), City)


def test_a_completion_goes_on_with_its_prompt(url: str, key: str, model: str) -> None:
    plain = OpenAI(base_url=f"{url}/v1", api_key=SecretStr(key), model=model, temperature=0, max_tokens=8, max_retries=0)
    whole = plain.invoke("The capital of France is")
    assert "Paris" in whole
    assert "".join(plain.stream("The capital of France is")) == whole
