"""A model's workers on several devices: one dies, one is given up, all are; played by processes without an engine."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from runtime.bundle import Bundle
from runtime.devices import Device
from runtime.messages import Ready
from runtime.text import Text
from server.supervision import workers
from server.supervision.catalog import Entry
from server.supervision.deployment import Deployment
from server.supervision.launch import Launch
from server.supervision.placement import Seat
from server.supervision.workers import Worker
from tests.unit.server.house import service_for, serving
from tests.waiting import HANGS_SECONDS

SCRIPT = [sys.executable, "-P", "-m", "tests.unit.server.scripted_process"]
HOPELESS = [sys.executable, "-c", "raise SystemExit(2)", "--"]


@asynccontextmanager
async def deployed(bundle: Bundle, *commands: Sequence[str]) -> AsyncIterator[Deployment]:
    """A deployment with a worker for each command, on cpu#1, cpu#2, ..."""
    entry = Entry("tiny", Path("tiny"), bundle, "build")
    launches = [
        Launch(Seat(f"cpu#{number}", Device("cpu"), 100), "cpu-int4", list(command), 10, "why")
        for number, command in enumerate(commands, start=1)
    ]
    deployment = Deployment(entry, launches, 60.0, lambda: None)
    try:
        async with asyncio.timeout(HANGS_SECONDS):
            yield deployment
    finally:
        await deployment.stop()


async def until_ready(worker: Worker) -> Ready:
    """What a worker says of itself, as soon as it takes requests."""
    while worker.client is None or worker.client.ready is None:
        await asyncio.sleep(0.01)
    return worker.client.ready


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def stream(http: aiohttp.ClientSession, tokens: int) -> aiohttp.ClientResponse:
    """An answer of so many tokens, of which the first is there."""
    response = await http.post("/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": tokens})
    await response.content.readline()
    return response


async def test_a_worker_that_dies_is_replaced_and_the_others_answers_go_on(
    bundle: Bundle, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BACK_OFF_SECONDS", (0.5,))
    async with deployed(bundle, SCRIPT, SCRIPT) as deployment:
        pair = deployment.workers
        first, second = [(await until_ready(worker)).pid for worker in pair]
        async with serving(service_for(bundle, text, *pair)) as http:
            broken = await stream(http, 60)
            os.kill(first, signal.SIGSTOP)
            whole = await stream(http, 60)
            os.kill(first, signal.SIGKILL)
            assert "engine_unavailable" in await broken.text()
            assert (await http.get("/readyz")).status == 200
            assert (await http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3})).status == 200
            assert (await whole.text()).endswith("data: [DONE]\n\n")
        assert (await until_ready(pair[0])).pid != first
        assert (await until_ready(pair[1])).pid == second
        assert [worker.restarts for worker in pair] == [1, 0]


async def test_a_worker_that_cannot_load_is_left_out_and_reported_while_the_others_serve(
    bundle: Bundle, text: Text, caplog: pytest.LogCaptureFixture
) -> None:
    async with deployed(bundle, HOPELESS, SCRIPT) as deployment:
        await until_ready(deployment.workers[1])
        while not deployment.settled or not deployment.reasons:
            await asyncio.sleep(0.01)
        assert "cpu#1 is left out of tiny: the engine cannot be loaded" in caplog.text
        assert [worker.state for worker in deployment.describe().workers] == ["given up", "ready"]
        assert deployment.ready
        assert not deployment.given_up
        async with (
            serving(service_for(bundle, text, *deployment.workers)) as http,
            http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3}) as response,
        ):
            assert (await response.json())["choices"][0]["text"] == "xxx"


async def test_when_all_are_given_up_so_is_the_deployment(bundle: Bundle) -> None:
    async with deployed(bundle, HOPELESS, HOPELESS) as deployment:
        while not deployment.given_up:
            await asyncio.sleep(0.01)
        assert [reason.partition(":")[0] for reason in sorted(deployment.reasons)] == ["cpu#1", "cpu#2"]


async def test_a_worker_that_dies_three_times_before_it_answers_is_given_up(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BACK_OFF_SECONDS", (0.01,))
    async with deployed(bundle, [sys.executable, "-c", "raise SystemExit(7)", "--"]) as deployment:
        while not deployment.given_up:
            await asyncio.sleep(0.01)
        assert deployment.reasons == ["cpu#1: the engine's process died 3 times in a row, the last time with code 7"]
        assert deployment.workers[0].restarts == 2


async def test_the_processes_end_at_the_same_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STOP_SECONDS", 2.0)
    async with deployed(bundle, *[[*SCRIPT, "--deaf"]] * 4) as deployment:
        pids = [(await until_ready(worker)).pid for worker in deployment.workers]
        begin = asyncio.get_running_loop().time()
        await deployment.stop()
        assert asyncio.get_running_loop().time() - begin < 8, "one after another they would take eight seconds"
        assert not any(map(exists, pids))


async def test_workers_take_no_thread_of_those_that_tokenize(bundle: Bundle) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    async with deployed(bundle, SCRIPT) as deployment:
        await until_ready(deployment.workers[0])
        assert await asyncio.to_thread(int, "1") == 1
