"""instructor around the openai client."""

from collections.abc import Iterator
from typing import Literal

import instructor
import openai
import pytest
from instructor import Mode
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

PARIS: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Describe Paris as a city, in one line of JSON."}]
CONSTRAINED = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA]
"""In which the server is given the schema; in JSON mode it is a part of the prompt and nothing else."""


class City(BaseModel, extra="forbid"):
    """A city and nothing else: the model would think of more."""

    name: str = Field(max_length=40)
    continent: Literal["Africa", "America", "Asia", "Europe"]
    millions: int = Field(ge=0, le=40)


class Anything(BaseModel, extra="allow"):
    """Any object."""


@pytest.fixture
def client(url: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("mode", CONSTRAINED)
def test_the_answer_is_a_pydantic_model_at_once(client: openai.OpenAI, model: str, mode: Mode) -> None:
    city = instructor.from_openai(client, mode=mode).chat.completions.create(
        model=model, messages=PARIS, response_model=City, temperature=0, max_tokens=100, max_retries=0
    )
    assert isinstance(city, City)


def test_json_mode_gives_an_object(client: openai.OpenAI, model: str) -> None:
    answer = instructor.from_openai(client, mode=Mode.JSON).chat.completions.create(
        model=model, messages=PARIS, response_model=Anything, temperature=0, max_tokens=300, max_retries=0
    )
    assert isinstance(answer, Anything)


@pytest.mark.parametrize("mode", CONSTRAINED)
def test_a_partial_model_grows_as_it_streams(client: openai.OpenAI, model: str, mode: Mode) -> None:
    stream = instructor.from_openai(client, mode=mode).chat.completions.create_partial(
        model=model, messages=PARIS, response_model=City, temperature=0, max_tokens=100, max_retries=0
    )
    states = list(stream)
    assert len(states) > 2
    City.model_validate(states[-1].model_dump())


async def test_the_asynchronous_client_is_answered(url: str, key: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        city = await instructor.from_openai(client, mode=Mode.TOOLS).chat.completions.create(
            model=model, messages=PARIS, response_model=City, temperature=0, max_tokens=100, max_retries=0
        )
    assert isinstance(city, City)
