"""One HTTP process under many connections, readers that are too slow, and the admin socket's permissions."""

import asyncio
import os
import re
import resource
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from server import open_files
from tests.service.conftest import ROOT, Running, events, serve

PROMPT = [5, 6, 7, 8, 9]
IDLE, STREAMS = 1000, 200


@pytest.fixture(autouse=True)
async def many_files() -> AsyncIterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files.raise_limit()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def connect(running: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(running.url)
    return await asyncio.open_connection(address.hostname, address.port)


async def health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A request on a connection that stays open."""
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    await reader.readexactly(length)


async def test_a_thousand_idle_connections_and_two_hundred_streams_on_one_process(engines: Path) -> None:
    async with serve(
        engines, "--model=alpha", f"--queue={STREAMS}", "--queue-tokens=100000", "--slots=16", seconds=60
    ) as running:
        idle = [await connect(running) for _ in range(IDLE)]
        await asyncio.gather(*(health(*connection) for connection in idle))
        (front,) = await running.pids("http-")
        assert psutil.Process(front).num_fds() > IDLE
        _, alone = await running.answer("alpha", PROMPT, 200)

        async def stream() -> None:
            async with running.stream("alpha", PROMPT, 200) as response:
                assert events(await response.text()) == (alone, True)

        await asyncio.gather(*(stream() for _ in range(STREAMS)))
        await asyncio.gather(*(health(*connection) for connection in idle))
        for _, writer in idle:
            writer.close()


async def test_a_reader_that_takes_nothing_costs_bounded_memory_and_then_its_answer(engines: Path) -> None:
    """The engine makes tokens as fast as it can; the client's window and the server's buffers are full after some of them."""
    async with serve(engines, "--model=alpha", "--context=510", "--slots=2", seconds=60) as running:
        (front,) = await running.pids("http-")
        body = (
            '{"model":"alpha","prompt":[5,6,7],"max_tokens":500,"temperature":0,"ignore_eos":true,"stream":true,'
            '"logprobs":0,"stream_options":{"include_usage":true,"continuous_usage_stats":true}}'
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        request = (head + body).encode()
        await running.answer("alpha", PROMPT, 200)
        before = psutil.Process(front).memory_info().rss
        stuck = [await connect(running) for _ in range(40)]
        for reader, writer in stuck:
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(request * 30)
        await asyncio.sleep(3)
        grown = psutil.Process(front).memory_info().rss - before
        assert grown < 64 << 20, f"{grown >> 20} MiB for 40 readers that take nothing"
        assert (await running.answer("alpha", PROMPT, 20))[0] == 200
        for _, writer in stuck:
            writer.transport.abort()
        await running.settled()


async def test_the_admin_socket_and_the_workers_are_their_owners_alone(engines: Path) -> None:
    async with serve(engines, "--model=alpha") as running:
        mode = os.stat(engines.parent / "admin.sock").st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        for process in psutil.Process(running.process.pid).children():
            sockets = [part.partition("ipc://")[2] for part in process.cmdline() if "--socket=ipc://" in part]
            for path in sockets:
                assert stat.S_IMODE(os.stat(Path(path).parent).st_mode) == 0o700
        async with running.http.get("/admin/status") as response:
            assert response.status == 403, "a port is open to everybody"
        for name in ("../alpha", "..%2Falpha", "alpha%00", "%2e%2e"):
            async with running.admin.post(f"/admin/models/{name}/load") as response:
                assert response.status in (404, 405), name


async def test_the_metrics_name_model_and_device_and_tell_what_was_done(engines: Path) -> None:
    async with serve(engines, "--model=alpha") as running:
        for _ in range(3):
            await running.answer("alpha", [*range(10, 60)], 20)
        await running.settled()
        async with asyncio.timeout(5):
            while await running.metric("engineshed_engine_generated_tokens_total", model="alpha") < 60:
                await asyncio.sleep(0.1)
        where = {"model": "alpha", "device": "cpu"}
        assert await running.metric("engineshed_generated_tokens_total", **where) == 60
        assert await running.metric("engineshed_prompt_tokens_total", **where) == 150
        assert await running.metric("engineshed_cached_prompt_tokens_total", **where) >= 64
        assert await running.metric("engineshed_time_to_first_token_seconds_count", **where) == 3
        assert await running.metric("engineshed_inter_token_seconds_count", **where) == 57
        assert await running.metric("engineshed_queue_seconds_count", **where) == 3
        steps = await running.metric("engineshed_engine_steps_total", **where)
        assert await running.metric("engineshed_step_seconds_count", **where) == steps > 3
        decodes = await running.metric("engineshed_engine_decode_steps_total", **where)
        assert await running.metric("engineshed_batch_rows_count", **where) == decodes
        assert await running.metric("engineshed_engine_finished_total", **where) == 3
        for process in ("supervisor", "http-0", "alpha@cpu"):
            assert await running.metric("engineshed_process_resident_bytes", process=process) > 10 << 20


async def test_the_dashboard_asks_for_nothing_that_is_not_told(engines: Path) -> None:
    asked = set(re.findall(r"engineshed_\w+", (ROOT / "docs/grafana.json").read_text()))
    async with serve(engines, "--model=alpha") as running:
        await running.answer("alpha", PROMPT)
        async with running.http.get("/metrics") as response:
            told = set(re.findall(r"^engineshed_\w+", await response.text(), re.MULTILINE))
    assert len(asked) > 20
    assert asked - told == set()


async def test_a_request_names_itself_in_every_answer(engines: Path) -> None:
    async with serve(engines, "--model=alpha") as running:
        headers = {"X-Request-Id": "mine"}
        body = {"model": "alpha", "prompt": PROMPT, "max_tokens": 3}
        async with running.http.post("/v1/completions", json=body, headers=headers) as response:
            assert response.headers["X-Request-Id"] == "mine"
        async with aiohttp.ClientSession() as other, other.get(f"{running.url}/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["alpha", "beta", "gamma"]
