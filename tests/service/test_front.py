"""What the server tells of itself, and whom it lets in."""

import asyncio
import os
import re
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
