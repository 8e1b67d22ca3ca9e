"""One completion as the bench times it, from servers that are as wrong as servers can be."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.client import Answer, FailedError, ask, gaps

ENDING = 'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
DONE = "data: [DONE]\n\n"


def usage(prompt: int, completion: int) -> str:
    counted = (
        f'{{"prompt_tokens": {prompt}, "completion_tokens": {completion}, "prompt_tokens_details": {{"cached_tokens": 3}}}}'
    )
    return f'data: {{"choices": [], "usage": {counted}}}\n\n'


def text(words: str) -> str:
    return f'data: {{"id": "1", "choices": [{{"index": 0, "text": "{words}", "finish_reason": null}}]}}\n\n'


async def asked(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], seconds: float = 10) -> Answer:
    """What the bench makes of a server that answers with `handler`."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        return await ask(session, server.make_url("/v1/completions"), b"{}", time.perf_counter(), seconds)


def streaming(*parts: str, pause: float = 0.0) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A server that sends these parts, one after the other."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part.encode())
            await asyncio.sleep(pause)
        return response

    return handler


async def test_an_answer_has_a_first_token_gaps_and_what_usage_counts() -> None:
    answer = await asked(streaming(text("a"), text("b"), text("c"), ENDING, usage(7, 3), DONE))
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens, answer.events) == (3, 7, 3, 3)
    assert len(answer.gaps) == 2
    assert 0 < answer.first <= answer.first + sum(answer.gaps) <= answer.whole


async def test_events_may_be_cut_anywhere_and_end_in_either_newline() -> None:
    whole = "".join((text("a"), text("b"), ": a comment\r\n\r\n", ENDING, usage(7, 2), DONE)).replace("\n", "\r\n")
    answer = await asked(streaming(*(whole[i : i + 7] for i in range(0, len(whole), 7)), pause=0.001))
    assert (answer.tokens, answer.events) == (2, 2)


async def test_a_token_without_text_is_a_token_and_an_ending_without_text_is_not() -> None:
    answer = await asked(streaming(text("a"), text(""), text("b"), ENDING, DONE))
    assert (answer.tokens, answer.events) == (3, 3)


async def test_an_answer_without_usage_counts_its_events() -> None:
    answer = await asked(streaming(text("a"), text("b"), ENDING, DONE))
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (2, 0, None)


async def test_usage_in_every_event_tells_how_many_tokens_each_brought() -> None:
    def told(words: str, count: int) -> str:
        return text(words).replace("]}\n", f'], "usage": {{"prompt_tokens": 7, "completion_tokens": {count}}}}}\n')

    answer = await asked(streaming(told("a", 1), told("bcd", 4), told("e", 5), ENDING, DONE, pause=0.03))
    assert answer.tokens == 5
    assert len(answer.gaps) == 4
    assert answer.gaps[0] == answer.gaps[1] == answer.gaps[2]
    assert answer.gaps[3] > 2 * answer.gaps[0]


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ((text("a"), text("b")), "broken"),
        ((text("a"), 'event: error\ndata: {"error": {"message": "out of luck"}}\n\n'), "error event"),
        ((text("a"), "data: {nonsense\n\n", DONE), "unreadable"),
        ((ENDING, usage(7, 0), DONE), "no text"),
    ],
)
async def test_a_stream_that_is_no_answer_says_what_it_was(parts: tuple[str, ...], cause: str) -> None:
    with pytest.raises(FailedError) as failed:
        await asked(streaming(*parts))
    assert failed.value.cause == cause


async def test_a_connection_that_is_cut_is_broken() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(text("a").encode())
        assert request.transport is not None
        request.transport.abort()
        return response

    with pytest.raises(FailedError) as failed:
        await asked(handler)
    assert failed.value.cause == "broken"


async def test_an_answer_that_takes_too_long_has_failed() -> None:
    with pytest.raises(FailedError) as failed:
        await asked(streaming(text("a"), text("b"), ENDING, DONE, pause=0.4), seconds=0.5)
    assert failed.value.cause == "timed out"


@pytest.mark.parametrize("status", [400, 429, 503])
async def test_a_refusal_is_named_by_its_status_and_quoted(status: int) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "the queue is full"}}, status=status)

    with pytest.raises(FailedError, match="the queue is full") as failed:
        await asked(handler)
    assert failed.value.cause == str(status)


async def test_a_redirect_is_not_followed() -> None:
    followed = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.query_string:
            followed.append(request.url)
        raise web.HTTPTemporaryRedirect("/v1/completions?elsewhere")

    with pytest.raises(FailedError) as failed:
        await asked(handler)
    assert failed.value.cause == "307"
    assert followed == []


async def test_nobody_at_the_address_is_no_connection() -> None:
    app = web.Application()
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        address = server.make_url("/v1/completions")
        await server.close()
        with pytest.raises(FailedError) as failed:
            await ask(session, address, b"{}", time.perf_counter(), 10)
    assert failed.value.cause == "no connection"


def test_gaps_of_one_token_an_event_are_the_times_between_events() -> None:
    assert gaps([1.0, 1.5, 3.5], 3) == [0.5, 2.0]


def test_tokens_that_came_along_with_others_leave_the_mean_exact() -> None:
    found = gaps([0.0, 1.0, 2.0, 9.0, 10.0], 11)
    assert len(found) == 10
    assert max(found) == pytest.approx(7.0 * 4 / 10)
    assert sum(gaps([float(i) for i in range(11)], 13)) == pytest.approx(10.0)


def test_a_server_that_sends_several_tokens_at_a_time_is_not_slower_for_it() -> None:
    assert gaps([0.0, 4.0, 8.0], 9) == [1.0] * 8


def test_known_counts_divide_each_gap_by_its_own_tokens() -> None:
    assert gaps([0.0, 3.0, 4.0], 5, [1, 4, 5]) == [1.0, 1.0, 1.0, 1.0]


def test_one_token_has_no_gap() -> None:
    assert gaps([1.0], 1) == []
    assert gaps([1.0], 4) == []
