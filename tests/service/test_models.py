"""Many models in bounded memory: loaded when they are asked for, evicted, unloaded, reloaded, refused, quarantined."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import psutil

from runtime import bundle as bundles
from runtime.footprint import footprint
from tests.service.conftest import MODELS, ROOT, SMALL, Running, events, gone, publish, serve
from tests.waiting import HANGS_SECONDS

PROMPT = [5, 6, 7, 8, 9]
ANSWERED = "engineshed_requests_total"


def need(engines: Path, slots: int = 4) -> int:
    """Bytes that one of the models is reckoned to take."""
    manifest = bundles.read(engines / "alpha")
    return footprint(manifest.variants[0], manifest.vocab_size, slots=slots, context=256).total


def lru_misses(order: list[str], room: int) -> int:
    """How often a model has to be loaded if `room` fit and the one that was used least recently makes room."""
    held: OrderedDict[str, None] = OrderedDict()
    misses = 0
    for model in order:
        if model not in held:
            misses += 1
            if len(held) == room:
                held.popitem(last=False)
        held[model] = None
        held.move_to_end(model)
    return misses


async def watch(running: Running, most: list[int]) -> None:
    """Note the most memory that the engines ever had together."""
    while True:
        engines = [process for process in psutil.Process(running.process.pid).children() if _is_engine(process)]
        most[0] = max(most[0], sum(process.memory_info().rss for process in engines if process.is_running()))
        await asyncio.sleep(0.05)


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "runtime.worker" in process.cmdline()
    except psutil.Error:
        return False


async def test_three_models_share_the_memory_of_two(engines: Path) -> None:
    budget = int(2.2 * need(engines))
    order = random.Random(1).choices(MODELS, k=24)
    async with serve(engines, "--model=alpha", f"--memory={budget}") as running:
        most = [0]
        watching = asyncio.create_task(watch(running, most))
        for model in order:
            status, text = await running.answer(model, PROMPT)
            assert (status, bool(text)) == (200, True), text
        watching.cancel()
        loads = sum(" loading " in line for line in running.log)
        assert loads == lru_misses(["alpha", *order], 2)
        assert 0 < most[0] <= budget
        assert (await running.status())["memory"] == [{"device": "cpu", "budget": budget, "reserved": 2 * need(engines)}]


async def test_requests_for_all_models_at_once_are_all_answered(engines: Path) -> None:
    async with serve(engines, f"--memory={int(2.2 * need(engines))}") as running:
        alone = {model: await running.answer(model, PROMPT) for model in MODELS}
        said = await asyncio.gather(*(running.answer(MODELS[number % 3], PROMPT) for number in range(30)))
        assert said == [alone[MODELS[number % 3]] for number in range(30)]


async def test_models_that_are_never_idle_give_way_in_the_end(engines: Path) -> None:
    async with serve(engines, f"--memory={int(1.1 * need(engines))}") as running:
        going = True

        async def ask(model: str) -> set[int]:
            statuses = set()
            while going:
                statuses.add((await running.answer(model, PROMPT, 100))[0])
            return statuses

        busy = [asyncio.create_task(ask("alpha")) for _ in range(2)]
        await running.until(lambda: _in_state(running, "alpha", "ready"))
        assert (await running.answer("beta", PROMPT))[0] == 200
        going = False
        assert set().union(*await asyncio.gather(*busy)) == {200}


async def test_a_model_that_cannot_fit_is_refused_with_the_arithmetic(engines: Path) -> None:
    config = engines.parent / "serve.toml"
    config.write_text('model = ["alpha"]\n[models.gamma]\nslots = 100000\n[models.beta]\npinned = true\n')
    budget = int(1.1 * need(engines))
    async with serve(engines, f"--config={config}", f"--memory={budget}") as running:
        status, error = await running.answer("gamma", PROMPT)
        assert (status, error["code"]) == (503, "model_refused")
        assert "100000 slots x 256 tokens" in error["message"]
        assert f"cpu may take {budget >> 20:,} MiB" in error["message"]
        status, outcome = await running.act("gamma", "load")
        assert status == 409
        assert "100000 slots" in outcome["error"]["message"]
        assert (await running.answer("alpha", PROMPT))[0] == 200
        assert (await running.answer("beta", PROMPT))[0] == 200, "alpha makes room"
        status, error = await running.answer("alpha", PROMPT)
        assert status == 503
        assert "MiB of beta" in error["message"], "which is pinned"
        status, outcome = await running.act("beta", "reload")
        assert status == 409, "there is no room for two of it"
        assert (await running.answer("beta", PROMPT))[0] == 200


def test_a_server_whose_only_model_does_not_fit_ends_with_the_arithmetic(published: Path) -> None:
    command = [sys.executable, "engineshed.py", "serve", f"--engines={published}", "--port=0", "--memory=50MiB", *SMALL]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_SECONDS)
    assert ended.returncode == 1
    assert "cpu may take 50 MiB" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_request_waits_for_its_model_no_longer_than_it_may(engines: Path) -> None:
    options = ("--slots=1", "--queue-seconds=1", f"--memory={int(1.1 * need(engines, slots=1))}")
    async with serve(engines, "--model=alpha", *options) as running:
        async with running.held("alpha", PROMPT, 240) as (answers, engine):
            status, error = await running.answer("beta", PROMPT)
            assert (status, error["code"]) == (503, "model_not_ready"), "alpha is not idle, and has not been asked to leave yet"
            os.kill(engine, signal.SIGCONT)
            assert events(await answers)[1]
        await running.until(lambda: _answered(running, "beta"))


async def _answered(running: Running, model: str) -> bool:
    return (await running.answer(model, PROMPT))[0] == 200


async def _in_state(running: Running, model: str, state: str) -> bool:
    return (await running.state(model))[0] == state


async def test_unloading_lets_answers_finish_and_gives_the_memory_back(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--drain-seconds=100") as running:
        (pid,) = await running.pids("alpha@")
        async with running.held("alpha", PROMPT, 240) as (answers, engine):
            unloading = asyncio.create_task(running.act("alpha", "unload"))
            await running.until(lambda: _drains(running))
            os.kill(engine, signal.SIGCONT)
            assert events(await answers)[1]
        assert await unloading == (200, {"model": "alpha", "state": "cold"})
        assert gone([pid])
        assert await running.state("alpha") == ("cold", "")
        assert (await running.answer("alpha", PROMPT))[0] == 200, "it is loaded when it is asked for"
        assert (await running.act("nobody", "unload"))[0] == 404


async def _drains(running: Running) -> bool:
    return any(engine["draining"] for engine in (await running.status())["engines"])


async def test_an_answer_that_does_not_finish_in_time_ends_with_an_error(engines: Path) -> None:
    options = ("--model=alpha", "--drain-seconds=0.3", "--context=510")
    async with serve(engines, *options) as running, running.held("alpha", PROMPT, 500) as (answers, _):
        assert (await running.act("alpha", "unload"))[0] == 200
        assert not events(await answers)[1]


async def test_a_new_build_takes_the_old_ones_place_without_a_failed_request(engines: Path, tiny_bundle: Path) -> None:
    async with serve(engines, "--model=alpha", "--http-processes=2") as running:
        (old,) = await running.pids("alpha@")
        going = True

        async def ask() -> set[int]:
            statuses = set()
            while going:
                statuses.add((await running.answer("alpha", PROMPT, 20))[0])
            return statuses

        asking = [asyncio.create_task(ask()) for _ in range(6)]
        for created in (100, 101):
            answered = await running.metric(ANSWERED)
            await running.until(partial(_more_than, running, answered + 6))
            publish(engines, "alpha", tiny_bundle, created)
            assert await running.act("alpha", "reload") == (200, {"model": "alpha", "state": "ready"})
            async with running.http.get("/v1/models/alpha") as response:
                assert (await response.json())["created"] == created
        going = False
        assert set().union(*await asyncio.gather(*asking)) == {200}
        (new,) = await running.pids("alpha@")
        assert new != old
        assert gone([old])


async def _more_than(running: Running, answers: float) -> bool:
    return await running.metric(ANSWERED) > answers


async def test_a_model_that_crashes_three_times_in_a_row_is_quarantined_until_somebody_says_otherwise(engines: Path) -> None:
    async with serve(engines, "--model=alpha,beta") as running:
        killed: list[int] = []
        for _ in range(3):
            await running.until(partial(_other_pid, running, "beta@", killed))
            killed += await running.pids("beta@")
            os.kill(killed[-1], signal.SIGKILL)
        await running.until(lambda: _in_state(running, "beta", "quarantined"))
        async with running.http.get("/readyz") as response:
            ready = await response.json()
            assert (response.status, ready["status"]) == (200, "degraded")
            assert "3 times in a row" in ready["models"]["beta"]
        async with running.http.get("/v1/models/beta") as response:
            assert (await response.json())["state"] == "quarantined"
        status, error = await running.answer("beta", PROMPT)
        assert (status, error["code"]) == (503, "model_quarantined")
        assert (await running.answer("alpha", PROMPT))[0] == 200
        assert await running.act("beta", "load") == (200, {"model": "beta", "state": "ready"})
        assert (await running.answer("beta", PROMPT))[0] == 200


async def _other_pid(running: Running, prefix: str, before: list[int]) -> bool:
    return any(pid not in before for pid in await running.pids(prefix))


async def test_a_model_runs_where_and_as_often_as_it_was_told(engines: Path) -> None:
    config = engines.parent / "serve.toml"
    config.write_text('device = ["cpu", "cpu"]\nmodel = ["alpha", "beta"]\n[models.beta]\nreplicas = 1\n')
    async with serve(engines, f"--config={config}") as running:
        await running.until(running.all_ready)
        assert len(await running.pids("alpha@")) == 2
        assert len(await running.pids("beta@")) == 1
        cores = [os.sched_getaffinity(pid) for pid in await running.pids("alpha@")]
        assert len(cores[0]) == max(1, len(os.sched_getaffinity(0)) // 2)

        async def shared() -> bool:
            said = await asyncio.gather(*(running.answer("alpha", [number + 3, *PROMPT], 32) for number in range(8)))
            assert {status for status, _ in said} == {200}
            done = [await running.metric("engineshed_generated_tokens_total", device=device) for device in ("cpu#1", "cpu#2")]
            assert sum(done) % (8 * 32) == 0
            return min(done) >= 4 * 32

        await running.until(shared)  # once the HTTP process is connected to both
