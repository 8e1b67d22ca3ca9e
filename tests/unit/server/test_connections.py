"""Many connections on one HTTP process, quick and slow ones: the real process, over `bench.replay` as its worker."""

import asyncio
import json
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from bench.http import front
from runtime.bundle import Bundle
from runtime.text import Text
from server import files
from server.engine_client import PENDING_TOKENS
from server.supervision.process import EngineProcess
from tests.waiting import HANGS_SECONDS

IDLE, STREAMS, TOKENS = 1000, 200, 60
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SLOW_READERS = 5
PROMPTS = "engineshed_prompt_tokens_total"
"""Of answers that have begun; each byte is a token."""
MOST_FOR_A_READER = 2 * 2**20
"""Bytes that a slow reader may cost: PENDING_TOKENS with what Python makes of them, and what asyncio and malloc add."""

Front = tuple[int, psutil.Process]
Start = Callable[..., Front]


@pytest.fixture
def start(tmp_path: Path, bundle: Bundle, text: Text) -> Iterator[Start]:
    """Starts an HTTP process whose worker answers everything with the alphabet, over and over; gives its port and itself."""
    with ExitStack() as stack:

        def start(**options: float) -> Front:
            files.allow_most()
            worker = [sys.executable, "-m", "bench.replay", f"--model={bundle.name}", f"--vocab={bundle.vocab_size}"]
            worker += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            worker += ["--tokens", *map(str, text.encode(ALPHABET))]
            engine = stack.enter_context(EngineProcess(worker))
            return stack.enter_context(front(bundle, tmp_path, engine.address))

        yield start


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(HANGS_SECONDS)) as session:
        yield session


class Idler:
    """A keep-alive connection that is only now and then asked for something."""

    async def open(self, port: int) -> "Idler":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def ask(self) -> bytes:
        """The status line of an answer on this connection."""
        self._writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await asyncio.wait_for(self._reader.readuntil(b"}"), HANGS_SECONDS)
        return answer.partition(b"\r\n")[0]

    def close(self) -> None:
        self._writer.close()


async def stream(http: aiohttp.ClientSession, port: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """The events of one chat, which must end as a whole one does."""
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as response:
        assert response.status == 200
        *events, done, after = (await response.text()).split("\n\n")
    assert (done, after) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_streams_beside_idle_connections_get_all_their_tokens_and_the_idle_ones_stay(
    start: Start, http: aiohttp.ClientSession
) -> None:
    port, _ = start(steps=60.0, context=4096)
    idle = [await Idler().open(port) for _ in range(IDLE)]
    assert {await idler.ask() for idler in idle} == {b"HTTP/1.1 200 OK"}
    answers = await asyncio.gather(*(stream(http, port) for _ in range(STREAMS)))
    for *chunks, last in answers:
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert len(text) == TOKENS
        assert text in ALPHABET * (2 + TOKENS // len(ALPHABET)), "a token is missing, doubled or out of its place"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert last["usage"]["completion_tokens"] == TOKENS
    assert {await idler.ask() for idler in idle} == {b"HTTP/1.1 200 OK"}
    for idler in idle:
        idler.close()


async def test_an_engine_that_is_quicker_than_this_process_gets_no_reader_cancelled_who_keeps_up(
    start: Start, http: aiohttp.ClientSession
) -> None:
    port, _ = start(row_tokens=16, context=10**6)  # and no pause between its steps
    tokens = 100 * PENDING_TOKENS
    for answer in await asyncio.gather(*(stream(http, port, tokens) for _ in range(4))):
        assert answer[-1]["usage"]["completion_tokens"] == tokens


async def numbers(http: aiohttp.ClientSession, port: int) -> dict[str, float]:
    """What /metrics says."""
    async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {
        name.partition("{")[0]: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


async def until(http: aiohttp.ClientSession, port: int, name: str, value: float) -> None:
    """Wait for a metric."""
    async with asyncio.timeout(HANGS_SECONDS):
        while (await numbers(http, port)).get(name) != value:
            await asyncio.sleep(0.05)


async def test_clients_that_stop_reading_cost_little_memory_and_no_slot(start: Start, http: aiohttp.ClientSession) -> None:
    port, process = start(steps=1000.0, row_tokens=32, context=10**6)
    await stream(http, port)
    before = process.memory_info().rss
    begun = (await numbers(http, port))[PROMPTS]
    body = json.dumps({"prompt": "hi", "max_tokens": 900_000, "stream": True, "logprobs": 0}).encode()
    readers = []
    for _ in range(SLOW_READERS):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port))
        reader.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        readers.append(reader)
    await until(http, port, PROMPTS, begun + SLOW_READERS * len("hi"))
    await until(http, port, "engineshed_requests_running", 0)  # They were cancelled: nothing else would end them.
    assert process.memory_info().rss - before < SLOW_READERS * MOST_FOR_A_READER
    await stream(http, port)  # and who reads gets an answer
    for reader in readers:
        reader.close()


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes() -> None:
    code = "import resource, server.files; print(server.files.allow_most(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = ["bash", "-c", 'ulimit -Sn 64 && exec "$0" -c "$1"', sys.executable, code]
    hard = str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.split() == [hard, hard, hard]


async def test_a_client_of_http_1_0_gets_its_stream_without_chunks(start: Start) -> None:
    port, _ = start(steps=100.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": "hi", "max_tokens": TOKENS}).encode()
    writer.write(b"POST /v1/generate HTTP/1.0\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head, _, text = (await asyncio.wait_for(reader.read(), HANGS_SECONDS)).decode().partition("\r\n\r\n")
    assert "chunked" not in head
    assert len(text) == TOKENS
    assert text in ALPHABET * (2 + TOKENS // len(ALPHABET))
    writer.close()


async def test_the_gauge_of_running_requests_is_exact_at_every_scrape(start: Start, http: aiohttp.ClientSession) -> None:
    """Heartbeats come once a second; here none of 40 scrapes reads an old one."""
    port, _ = start(steps=50.0, context=10**6)
    body = {"prompt": "hi", "max_tokens": 900_000, "stream": True}
    streams: list[aiohttp.ClientResponse] = []
    for count in range(1, 21):
        streams.append(await http.post(f"http://127.0.0.1:{port}/v1/completions", json=body))
        assert (await numbers(http, port))["engineshed_requests_running"] == count
    for response in streams:
        response.close()
    await until(http, port, "engineshed_requests_running", 0)
    for _ in range(20):
        await http.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "hi", "max_tokens": 2})
        assert (await numbers(http, port))["engineshed_requests_running"] == 0
