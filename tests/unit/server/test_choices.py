"""Several answers to one request: `n`, lists of prompts, prompts that are given back, alternatives, calls of tools."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from runtime.bundle import Bundle
from runtime.messages import Cancel, Generate, Progress, Row, Scored
from server.doors import Limits
from tests.unit.server.events import named
from tests.unit.server.house import House
from tests.unit.server.test_generating import CHAT, events, whole

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>'


@pytest.fixture
def bundle(bundle: Bundle) -> Bundle:
    """A model with room for the description of tools."""
    return msgspec.structs.replace(bundle, max_length=2048)


async def requests(house: House, count: int) -> list[Generate]:
    return [await house.worker.next(Generate) for _ in range(count)]


async def test_n_answers_each_have_a_seed_of_their_own_and_the_prompt_counts_once(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "n": 3, "seed": 7}))
    first, second = await requests(house, 2)  # the engine has two slots
    assert first.sampling.seed == 7
    await house.worker.say(first, "one", "stop")
    third = await house.worker.next(Generate)
    await house.worker.say(third, "three!", "length")
    await house.worker.say(second, "two", "stop")
    answer = await asking
    assert len({first.sampling.seed, second.sampling.seed, third.sampling.seed}) == 3
    told = [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"]]
    assert told == [(0, "one", "stop"), (1, "two", "stop"), (2, "three!", "length")]
    assert answer["usage"]["prompt_tokens"] == len(first.prompt)
    assert answer["usage"]["completion_tokens"] == len("one") + len("two") + len("three!")


async def test_the_answers_of_a_stream_come_as_they_are_made_each_with_its_index(house: House) -> None:
    body = {**CHAT, "n": 2, "stream_options": {"include_usage": True}}
    asking = asyncio.create_task(events(house, "/v1/chat/completions", body))
    first, second = await requests(house, 2)
    await house.worker.say(second, "b")
    await house.worker.say(first, "a", "stop")
    await house.worker.say(second, "B", "length")
    *chunks, usage, done = await asking
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    for index, text, finish in ((0, "a", "stop"), (1, "bB", "length")):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == [finish]
    assert usage["usage"]["completion_tokens"] == 3


async def test_when_one_answer_fails_the_request_does_and_the_others_slots_are_free(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi", "n": 2}))
    first, second = await requests(house, 2)
    await house.worker.fail(second, "the engine failed")
    assert (await asking).status == 500
    assert (await house.worker.next(Cancel)).id == first.id


async def test_a_client_that_goes_away_ends_all_of_its_answers(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi", "n": 2}))
    first, second = await requests(house, 2)
    asking.cancel()
    assert {(await house.worker.next(Cancel)).id for _ in range(2)} == {first.id, second.id}


async def test_every_prompt_of_a_list_is_answered_and_counted(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": ["hi", "hello"], "n": 2, "seed": 3}))
    asked = await requests(house, 2)
    for request, text in zip(asked, "ab", strict=True):
        await house.worker.say(request, text, "stop")
    later = await requests(house, 2)
    for request, text in zip(later, "cd", strict=True):
        await house.worker.say(request, text, "stop")
    answer = await asking
    assert [choice["text"] for choice in answer["choices"]] == list("abcd")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [house.text.stream().push(request.prompt) for request in asked + later] == ["hi", "hi", "hello", "hello"]
    assert [request.sampling.seed for request in asked] == [request.sampling.seed for request in later]
    assert answer["usage"]["prompt_tokens"] == len("hi") + len("hello")


async def test_a_list_of_token_lists_is_several_prompts(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": [[71, 72], [73]]}))
    asked = await requests(house, 2)
    assert [request.prompt for request in asked] == [[71, 72], [73]]
    for request in asked:
        await house.worker.say(request, "!", "stop")
    assert len((await asking)["choices"]) == 2


async def test_alternatives_stand_with_each_token_in_both_forms(house: House) -> None:
    a, b = house.text.encode("ab")
    row = Row("", [a], [-0.1], "stop", tops=[[(a, -0.1), (b, -2.5)]])

    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}))
    request = await house.worker.next(Generate)
    assert request.top_logprobs == 2
    await house.worker.send(Progress([_of(row, request)]))
    (entry,) = (await asking)["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == [
        {"token": "a", "logprob": -0.1, "bytes": [97]},
        {"token": "b", "logprob": -2.5, "bytes": [98]},
    ]

    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hi", "logprobs": 2}))
    await house.worker.send(Progress([_of(row, await house.worker.next(Generate))]))
    assert (await asking)["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.1, "b": -2.5}]


async def test_what_cannot_be_chosen_is_told_as_json_can_say_it(house: House) -> None:
    (a,) = house.text.encode("a")
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "logprobs": True}))
    request = await house.worker.next(Generate)
    await house.worker.send(Progress([Row(request.id, [a], [float("-inf")], "stop")]))
    assert (await asking)["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999


async def test_a_prompt_is_given_back_with_its_scores(house: House) -> None:
    (a,) = house.text.encode("a")
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "ab", "echo": True, "logprobs": 1}))
    request = await house.worker.next(Generate)
    assert request.prompt_logprobs
    assert request.top_logprobs == 1
    await house.worker.send(
        Progress([Row(request.id, [a], [-0.25], "stop", tops=[[(a, -0.25)]], prompt=[Scored(-3.0, [(a, -0.5)])])])
    )
    (choice,) = (await asking)["choices"]
    assert choice["text"] == "aba"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "a"],
        "token_logprobs": [None, -3.0, -0.25],
        "top_logprobs": [None, {"a": -0.5, "b": -3.0}, {"a": -0.25}],
        "text_offset": [0, 1, 2],
    }


async def test_a_prompt_is_given_back_at_a_streams_beginning(house: House) -> None:
    asking = asyncio.create_task(events(house, "/v1/completions", {"prompt": "ab", "echo": True}))
    request = await house.worker.next(Generate)
    assert not request.prompt_logprobs
    await house.worker.say(request, "c")
    await house.worker.say(request, "d", "stop")
    *chunks, _ = await asking
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcd"


async def test_a_prompt_can_be_scored_without_an_answer(house: House) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 0}
    asking = asyncio.create_task(whole(house, "/v1/completions", body))
    request = await house.worker.next(Generate)
    assert request.max_tokens == 1  # an engine always takes a step
    await house.worker.send(Progress([Row(request.id, [99], [-1.0], "length", prompt=[Scored(-3.0, [])])]))
    answer = await asking
    assert answer["choices"][0]["text"] == "ab"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -3.0]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


async def test_what_steers_the_choice_of_tokens_reaches_the_engine(house: House) -> None:
    body = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -100, "8": 2.5, "9": 0},
        "min_tokens": 2,
        "stop_token_ids": [3],
    }
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hi", **body}))
    request = await house.worker.next(Generate)
    sampling = request.sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.5)
    assert sampling.logit_bias == {7: -100, 8: 2.5}
    assert (request.min_tokens, request.stop_ids) == (2, [3, 255])
    await house.worker.say(request, "!", "stop")
    await asking


async def test_a_call_of_a_tool_is_told_as_one_and_not_as_text(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "tools": [TOOL]}))
    request = await house.worker.next(Generate)
    assert request.constraint is None
    assert "weather" in house.text.stream().push(request.prompt)  # the template knows no tools, so a message tells of them
    await house.worker.say(request, "Let me see. " + CALL, "stop")
    (choice,) = (await asking)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"place": "Ulm"}


async def test_an_answer_that_only_calls_has_no_content(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "tools": [TOOL]}))
    await house.worker.say(await house.worker.next(Generate), CALL, "stop")
    message = (await asking)["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1


async def test_a_streamed_call_gives_its_name_and_then_its_arguments_piece_by_piece(house: House) -> None:
    *begun, rest = CALL.partition('"place"')
    response, request = await house.open("/v1/chat/completions", {**CHAT, "tools": [TOOL], "stream": True}, "".join(begun))
    written = await response.content.readuntil(b"place")
    await house.worker.say(request, rest, "stop")
    written += await response.read()
    chunks = [data for _, data in named(written.decode().removesuffix("data: [DONE]\n\n"))]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert calls[0]["id"].startswith("call_")
    assert all("id" not in call and "name" not in call["function"] for call in calls[1:])
    assert len(calls) == 3
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"place": "Ulm"}
    assert not any(delta.get("content") for delta in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_an_answer_that_is_cut_off_in_a_call_says_so(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "tools": [TOOL]}))
    await house.worker.say(await house.worker.next(Generate), CALL[:50], "length")
    (choice,) = (await asking)["choices"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    "wish",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]},
    ],
)
async def test_calls_that_must_come_or_must_be_valid_are_constrained(house: House, wish: dict[str, Any]) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "tools": [TOOL], **wish}))
    request = await house.worker.next(Generate)
    assert request.constraint is not None
    assert request.constraint.kind == "lark"
    assert "weather" in request.constraint.source
    await house.worker.say(request, CALL, "stop")
    assert (await asking)["choices"][0]["finish_reason"] == "tool_calls"


async def test_without_tools_or_where_none_may_be_called_text_is_text(house: House) -> None:
    for body in (CHAT, {**CHAT, "tools": [TOOL], "tool_choice": "none"}):
        asking = asyncio.create_task(whole(house, "/v1/chat/completions", body))
        request = await house.worker.next(Generate)
        await house.worker.say(request, CALL, "stop")
        assert (await asking)["choices"][0]["message"]["content"] == CALL


async def test_a_results_turn_goes_back_through_the_template(house: House) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Ulm"}'}}
    turns = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {"messages": turns}))
    request = await house.worker.next(Generate)
    prompt = house.text.stream().push(request.prompt)
    assert 'a:<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>' in prompt
    assert "rain" in prompt.split("</tool_call>")[1]
    await house.worker.say(request, "It rains.", "stop")
    assert (await asking)["choices"][0]["message"]["content"] == "It rains."


async def test_the_last_message_is_continued(house: House) -> None:
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Once"}]
    body: dict[str, Any] = {"messages": turns, "continue_final_message": True}
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", body))
    request = await house.worker.next(Generate)
    assert house.text.stream().push(request.prompt).endswith("Once")
    await house.worker.say(request, " upon", "stop")
    assert (await asking)["choices"][0]["message"]["content"] == " upon"


async def test_a_prompt_that_does_not_fit_is_refused_before_another_is_answered(house: House) -> None:
    for stream in (False, True):
        body = {"prompt": ["hi", "x" * 3000], "stream": stream}
        async with house.http.post("/v1/completions", json=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "context_length_exceeded"
    assert house.worker.received.empty()


async def test_the_time_for_everything_is_that_of_all_answers(house: House) -> None:
    house.service.limits = Limits(total_seconds=100)
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hi", "n": 3}))
    first, second = await requests(house, 2)
    assert 0 < first.total_seconds <= 100
    await asyncio.sleep(0.3)
    await house.worker.say(first, "a", "stop")
    third = await house.worker.next(Generate)
    assert third.total_seconds < first.total_seconds - 0.25
    await house.worker.say(second, "b", "stop")
    await house.worker.say(third, "c", "stop")
    await asking


async def test_without_parallel_calls_an_answer_is_held_to_one(house: House) -> None:
    body = {**CHAT, "tools": [TOOL], "parallel_tool_calls": False}
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", body))
    request = await house.worker.next(Generate)
    assert request.constraint is not None
    await house.worker.say(request, "No.", "stop")
    assert (await asking)["choices"][0]["message"]["content"] == "No."


def _of(row: Row, request: Generate) -> Row:
    return Row(request.id, row.tokens, row.logprobs, row.finish, tops=row.tops)
