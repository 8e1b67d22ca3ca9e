"""How answers end before their time: the client goes, the client dawdles, the engine fails."""

import asyncio
import json
import socket
from typing import Any

import aiohttp
import msgspec
import pytest

from runtime.messages import Cancel, Generate, Progress, Row
from server import attempts
from server.api import streaming
from server.doors import Limits
from server.engine_client import PENDING_TOKENS, EngineClient, EngineUnavailableError
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
STREAMED = [
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": "hi", "stream": True}),
    ("/v1/generate", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi", "stream": True}),
    ("/v1/messages", {**CHAT, "model": "tiny", "max_tokens": 9, "stream": True}),
]


async def metric(house: House, name: str) -> float:
    async with house.http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


@pytest.mark.parametrize(("path", "body"), STREAMED)
async def test_a_client_that_leaves_a_stream_frees_its_slot_at_once(house: House, path: str, body: dict[str, Any]) -> None:
    response, request = await house.open(path, body, "Hello")
    response.close()
    assert (await house.worker.next(Cancel)).id == request.id


@pytest.mark.parametrize(("path", "body"), [*STREAMED, ("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "hi"})])
async def test_a_client_that_leaves_before_the_first_token_frees_its_slot_at_once(
    house: House, path: str, body: dict[str, Any]
) -> None:
    asking = asyncio.ensure_future(house.http.post(path, json=body))
    request = await house.worker.next(Generate)
    asking.cancel()
    assert (await house.worker.next(Cancel)).id == request.id
    assert await metric(house, f'engineshed_requests_total{{route="{path}",status="499"}}') == 1


async def test_an_answer_that_ended_is_not_cancelled(house: House) -> None:
    response, request = await house.open("/v1/generate", {"prompt": "hi"}, "Hello")
    await house.worker.say(request, "!", "stop")
    assert await response.text() == "Hello!"
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "again"}))
    await house.worker.say(await house.worker.next(Generate), "!", "stop")  # and no Cancel came before it
    assert (await asking).status == 200


async def test_an_engine_that_fails_before_the_first_token_is_a_status(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    await house.worker.fail(await house.worker.next(Generate), "the step failed")
    response = await asking
    assert response.status == 500
    assert (await response.json())["error"]["message"] == "the step failed"


def lose(house: House) -> None:
    """The engine dies, and its connection with it."""
    assert house.engine.client is not None
    house.engine.client.close(EngineUnavailableError("The engine stopped."))
    house.engine.client = None


async def replace(house: House) -> None:
    """Another engine takes its place."""
    house.engine.client = EngineClient(house.worker.address)
    await house.engine.client.attach()


@pytest.mark.parametrize(("path", "body"), STREAMED)
async def test_a_request_whose_engine_is_lost_before_the_first_token_is_asked_for_again(
    house: House, path: str, body: dict[str, Any]
) -> None:
    asking = asyncio.ensure_future(house.http.post(path, json=body))
    first = await house.worker.next(Generate)
    lose(house)
    await replace(house)
    again = await house.worker.next(Generate)
    assert msgspec.structs.replace(again, id=first.id) == first  # the random seed, too
    await house.worker.say(again, "Hello", "stop")
    response = await asking
    assert response.status == 200
    assert "Hello" in await response.text()


async def test_a_request_whose_engine_is_lost_waits_no_longer_than_its_patience(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 0.1)
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi"}))
    await house.worker.next(Generate)
    lose(house)
    response = await asking
    assert response.status == 503
    assert "no other was ready" in (await response.json())["error"]["message"]


async def test_a_request_that_ends_every_engine_is_not_asked_for_forever(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi"}))
    for _ in range(attempts.MOST):
        await house.worker.next(Generate)
        lose(house)
        await replace(house)
    response = await asking
    assert response.status == 503
    assert (await response.json())["error"]["message"] == "The engine stopped."
    assert house.worker.received.empty()


@pytest.mark.parametrize(("path", "body"), STREAMED[:2])
async def test_a_stream_that_has_begun_ends_with_its_engine(house: House, path: str, body: dict[str, Any]) -> None:
    response, _ = await house.open(path, body, "Hello")
    lose(house)
    await replace(house)
    assert "The engine stopped." in await response.text()
    assert house.worker.received.empty()


@pytest.mark.parametrize(("path", "body"), STREAMED[:2])
async def test_an_engine_that_fails_in_a_stream_ends_it_with_an_error_event(
    house: House, path: str, body: dict[str, Any]
) -> None:
    response, request = await house.open(path, body, "Hello")
    await house.worker.fail(request, "the step failed")
    *_, last = (await response.text()).removesuffix("\n\n").split("\n\n")
    kind, data = last.split("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"] == {
        "message": "the step failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert await metric(house, f'engineshed_requests_total{{route="{path}",status="500"}}') == 1


async def test_an_engine_that_fails_in_json_lines_ends_them_with_an_error(house: House) -> None:
    response, request = await house.open("/v1/generate", {"prompt": "hi"}, "Hello", {"Accept": "application/x-ndjson"})
    await house.worker.fail(request, "the step failed")
    first, last = (await response.text()).splitlines()
    assert json.loads(first)["text"] == "Hello"
    assert json.loads(last)["error"]["message"] == "the step failed"


async def test_an_engine_that_fails_in_plain_text_breaks_the_connection_off(house: House) -> None:
    response, request = await house.open("/v1/generate", {"prompt": "hi"}, "Hello")
    await house.worker.fail(request, "the step failed")
    with pytest.raises(aiohttp.ClientPayloadError):
        await response.read()


async def dawdler(house: House) -> tuple[socket.socket, Generate]:
    """A client that asks for an answer and takes as little as TCP allows, and what the worker got."""
    url = house.http._base_url
    assert url is not None
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (url.host, url.port))
    body = json.dumps({**CHAT, "stream": True, "logprobs": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    await asyncio.get_running_loop().sock_sendall(client, head + body)
    return client, await house.worker.next(Generate)


async def flood(house: House, request: Generate) -> int:
    """Answer, each row in time for the next, until the request is cancelled; gives the tokens that it took."""
    text = "x" * (PENDING_TOKENS // 4)
    for sent in range(1000):
        if not house.worker.received.empty():
            assert (await house.worker.next(Cancel)).id == request.id
            return sent * len(text)
        await house.worker.say(request, text)
        await asyncio.sleep(0.005)
    raise AssertionError("the request was never cancelled")


async def test_a_client_that_reads_too_slowly_is_cancelled_before_its_answer_piles_up(house: House) -> None:
    client, request = await dawdler(house)
    tokens = await flood(house, request)
    assert tokens > 4 * PENDING_TOKENS, "the kernel's buffers take more than that before anything waits"
    client.close()


async def drained(client: socket.socket) -> bytes:
    """All that was sent to the client, until the server's end."""
    received = b""
    while data := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 65536), HANGS_SECONDS):
        received += data
    client.close()
    return received


async def test_a_client_that_takes_nothing_is_dropped(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.2)
    client, request = await dawdler(house)
    await flood(house, request)
    async with asyncio.timeout(HANGS_SECONDS):
        while house.service.requests:  # until it has been given up
            await asyncio.sleep(0.05)
    received = await drained(client)
    assert b"event: error" not in received
    assert not received.endswith(b"0\r\n\r\n"), "the stream must not look whole"


async def test_a_slow_reader_that_comes_back_is_told_why_its_answer_ends(house: House) -> None:
    client, request = await dawdler(house)
    await flood(house, request)
    received = await drained(client)
    assert b"event: error" in received
    assert b"slow_reader" in received


async def test_an_answer_that_cannot_keep_to_its_form_is_400_with_the_reason(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi"}))
    request = await house.worker.next(Generate)
    message = "the constraint cannot be kept to: too many states"
    await house.worker.send(Progress([Row(request.id, [], [], "unmet", message=message)]))
    response = await asking
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "constraint_unmet")
    assert "too many states" in error["message"]


async def test_a_request_that_runs_out_of_time_is_504(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi"}))
    request = await house.worker.next(Generate)
    await house.worker.send(
        Progress([Row(request.id, [], [], "timeout", message="it waited 3 s for a slot, and may wait 3 s")])
    )
    response = await asking
    assert response.status == 504
    assert (await response.json())["error"]["code"] == "timeout"


async def test_the_servers_limits_go_with_every_request(house: House) -> None:
    house.service.limits = Limits(300.0, 600.0)
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi"}))
    request = await house.worker.next(Generate)
    assert 0 < request.queue_seconds < 300.0, "less what has passed already"
    assert 300 < request.total_seconds < 600.0
    await house.worker.say(request, "!", "stop")
    assert (await asking).status == 200
