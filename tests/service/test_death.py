"""Processes that die, hang or are told to end, while requests run."""

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.service.conftest import Running, events, gone, serve

PROMPT = [5, 6, 7, 8, 9]


async def test_a_hung_engine_is_replaced_and_what_it_had_not_begun_is_answered(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--watchdog-seconds=2") as running:
        (pid,) = await running.pids("alpha@")
        expected = await running.answer("alpha", PROMPT)
        os.kill(pid, signal.SIGSTOP)
        assert await running.answer("alpha", PROMPT) == expected
        assert gone([pid])
        assert await running.metric("engineshed_worker_restarts_total", model="alpha") == 1


async def test_a_dead_http_process_is_replaced_and_its_requests_are_cancelled(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--slots=2") as running:
        (engine,) = await running.pids("alpha@")
        (front,) = await running.pids("http-")
        counted = await running.metric("engineshed_generated_tokens_total")
        async with running.stream("alpha", PROMPT, 240) as response:
            os.kill(engine, signal.SIGSTOP)
            os.kill(front, signal.SIGKILL)
            with pytest.raises(Exception, match=r"(?i)payload|disconnected|reset"):
                await response.text()
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


async def test_several_http_processes_share_the_port_and_count_as_one(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--http-processes=3") as running:
        expected = await running.answer("alpha", PROMPT)
        said = await asyncio.gather(*(running.answer("alpha", PROMPT) for _ in range(60)))
        assert {text for _, text in said} == {expected[1]}
        await asyncio.sleep(1.2)  # by when each has told what it counted
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
        _, alive = psutil.wait_procs(family, 3)
        assert not alive


async def test_a_server_that_is_told_to_stop_lets_answers_finish(engines: Path) -> None:
    async with serve(engines, "--model=alpha") as running:
        async with running.stream("alpha", PROMPT, 240) as response:
            stopping = asyncio.create_task(running.stop())
            assert events(await response.text())[1]
        assert await stopping == 0


async def test_answers_that_do_not_finish_in_time_hold_up_no_stop(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--drain-seconds=0.3") as running:
        (pid,) = await running.pids("alpha@")
        async with running.stream("alpha", PROMPT, 240):
            os.kill(pid, signal.SIGSTOP)
            assert await running.stop() == 0


async def test_streams_requests_deaths_and_hang_ups_leave_everything_as_it_was(engines: Path) -> None:
    """64 streams at once of random prompts, a third of them cut off, and an engine killed every second."""
    chance = random.Random(3)
    prompts = [[chance.randrange(3, 512) for _ in range(chance.randint(1, 60))] for _ in range(64)]
    async with serve(engines, "--model=alpha", "--device=cpu,cpu", "--queue=200", "--http-processes=2", seconds=90) as running:
        alone = [(await running.answer("alpha", prompt, 150))[1] for prompt in prompts]
        outcomes: Counter[str] = Counter()
        stop = asyncio.get_running_loop().time() + 12

        async def client(number: int) -> None:
            own = random.Random(number)
            while asyncio.get_running_loop().time() < stop:
                outcomes[await _one(running, prompts[number], alone[number], own)] += 1

        async def killer() -> None:
            while asyncio.get_running_loop().time() < stop:
                await asyncio.sleep(1.5)
                pids = await running.pids("alpha@")
                if pids:
                    os.kill(chance.choice(pids), signal.SIGKILL)

        await asyncio.gather(killer(), *(client(number) for number in range(64)))
        assert outcomes["whole"] > 64, outcomes
        assert outcomes["cut off"] > 16, outcomes
        assert set(outcomes) <= {"whole", "cut off", "broken", "refused"}, outcomes
        await running.until(lambda: _both_ready(running))
        await running.settled()
        assert await running.metric("engineshed_worker_restarts_total") >= 3
        names = [process["name"] for process in (await running.status())["processes"]]
        assert sorted(names) == ["alpha@cpu#1", "alpha@cpu#2", "http-0", "http-1", "supervisor"]
        assert [(await running.answer("alpha", prompt, 150))[1] for prompt in prompts[:8]] == alone[:8]


async def _one(running: Running, prompt: list[int], alone: str, own: random.Random) -> str:
    """One stream: how it ended. What came of it must be how the answer begins, and all of it if it ended as it should."""
    body = {"model": "alpha", "prompt": prompt, "max_tokens": 150, "temperature": 0, "ignore_eos": True, "stream": True}
    async with running.http.post("/v1/completions", json=body) as response:
        if response.status != 200:
            assert response.status in (429, 503), await response.text()
            return "refused"
        if own.random() < 1 / 3:
            await response.content.readline()
            return "cut off"
        text, whole = events(await response.text())
        assert text == alone if whole else alone.startswith(text)
        return "whole" if whole else "broken"


async def _both_ready(running: Running) -> bool:
    return [engine["state"] for engine in (await running.status())["engines"]] == ["ready", "ready"]
