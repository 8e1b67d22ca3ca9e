"""Answers, whole and streamed, of the three generating routes."""

import asyncio
import json
import re
from typing import Any

import aiohttp
import pytest

from runtime.messages import Cancel, Generate, Sampling
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def whole(house: House, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with house.http.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def events(house: House, path: str, body: dict[str, Any]) -> list[Any]:
    """Each event's data of a stream, `[DONE]` as it is."""
    async with house.http.post(path, json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        return parse(await response.text())


def parse(stream: str) -> list[Any]:
    blocks = stream.removesuffix("\n\n").split("\n\n")
    data = [block.removeprefix("data: ") for block in blocks]
    return [json.loads(one) if one != "[DONE]" else one for one in data]


async def test_a_chat_is_laid_out_by_the_template_and_answered_whole(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "model": "tiny", "max_tokens": 9}))
    request = await house.worker.next(Generate)
    assert house.text.stream().push(request.prompt) == "u:hi\na:"
    assert (request.max_tokens, request.stop_ids) == (9, [255])
    await house.worker.say(request, "Hello", cached=3)
    await house.worker.say(request, " you", "stop")
    answer = await asking
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert re.fullmatch("fp_[0-9a-f]{10}", answer["system_fingerprint"])
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello you", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 9,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_streamed_chat_gives_the_role_then_each_text_then_the_reason_and_the_usage(house: House) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    response, request = await house.open("/v1/chat/completions", body, "He")
    await house.worker.say(request, "llo", "length")
    *chunks, usage, done = parse(await response.text())
    assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "He"}, None),
        ({"content": "llo"}, None),
        ({}, "length"),
    ]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert done == "[DONE]"


async def test_a_stream_says_nothing_of_usage_unless_asked(house: House) -> None:
    asking = asyncio.create_task(events(house, "/v1/completions", {"prompt": "hi"}))
    await house.worker.say(await house.worker.next(Generate), "yes", "stop")
    *chunks, done = await asking
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["yes", ""]


async def test_an_answer_without_a_token_is_still_a_whole_stream(house: House) -> None:
    asking = asyncio.create_task(events(house, "/v1/chat/completions", CHAT))
    await house.worker.say(await house.worker.next(Generate), "", "stop")
    role, last, done = await asking
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


async def test_half_a_character_waits_for_its_other_half(house: House) -> None:
    asking = asyncio.create_task(events(house, "/v1/completions", {"prompt": "hi"}))
    request = await house.worker.next(Generate)
    await house.worker.tokens(request, house.text.encode("é"))
    await house.worker.say(request, "!", "stop")
    *chunks, _ = await asking
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "é!"
    assert not any("�" in chunk["choices"][0]["text"] for chunk in chunks)


async def test_a_stop_string_ends_the_answer_before_it_and_frees_the_slot(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hi", "stop": ["END", "\n"]}))
    request = await house.worker.next(Generate)
    await house.worker.say(request, "one E")
    await house.worker.say(request, "ND two")
    answer = await asking
    assert answer["choices"][0]["text"] == "one "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len("one END")
    assert (await house.worker.next(Cancel)).id == request.id


async def test_what_could_have_been_a_stop_string_is_given_at_the_end(house: House) -> None:
    asking = asyncio.create_task(events(house, "/v1/completions", {"prompt": "hi", "stop": "END"}))
    await house.worker.say(await house.worker.next(Generate), "one EN", "length")
    *chunks, _ = await asking
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one EN"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_chat_logprobs_name_each_chosen_token(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "logprobs": True}))
    await house.worker.say(await house.worker.next(Generate), "é", "stop")
    logprobs = (await asking)["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in logprobs] == [[0xC3], [0xA9]]
    assert [entry["logprob"] for entry in logprobs] == [-0.5, -0.5]
    assert logprobs[0]["top_logprobs"] == []


async def test_completion_logprobs_carry_offsets_through_a_stream(house: House) -> None:
    response, request = await house.open("/v1/completions", {"prompt": "hi", "logprobs": 0, "stream": True}, "ab")
    await house.worker.say(request, "c", "stop")
    *chunks, _ = parse(await response.text())
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert len(logprobs) == 2
    assert [token for each in logprobs for token in each["tokens"]] == ["a", "b", "c"]
    assert [offset for each in logprobs for offset in each["text_offset"]] == [0, 1, 2]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [71, 72]])
async def test_a_prompt_is_a_text_one_text_in_a_list_or_tokens(house: House, prompt: Any) -> None:
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": prompt}))
    request = await house.worker.next(Generate)
    assert request.prompt == [71, 72]
    await house.worker.say(request, "!", "stop")
    assert (await asking)["object"] == "text_completion"


