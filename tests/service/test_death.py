"""Processes that die, hang or are told to end, while requests run."""

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.service.conftest import Running, events, gone, serve
from tests.waiting import HANGS_SECONDS

PROMPT = [5, 6, 7, 8, 9]


async def test_a_hung_engine_is_replaced_and_what_it_had_not_begun_is_answered(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--watchdog-seconds=4") as running:
        (pid,) = await running.pids("alpha@")
        expected = await running.answer("alpha", PROMPT)
        os.kill(pid, signal.SIGSTOP)
        assert await running.answer("alpha", PROMPT) == expected
        assert gone([pid])
        assert await running.metric("engineshed_worker_restarts_total", model="alpha") == 1


async def test_a_hung_http_process_is_replaced(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--watchdog-seconds=4") as running:
        (front,) = await running.pids("http-")
        os.kill(front, signal.SIGSTOP)
        await running.until(lambda: gone([front]))
        await running.until(lambda: _answers(running))
        assert (await running.answer("alpha", PROMPT))[0] == 200
        assert await running.metric("engineshed_process_restarts_total", process="http-0") == 1


async def test_a_dead_http_process_is_replaced_and_its_requests_are_cancelled(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--slots=2") as running:
        (engine,) = await running.pids("alpha@")
        (front,) = await running.pids("http-")
        counted = await running.metric("engineshed_generated_tokens_total")
        await running.answer("alpha", PROMPT)
        os.kill(engine, signal.SIGSTOP)
        asking = [asyncio.create_task(running.answer("alpha", PROMPT, 240)) for _ in range(4)]
        await running.passed_on()
        os.kill(front, signal.SIGKILL)
        for request in asking:
            with pytest.raises(aiohttp.ClientError):
                await request
        os.kill(engine, signal.SIGCONT)
        await running.until(lambda: _answers(running))
        await running.settled()
        assert await running.pids("alpha@") == [engine]
        (new,) = await running.pids("http-")
        assert new != front
        assert await running.metric("engineshed_generated_tokens_total") >= counted, "what was counted stays counted"
        assert await running.metric("engineshed_process_restarts_total", process="http-0") == 1
        assert (await running.answer("alpha", PROMPT))[0] == 200


async def _answers(running: Running) -> bool:
    try:
        async with running.http.get("/readyz") as response, running.admin.get("/admin/status") as status:
            return response.status == status.status == 200
    except OSError:
        return False


async def _refuses(running: Running) -> bool:
    return not await _answers(running)


async def test_several_http_processes_share_the_port_and_count_as_one(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--http-processes=3") as running:
        expected = await running.answer("alpha", PROMPT)
        said = await asyncio.gather(*(running.answer("alpha", PROMPT) for _ in range(60)))
        assert {text for _, text in said} == {expected[1]}
        assert await running.metric("engineshed_requests_total", route="/v1/completions", status="200") == 61
        busy = [pid for pid in await running.pids("http-") if psutil.Process(pid).num_fds() > 0]
        assert len(busy) == 3


@pytest.mark.parametrize("hung", [False, True])
async def test_nothing_outlives_a_supervisor_that_is_killed(engines: Path, hung: bool) -> None:
    async with serve(engines, "--model=alpha", "--http-processes=2") as running:
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) == 3
        if hung:
            for process in family:
                process.suspend()
        await running.stop(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, HANGS_SECONDS)
        assert not alive


async def test_a_server_that_is_told_to_stop_lets_answers_finish(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--drain-seconds=100") as running:
        async with running.held("alpha", PROMPT, 240) as (answers, engine):
            stopping = asyncio.create_task(running.stop())
            await running.until(lambda: _refuses(running))
            os.kill(engine, signal.SIGCONT)
            assert events(await answers)[1]
        assert await stopping == 0


async def test_answers_that_do_not_finish_in_time_hold_up_no_stop(engines: Path) -> None:
    options = ("--model=alpha", "--drain-seconds=0.3", "--context=510")
    async with serve(engines, *options) as running, running.held("alpha", PROMPT, 500):
        assert await running.stop() == 0
