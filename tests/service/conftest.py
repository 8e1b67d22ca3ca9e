"""`engineshed serve` for real: its supervisor, its processes, several tiny models; and a client that sees into it."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest

from runtime import bundle as bundles
from runtime.bundle import MANIFEST
from tests.waiting import HANGS_SECONDS

ROOT = Path(__file__).parents[2]
MODELS = ("alpha", "beta", "gamma")
SMALL = ("--slots=4", "--context=256")
ANSWERS = 16
"""To a request that must not be over before a test has looked at it: seconds of work, of which the tests' look takes some
milliseconds."""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """A folder with the tiny model under three names, in float32 alone; not to be written to."""
    engines = tmp_path_factory.mktemp("service") / "engines"
    for number, name in enumerate(MODELS):
        publish(engines, name, tiny_bundle, number)
    return engines


@pytest.fixture
def engines(published: Path, tmp_path: Path) -> Path:
    """The same, for a test of its own."""
    return Path(shutil.copytree(published, tmp_path / "engines", copy_function=os.link))


def publish(engines: Path, name: str, source: Path, created: int) -> None:
    """Write a build of the bundle in `source` as `engines/NAME`, whole or not at all; it may take another's place."""
    draft = engines / f".{name}-{created}"
    shutil.copytree(source, draft, ignore=shutil.ignore_patterns("cpu-int4"))
    manifest = bundles.read(source)
    variants = tuple(variant for variant in manifest.variants if variant.precision == "fp32")
    (draft / MANIFEST).write_bytes(
        msgspec.json.encode(msgspec.structs.replace(manifest, name=name, variants=variants, created=created))
    )
    if (engines / name).exists():
        (engines / name).rename(engines / f".{name}-before-{created}")
    draft.rename(engines / name)


