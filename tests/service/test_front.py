"""What the server tells of itself, and whom it lets in."""

import asyncio
import os
import re
import signal
import socket
import stat
from pathlib import Path

import aiohttp
import psutil

from tests.service.conftest import ROOT, serve

PROMPT = [5, 6, 7, 8, 9]


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
        where = {"model": "alpha", "device": "cpu"}
        assert await running.metric("engineshed_engine_generated_tokens_total", **where) == 60
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


async def test_a_scrape_tells_how_things_stand_then_and_not_at_the_last_heartbeat(engines: Path) -> None:
    options = ("--http-processes=2", "--slots=2", "--queue=1000", "--queue-tokens=1000000")
    async with serve(engines, "--model=alpha", *options) as running:
        for number in range(1, 6):
            said = await asyncio.gather(*(running.answer("alpha", [5, 6, each + 7], 20) for each in range(6)))
            assert {status for status, _ in said} == {200}
            for gauge in ("requests_running", "requests_waiting", "kv_tokens", "tokens_waiting"):
                assert await running.metric(f"engineshed_{gauge}") == 0, (number, gauge)
            assert await running.metric("engineshed_generated_tokens_total") == 120 * number
            assert await running.metric("engineshed_engine_generated_tokens_total") == 120 * number
            assert await running.metric("engineshed_requests_total", route="/v1/completions") == 6 * number
        asked = [asyncio.create_task(running.answer("alpha", PROMPT, 240)) for _ in range(1000)]
        async with running.stream("alpha", PROMPT, 240) as response:
            while await running.metric("engineshed_requests_waiting") < 100:
                assert not any(task.done() and task.result()[0] != 200 for task in asked)

            async def both_run() -> bool:  # but for the moments between an answer's end and the next step
                (engine,) = (await running.status())["engines"]
                return bool(engine["beat"]["running"] == 2 == await running.metric("engineshed_requests_running"))

            await running.until(both_run)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            response.close()
        await running.settled()


async def test_processes_that_hang_hold_up_no_scrape(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--http-processes=2") as running:
        expected = await running.answer("alpha", PROMPT)
        (engine,) = await running.pids("alpha@")
        os.kill(engine, signal.SIGSTOP)
        assert await running.metric("engineshed_ready") == 1, "of which nobody knows better"
        assert await running.metric("engineshed_engine_finished_total") == 1, "as it last said"
        os.kill(engine, signal.SIGCONT)
        assert await running.answer("alpha", PROMPT) == expected


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


async def test_the_first_answer_of_all_knows_the_models(engines: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def first() -> list[str]:
        async with aiohttp.ClientSession() as http:
            while True:
                try:
                    async with http.get(f"http://127.0.0.1:{port}/v1/models") as response:
                        return [model["id"] for model in (await response.json())["data"]]
                except aiohttp.ClientError:
                    await asyncio.sleep(0.001)

    asking = asyncio.create_task(first())
    async with serve(engines, "--model=beta", f"--port={port}"):
        assert await asking == ["beta", "alpha", "gamma"]