async def test_sampling_fields_reach_the_engine_and_default_to_openais(house: House) -> None:
    fields = {"temperature": 0.3, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": -1, "unheard_of": True}
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hi", **fields}))
    request = await house.worker.next(Generate)
    assert request.sampling == Sampling(0.3, 5, 0.9, 0.1, 2**63 - 1)
    await house.worker.say(request, "!", "stop")
    await asking
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hi", "temperature": None}))
    request = await house.worker.next(Generate)
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p, request.sampling.min_p) == (
        1,
        0,
        1,
        0,
    )
    await house.worker.say(request, "!", "stop")
    await asking


async def test_wishes_for_guesses_and_endings_reach_the_engine(house: House) -> None:
    fields = {"speculation": False, "ignore_eos": True}
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hi", **fields}))
    request = await house.worker.next(Generate)
    assert (request.speculation, request.stop_ids, request.prediction) == (False, [], [])
    await house.worker.say(request, "!", "stop")
    await asking
    chat = {"messages": [{"role": "user", "content": "hi"}], "prediction": {"type": "content", "content": "Hi!"}}
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", chat))
    request = await house.worker.next(Generate)
    assert (request.speculation, request.prediction) == (True, house.worker.text.encode("Hi!"))
    assert request.stop_ids
    await house.worker.say(request, "!", "stop")
    await asking


async def test_every_chunk_tells_the_usage_so_far_if_that_is_wanted(house: House) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "hi", "stream": True, "stream_options": options}
    asking = asyncio.create_task(house.http.post("/v1/completions", json=body))
    request = await house.worker.next(Generate)
    await house.worker.say(request, "ab")
    response = await asking
    first = json.loads((await response.content.readline())[6:])
    await house.worker.say(request, "c", "stop")
    events = [first] + [json.loads(line[6:]) async for line in response.content if line.startswith(b"data: {")]
    texts = [event["usage"]["completion_tokens"] for event in events if event["choices"] and event["choices"][0]["text"]]
    assert texts == [2, 3]
    assert events[-1]["usage"]["completion_tokens"] == 3


async def test_without_max_tokens_the_answer_may_fill_the_context(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "hello"}))
    request = await house.worker.next(Generate)
    assert request.max_tokens == 64 - 5
    await house.worker.say(request, "!", "stop")
    await asking


async def test_max_completion_tokens_wins_over_max_tokens(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", {**CHAT, "max_tokens": 9, "max_completion_tokens": 5}))
    request = await house.worker.next(Generate)
    assert request.max_tokens == 5
    await house.worker.say(request, "!", "stop")
    await asking


async def test_text_parts_stand_on_lines_of_their_own_and_a_developer_is_the_system(house: House) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]}
    asking = asyncio.create_task(whole(house, "/v1/chat/completions", body))
    request = await house.worker.next(Generate)
    assert house.text.stream().push(request.prompt) == "s:s\nu:a\nb\na:"
    await house.worker.say(request, "!", "stop")
    await asking


async def test_a_nul_in_a_prompt_is_a_character_like_others(house: House) -> None:
    asking = asyncio.create_task(whole(house, "/v1/completions", {"prompt": "a\0b"}))
    request = await house.worker.next(Generate)
    assert len(request.prompt) == 3
    await house.worker.say(request, "\0", "stop")
    assert (await asking)["choices"][0]["text"] == "\0"


async def test_generate_sends_a_chunk_as_soon_as_its_text_exists(house: House) -> None:
    response, request = await house.open("/v1/generate", {"prompt": "hi"}, "one ")
    assert await chunk(response) == b"one "
    await house.worker.say(request, "two")
    assert await chunk(response) == b"two"
    await house.worker.say(request, "!", "stop")
    assert await chunk(response) == b"!"
    assert await response.read() == b""
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["Transfer-Encoding"] == "chunked"


async def test_generate_gives_json_lines_to_who_accepts_them(house: House) -> None:
    response, request = await house.open("/v1/generate", {"prompt": "hi"}, "ab", {"Accept": "application/x-ndjson"})
    await house.worker.say(request, "c", "length")
    assert response.content_type == "application/x-ndjson"
    first, second, last = [json.loads(line) for line in (await response.text()).splitlines()]
    assert (first["text"], len(first["tokens"]), first["logprobs"]) == ("ab", 2, [-0.5, -0.5])
    assert second["text"] == "c"
    assert last["finish_reason"] == "length"
    assert last["usage"]["total_tokens"] == 5


async def chunk(response: aiohttp.ClientResponse) -> bytes:
    data, _ = await asyncio.wait_for(response.content.readchunk(), HANGS_SECONDS)
    return data


async def test_json_lines_have_the_end_of_the_text_that_was_held_back(house: House) -> None:
    headers = {"Accept": "application/x-ndjson"}
    response, request = await house.open("/v1/generate", {"prompt": "hi", "stop": ["e!"]}, "Hello ther", headers)
    await house.worker.say(request, "e")
    await house.worker.say(request, "", "stop")
    lines = [json.loads(line) for line in (await response.text()).splitlines()]
    assert "".join(line.get("text", "") for line in lines) == "Hello there"
