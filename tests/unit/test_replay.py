"""The worker without an engine: what it says to a front end that speaks the real protocol over a real socket."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bench import http
from runtime.messages import Generate, Row
from server.engine_client import EngineClient
from tests.waiting import HANGS_SECONDS

TOKENS = [7, 8, 9]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of the running process, which ends when its parent does."""
    found = f"ipc://{tmp_path}/replay"
    command = [sys.executable, "-m", "bench.replay", f"--socket={found}", "--tokens", *map(str, TOKENS), "--slots=3"]
    process = subprocess.Popen([*command, "--row-tokens=2", "--steps=200"], stdin=subprocess.PIPE)
    yield found
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(HANGS_SECONDS) == 0


@pytest.fixture
async def client(address: str) -> AsyncIterator[EngineClient]:
    client = EngineClient(address)
    await asyncio.wait_for(client.attach(), HANGS_SECONDS)
    yield client
    client.close(ConnectionError("the test is over"))


async def rows(client: EngineClient, max_tokens: int) -> list[Row]:
    """A whole answer."""
    with client.generate(Generate("", [1], max_tokens)) as answer:
        found: list[Row] = []
        while not found or found[-1].finish is None:
            found += await asyncio.wait_for(answer.rows(), HANGS_SECONDS)
        return found


async def test_it_says_what_it_is(client: EngineClient) -> None:
    assert client.ready is not None
    assert (client.ready.slots, client.ready.model) == (3, "replay")
    assert client.ready.pid != os.getpid()


async def test_an_answer_repeats_the_tokens_and_is_as_long_as_was_asked_for(client: EngineClient) -> None:
    found = await rows(client, 7)
    assert [len(row.tokens) for row in found] == [2, 2, 2, 1]
    assert [row.finish for row in found] == [None, None, None, "length"]
    said = [token for row in found for token in row.tokens]
    begin = TOKENS.index(said[0])
    assert said == [TOKENS[(begin + place) % 3] for place in range(7)]


async def test_answers_run_beside_each_other(client: EngineClient) -> None:
    lengths = [sum(len(row.tokens) for row in found) for found in await asyncio.gather(*(rows(client, n) for n in (5, 40, 9)))]
    assert lengths == [5, 40, 9]


async def test_a_cancelled_answer_leaves_the_others_alone(client: EngineClient) -> None:
    with client.generate(Generate("", [1], 10_000)) as answer:
        await asyncio.wait_for(answer.rows(), HANGS_SECONDS)
    assert len(await rows(client, 4)) == 2
    assert client.in_flight == 0


async def test_events_are_counted_however_their_bytes_are_cut() -> None:
    stream = http.Stream("/v1/chat/completions", b"{}")
    answer = b'HTTP/1.1 200 OK\r\n\r\n1f\r\ndata: {"a":1}\n\ndata: {"b":2}\n\n\r\n0\r\ndata: [DONE]\n\n'
    for place in range(len(answer)):
        stream.data_received(answer[place : place + 1])
    assert stream.events == 2
