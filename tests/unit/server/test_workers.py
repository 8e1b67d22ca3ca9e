"""The life of a worker process, played by a process without an engine (scripted_process.py)."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from runtime.bundle import Bundle
from runtime.messages import Generate, Row
from runtime.text import Text
from server.engine_client import Answer, EngineClient, EngineUnavailableError
from server.supervision import workers
from server.supervision.process import EngineProcess, ServeError
from server.supervision.workers import Worker, WorkerHopelessError
from tests.unit.server.house import service_for, serving
from tests.waiting import HANGS_SECONDS

SCRIPT = [sys.executable, "-P", "-m", "tests.unit.server.scripted_process"]


async def ready(worker: Worker, *, after: int = 0) -> tuple[EngineClient, int]:
    """The connection to a loaded engine that is not that of process `after`, and its process."""
    async with asyncio.timeout(HANGS_SECONDS):
        while True:
            if worker.client is not None and worker.client.ready is not None and worker.client.ready.pid != after:
                return worker.client, worker.client.ready.pid
            await asyncio.sleep(0.01)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def _all_rows(answer: Answer) -> list[Row]:
    rows = await answer.rows()
    while rows[-1].finish is None:
        rows += await answer.rows()
    return rows


async def test_a_worker_is_ready_when_its_engine_is_loaded_and_gone_after_the_context() -> None:
    async with Worker(SCRIPT) as worker:
        await asyncio.wait_for(worker.loaded(), HANGS_SECONDS)
        client, pid = await ready(worker)
        assert exists(pid)
        with client.generate(Generate("", [1], max_tokens=3)) as answer:
            rows = await _all_rows(answer)
        assert sum(len(row.tokens) for row in rows) == 3
    assert not exists(pid)
    assert worker.client is None
    assert worker.restarts == 0


def test_nothing_is_left_of_a_process_whatever_it_was_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with EngineProcess([*SCRIPT, "--deaf"]) as process:
        assert len(list(tmp_path.iterdir())) == 1
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


async def test_a_worker_that_dies_ends_its_answers_and_is_replaced() -> None:
    async with Worker(SCRIPT) as worker:
        client, pid = await ready(worker)
        with client.generate(Generate("", [1], max_tokens=10**6)) as answer:
            await answer.rows()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineUnavailableError):
                await _all_rows(answer)
        await ready(worker, after=pid)
        assert worker.restarts == 1


async def test_a_worker_that_falls_silent_is_killed_and_replaced() -> None:
    async with Worker(SCRIPT, silence=1.0) as worker:
        _, pid = await ready(worker)
        os.kill(pid, signal.SIGSTOP)
        await ready(worker, after=pid)
        assert not exists(pid)


async def test_a_worker_that_crashes_while_loading_is_tried_again(tmp_path: Path) -> None:
    async with Worker([*SCRIPT, "--first=crash", f"--marker={tmp_path}/crashed"]) as worker:
        await ready(worker)
        assert worker.restarts == 1


async def test_a_worker_that_says_it_is_hopeless_is_not_tried_again(tmp_path: Path) -> None:
    async with Worker([*SCRIPT, "--first=hopeless", f"--marker={tmp_path}/crashed"]) as worker:
        with pytest.raises(WorkerHopelessError):
            await asyncio.wait_for(worker.loaded(), HANGS_SECONDS)
        with pytest.raises(WorkerHopelessError):
            await worker.hopeless()
        assert worker.restarts == 0


async def test_a_worker_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STOP_SECONDS", 0.2)
    async with Worker([*SCRIPT, "--deaf"]) as worker:
        _, pid = await ready(worker)
    assert not exists(pid)


async def test_a_worker_that_dies_in_a_stream_ends_it_with_an_error_and_is_not_ready_meanwhile(
    bundle: Bundle, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BACK_OFF_SECONDS", (1.0,))
    async with Worker(SCRIPT) as worker, serving(service_for(bundle, text, worker)) as http:
        _, pid = await ready(worker)
        async with http.post("/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": 60}) as response:
            await response.content.readline()
            os.kill(pid, signal.SIGKILL)
            *_, kind, data = (await response.text()).strip().split("\n")
        assert kind == "event: error"
        assert "engine_unavailable" in data
        async with http.get("/readyz") as response:
            assert response.status == 503
        async with http.post("/v1/completions", json={"prompt": "hi"}) as response:
            assert response.status == 503
        await ready(worker, after=pid)
        async with http.get("/readyz") as response:
            assert response.status == 200
        async with http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3}) as response:
            assert (await response.json())["choices"][0]["text"] == "xxx"


async def test_sockets_that_cannot_be_made_are_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 108)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    async with Worker(SCRIPT) as worker:
        with pytest.raises(ServeError, match="shorter TMPDIR"):
            await asyncio.wait_for(worker.loaded(), HANGS_SECONDS)
