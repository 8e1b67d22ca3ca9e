"""Completions and models by the openai client."""

import openai

PROMPT = "The capital of France is"


def test_a_completion_whole_and_streamed_is_the_same(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8)
    assert "Paris" in whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    chunks = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI, model: str) -> None:
    prompts = [PROMPT, "One, two, three, four,"]
    both = client.completions.create(model=model, prompt=prompts, temperature=0, max_tokens=4)
    assert [choice.index for choice in both.choices] == [0, 1]
    alone = [client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=4) for prompt in prompts]
    assert [choice.text for choice in both.choices] == [answer.choices[0].text for answer in alone]
    assert both.usage is not None
    assert both.usage.completion_tokens == 8


def test_a_prompt_is_echoed_and_scored(client: openai.OpenAI, model: str) -> None:
    scored = client.completions.create(model=model, prompt=PROMPT, echo=True, logprobs=2, temperature=0, max_tokens=0)
    assert scored.choices[0].text == PROMPT
    told = scored.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == PROMPT
    assert told.token_logprobs is not None
    first, *others = list[float | None](told.token_logprobs)
    assert first is None, "nothing stands before the first token"
    assert all(logprob is not None and logprob <= 0 for logprob in others)
    assert told.top_logprobs is not None
    assert all(2 <= len(tops) <= 3 for tops in told.top_logprobs[1:] if tops is not None), "two, and the prompt's own"


def test_tokens_make_a_prompt(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=[504, 3575, 282, 4649, 314], temperature=0, max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.choices[0].text


def test_a_stop_string_ends_the_answer(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8, stop=["aris"])
    assert answer.choices[0].text.endswith("P")
    assert answer.choices[0].finish_reason == "stop"


def test_the_models_are_listed_and_described(client: openai.OpenAI, model: str) -> None:
    assert model in [each.id for each in client.models.list()]
    assert client.models.retrieve(model).owned_by == "engineshed"