@dataclass
class Running:
    """A server that runs, and a client of it."""

    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession
    admin: aiohttp.ClientSession
    """Over the admin socket."""
    log: list[str]

    async def status(self) -> dict[str, Any]:
        """What `/admin/status` says."""
        async with self.admin.get("/admin/status") as response:
            assert response.status == 200, await response.text()
            told: dict[str, Any] = await response.json()
            return told

    async def pids(self, prefix: str) -> list[int]:
        """The processes whose names begin so, as `http-` or `alpha@`."""
        return [process["pid"] for process in (await self.status())["processes"] if process["name"].startswith(prefix)]

    async def state(self, model: str) -> tuple[str, str]:
        """The model's state, and why."""
        found = next(each for each in (await self.status())["models"] if each["name"] == model)
        return found["state"], found["reason"]

    async def act(self, model: str, action: str) -> tuple[int, dict[str, Any]]:
        """Have something done with a model; gives the answer's status and body."""
        async with self.admin.post(f"/admin/models/{model}/{action}") as response:
            return response.status, await response.json()

    async def answer(self, model: str, prompt: list[int], tokens: int = 8, **fields: Any) -> tuple[int, Any]:
        """A completion's status and its text, or what went wrong."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}
        async with self.http.post("/v1/completions", json=body) as response:
            said = await response.json()
            return response.status, said["choices"][0]["text"] if response.status == 200 else said["error"]

    @asynccontextmanager
    async def stream(self, model: str, prompt: list[int], tokens: int) -> AsyncIterator[aiohttp.ClientResponse]:
        """A completion's events, the first of which has come."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        async with self.http.post("/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            yield response

    @asynccontextmanager
    async def held(self, model: str, prompt: list[int], tokens: int) -> AsyncIterator[tuple[asyncio.Task[str], int]]:
        """The events of `ANSWERS` answers, once they are over, and the process of the model's only engine, which stands still
        until SIGCONT, the answers half-way: the first of them has begun, and the last has not ended.
        """
        (pid,) = await self.pids(f"{model}@")
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        os.kill(pid, signal.SIGSTOP)
        try:
            while (answers := await self._begun({**body, "n": ANSWERS}, pid)).done():
                pass  # The moments in which the engine ran were long ones, on a busy machine.
            yield answers, pid
        finally:
            with suppress(ProcessLookupError):  # The test has ended it.
                os.kill(pid, signal.SIGCONT)
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)

    async def _begun(self, body: dict[str, Any], pid: int) -> asyncio.Task[str]:
        """The events of a stream, which has begun, of the engine that stands still before and afterwards."""
        asking = asyncio.create_task(self.http.post("/v1/completions", json=body).__aenter__())
        while not asking.done():
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.005)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.wait({asking}, timeout=0.1)  # for the head, if that was enough for a token
        response = await asking
        assert response.status == 200, await response.text()
        answers = asyncio.create_task(_text(response))
        await self.passed_on()  # which also gives what the engine has said until now the time to come here
        return answers

    async def passed_on(self) -> None:
        """Return once the HTTP process has sent its engine, which stands still, what it was asked for before this: its turn to
        answer this comes later, and the supervisor waits for the engine first."""
        await self.metric("engineshed_ready")

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        async with self.http.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.split()[-1]) for line in found if all(each in line for each in wanted))

    async def until(self, true: Callable[[], Any], seconds: float = HANGS_SECONDS) -> None:
        """Return once `true`, which may be a coroutine function, gives something true."""
        async with asyncio.timeout(seconds):
            while True:
                said = true()
                if await said if asyncio.iscoroutine(said) else said:
                    return
                await asyncio.sleep(0.05)

    async def all_ready(self) -> bool:
        """Whether every engine takes requests."""
        return {engine["state"] for engine in (await self.status())["engines"]} == {"ready"}

    async def settled(self, seconds: float = HANGS_SECONDS) -> None:
        """Return once nothing runs or waits in any engine."""

        async def idle() -> bool:
            beats = [engine["beat"] for engine in (await self.status())["engines"]]
            return all(beat is not None and beat["running"] + beat["waiting"] == 0 for beat in beats)

        await self.until(idle, seconds)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """End the server; gives its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), HANGS_SECONDS)


@asynccontextmanager
async def serve(engines: Path, *options: str, ready: bool = True, seconds: float = 2 * HANGS_SECONDS) -> AsyncIterator[Running]:
    """`engineshed serve` over the bundles in `engines`, for a test that hangs if it takes longer than `seconds`; no process is
    left at the end.
    """
    socket = engines.parent / "admin.sock"
    command = [sys.executable, "engineshed.py", "serve", f"--engines={engines}", "--port=0", f"--admin-socket={socket}", *SMALL]
    process = await asyncio.create_subprocess_exec(*command, *options, cwd=ROOT, stderr=subprocess.PIPE)
    log: list[str] = []
    reading = asyncio.create_task(_read(process, log))
    family: list[psutil.Process] = []
    try:
        async with asyncio.timeout(HANGS_SECONDS):
            while not (line := next((line for line in log if " ready at " in line), "")):
                assert not reading.done(), "".join(log)
                await asyncio.sleep(0.02)
        url = line.split(" ready at ")[1].split()[0]
        timeout = aiohttp.ClientTimeout(HANGS_SECONDS)
        many = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(url, timeout=timeout, connector=many) as http,
            aiohttp.ClientSession("http://admin", timeout=timeout, connector=aiohttp.UnixConnector(str(socket))) as admin,
        ):
            running = Running(process, url, http, admin, log)
            async with asyncio.timeout(seconds):
                if ready:
                    await running.until(lambda: _is_ready(http))
                yield running
        family = _family(process.pid)
        assert await running.stop() in (0, -signal.SIGKILL), "".join(log)
    finally:
        if process.returncode is None:
            family = family or _family(process.pid)
            process.kill()
            await process.wait()
        await reading
        _, alive = psutil.wait_procs(family, HANGS_SECONDS)
        assert not alive, "the server left processes behind"
        if sys.exc_info()[0] is not None:
            print("".join(log))


async def _text(response: aiohttp.ClientResponse) -> str:
    async with response:
        return await response.text()


async def _is_ready(http: aiohttp.ClientSession) -> bool:
    async with http.get("/readyz") as response:
        return response.status == 200


async def _read(process: asyncio.subprocess.Process, log: list[str]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        if b"engineshed.request:" not in line:
            log.append(line.decode())


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def events(text: str) -> tuple[str, bool]:
    """A stream's text, and whether it ended as it should; a stream that broke has an error event as its last."""
    lines = [line for line in text.split("\n") if line]
    whole = bool(lines) and lines[-1] == "data: [DONE]"
    assert whole or (len(lines) > 1 and lines[-2] == "event: error"), text[-500:]
    pieces = [json.loads(line[6:]) for line in lines if line.startswith('data: {"id"') or line.startswith('data: {"choices"')]
    return "".join(piece["choices"][0]["text"] for piece in pieces if piece.get("choices")), whole


def gone(pids: Sequence[int]) -> bool:
    """Whether none of these processes runs any more."""
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
