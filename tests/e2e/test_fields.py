"""What the fields of OpenAI's two routes do to real answers of the real model."""

import math
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.default_model import ENGINES, MODEL, real, says
from tests.e2e.conftest import Server

PROMPT = "The capital of France is"


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_n_greedy_answers_are_one_and_sampled_ones_differ(client: Any) -> None:
    greedy = client.completions.create(model=MODEL, prompt=PROMPT, n=3, temperature=0, max_tokens=8)
    assert len({choice.text for choice in greedy.choices}) == 1
    assert [choice.index for choice in greedy.choices] == [0, 1, 2]
    assert greedy.usage is not None
    assert greedy.usage.completion_tokens == 24
    sampled = client.completions.create(model=MODEL, prompt="Once", n=4, seed=5, max_tokens=16)
    assert len({choice.text for choice in sampled.choices}) > 1
    again = client.completions.create(model=MODEL, prompt="Once", n=4, seed=5, max_tokens=16)
    assert again.choices[0].text == sampled.choices[0].text


def test_every_prompt_of_a_list_gets_the_answer_that_it_gets_alone(client: Any) -> None:
    prompts = [PROMPT, "Two plus two is", "The opposite of hot is"]
    together = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6)
    alone = [client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6) for prompt in prompts]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]


def test_alternatives_are_the_likeliest_and_the_greedy_token_is_their_first(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say hello."}],
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=5,
    )
    assert answer.choices[0].logprobs is not None
    for entry in answer.choices[0].logprobs.content or ():
        tops = entry.top_logprobs
        assert len(tops) == 5
        assert [top.logprob for top in tops] == sorted((top.logprob for top in tops), reverse=True)
        assert tops[0].token == entry.token
        assert tops[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
        assert sum(math.exp(top.logprob) for top in tops) <= 1.0001


def test_a_prompts_scores_are_those_that_the_model_gave_when_it_wrote_it(client: Any) -> None:
    written = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=10, logprobs=3)
    first = written.choices[0]
    scored = client.completions.create(
        model=MODEL, prompt=PROMPT + first.text, temperature=0, max_tokens=0, echo=True, logprobs=3
    )
    choice = scored.choices[0]
    assert choice.text == PROMPT + first.text
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert choice.logprobs is not None
    assert first.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.tokens[-10:] == first.logprobs.tokens
    # A prompt's chunk is computed by other kernels than a step of one row, and the weights are int4.
    assert choice.logprobs.token_logprobs[-10:] == pytest.approx(first.logprobs.token_logprobs, abs=0.3)


def test_a_bias_forces_and_forbids(client: Any) -> None:
    plain = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logprobs=2)
    text = plain.choices[0].text
    (token,) = _tokens(text)
    without = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logit_bias={str(token): -100})
    assert without.choices[0].text != text
    other = (token + 1000) % 40000
    forced = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logit_bias={str(other): 100}, logprobs=0
    )
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or ())) == 1


@real("only one that has learnt text repeats what a prompt repeats")
def test_penalties_end_a_repetition_and_a_reward_begins_one(client: Any) -> None:
    def words(**fields: float) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt="na na na na na na na na na na na", temperature=0, max_tokens=24, extra_body=fields
        )
        written: str = answer.choices[0].text
        return written.split()

    plain = words().count("na")
    assert plain > 4
    assert words(frequency_penalty=2).count("na") < plain
    assert words(presence_penalty=2, frequency_penalty=1).count("na") < plain
    assert "na" not in words(repetition_penalty=2)
    assert words(frequency_penalty=-2) == ["na"] * 24


@real("it has to end its answer by itself")
def test_an_answer_has_as_many_tokens_as_it_has_to(client: Any) -> None:
    ask = [{"role": "user", "content": "Answer with one word: yes or no?"}]
    short = client.chat.completions.create(model=MODEL, messages=ask, temperature=0, max_tokens=64)
    assert short.choices[0].finish_reason == "stop"
    length = short.usage.completion_tokens
    longer = client.chat.completions.create(
        model=MODEL, messages=ask, temperature=0, max_tokens=length + 20, extra_body={"min_tokens": length + 10}
    )
    assert longer.usage.completion_tokens >= length + 10


def test_a_stop_token_ends_the_answer_before_itself(client: Any) -> None:
    plain = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, logprobs=0)
    assert plain.choices[0].logprobs is not None
    tokens = plain.choices[0].logprobs.tokens or []
    (third,) = _tokens(tokens[2])
    stopped = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, extra_body={"stop_token_ids": [third]}
    )
    assert stopped.choices[0].text == "".join(tokens[: tokens.index(tokens[2])])
    assert stopped.choices[0].finish_reason == "stop"


def test_the_last_message_is_continued(client: Any) -> None:
    turns = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=turns, temperature=0, max_tokens=5, extra_body={"continue_final_message": True}
    )
    assert says(answer.choices[0].message.content, "Paris")


def _tokens(text: str) -> list[int]:
    return Tokenizer.from_file(str(ENGINES / MODEL / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_what_a_request_leaves_out_is_as_the_models_card_recommends(client: Any) -> None:
    """Token for token what a request gets that says so; and not what it gets at OpenAI's temperature of 1."""
    ask = [{"role": "user", "content": "Why is the sky blue?"}]

    def answer(**fields: Any) -> Any:
        made = client.chat.completions.create(model=MODEL, messages=ask, max_tokens=24, seed=5, **fields)
        return made.choices[0].message.content

    assert answer() == answer(temperature=0.2, top_p=0.9)
    assert answer() != answer(temperature=1, top_p=1)


def test_the_example_of_the_readme_answers_the_question(client: Any) -> None:
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    for seed in range(3):
        chunks = client.chat.completions.create(model=MODEL, stream=True, messages=ask, max_tokens=40, seed=seed)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert says(text, "Paris")
