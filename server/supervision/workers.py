"""The life of an engine process: it is started, watched, ended, and replaced when it dies."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self

from runtime.messages import HEARTBEAT_SECONDS, Ready
from server.engine_client import EngineClient, EngineUnavailableError
from server.fleet import WorkerState
from server.supervision.process import EngineProcess, ServeError

SILENCE_SECONDS = 60 * HEARTBEAT_SECONDS
"""A worker from which nothing comes for so long is taken for dead."""
STOP_SECONDS = 5.0
"""What a worker gets to end by itself."""
BACK_OFF_SECONDS = (0.1, 0.5, 2.0)
"""Before the first, second, ... start after a worker that died; again from the first once one has done its work."""
CRASHES = 3
"""Processes that may die in a row before the worker is given up; one that answered, or lived for STEADY_SECONDS, ends a row."""
STEADY_SECONDS = 60.0
HOPELESS = 2
"""The exit code of a worker that cannot start and would not a second time; it has said why on stderr."""

log = logging.getLogger(__name__)


class WorkerHopelessError(ServeError):
    """The engine cannot be loaded, now or later, or dies whenever it is."""


class Worker:
    """Keeps one engine process alive and a connection to it.

    To be made in a running event loop. An async context, at whose end the process has ended. `changed` is called whenever
    `state` is another.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        device: str = "cpu",
        silence: float = SILENCE_SECONDS,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._command = command
        self._device = device
        self._silence = silence
        self._changed = changed
        self._client: EngineClient | None = None
        self._process: EngineProcess | None = None
        self._state: WorkerState = "loading"
        self._starts = 0
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        # The event loop's own threads tokenize; with many workers, waiting would take them all.
        self._waiting = ThreadPoolExecutor(max_workers=1)

    @property
    def device(self) -> str:
        """What it runs on, as the log and the metrics name it."""
        return self._device

    @property
    def client(self) -> EngineClient | None:
        """The connection, while there is an engine that takes requests."""
        return self._client

    @property
    def state(self) -> WorkerState:
        """What it is doing."""
        return self._state

    @property
    def was_ready(self) -> bool:
        """An engine has been loaded at least once."""
        return self._loaded.done() and not self._loaded.cancelled()

    @property
    def address(self) -> str | None:
        """Where its engine takes requests, while it does."""
        return self._process.address if self._process is not None and self._client is not None else None

    @property
    def pid(self) -> int | None:
        """Of its process, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def restarts(self) -> int:
        """Processes that were replaced."""
        return max(0, self._starts - 1)

    async def __aenter__(self) -> Self:
        """Have the process started; it takes requests when `loaded` returns."""
        self._keeping = asyncio.create_task(self._keep(), name="keep the worker")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; requests that it still has end with an error."""
        self._keeping.cancel()
        with suppress(asyncio.CancelledError, ServeError):
            await self._keeping
        self._waiting.shutdown(wait=False)

    async def loaded(self) -> Ready:
        """Wait until an engine has been loaded for the first time; gives what it said of itself, raises ServeError."""
        either: set[asyncio.Future[Any]] = {self._loaded, self._keeping}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._keeping.done():
            self._keeping.result()
        return self._loaded.result()

    async def hopeless(self) -> NoReturn:
        """Wait for the day on which no engine can be loaded any more: never returns, raises ServeError."""
        await asyncio.shield(self._keeping)

    async def _keep(self) -> NoReturn:
        deaths = 0
        while True:
            process = self._process = EngineProcess(self._command)
            self._starts += 1
            self._become("loading" if deaths == 0 else "restarting")
            try:
                with process:
                    loaded, worked, code = await self._live(process)
            finally:
                self._process = None
            if code == HOPELESS and not loaded:
                self._give_up("the engine cannot be loaded; its process has said why in the log")
            deaths = 1 if worked else deaths + 1
            if deaths >= CRASHES:
                self._give_up(f"the engine's process died {deaths} times in a row, the last time with code {code}")
            pause = BACK_OFF_SECONDS[min(deaths, len(BACK_OFF_SECONDS)) - 1]
            log.error("the engine's process on %s ended with code %d; a new one starts in %.1f s", self._device, code, pause)
            self._become("restarting")
            await asyncio.sleep(pause)

    def _become(self, state: WorkerState) -> None:
        self._state = state
        self._changed()

    def _give_up(self, reason: str) -> NoReturn:
        self._become("given up")
        raise WorkerHopelessError(reason)

    async def _live(self, process: EngineProcess) -> tuple[bool, bool, int]:
        """One process to its end: whether it loaded its engine, whether it did its work with it, and its exit code."""
        loop = asyncio.get_running_loop()
        client = EngineClient(process.address)
        exited = loop.run_in_executor(self._waiting, process.wait)
        attached = asyncio.create_task(client.attach())
        patience, since = STOP_SECONDS, float("inf")
        try:
            either: set[asyncio.Future[Any]] = {attached, exited}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if client.ready is not None:
                since = loop.time()
                self._client = client
                self._become("ready")
                if not self._loaded.done():
                    self._loaded.set_result(client.ready)
                patience = await self._watch(client, exited)
        finally:
            self._client = None
            loaded = client.ready is not None
            finished = client.heartbeat is not None and client.heartbeat.finished > 0
            client.close(EngineUnavailableError("The engine stopped before the answer was complete. Try again in a moment."))
            code = await _end(process, exited, patience)
        return loaded, finished or loop.time() - since > STEADY_SECONDS, code

    async def _watch(self, client: EngineClient, exited: asyncio.Future[int]) -> float:
        """Wait until the process has ended or should be; gives the seconds that it deserves for that."""
        loop = asyncio.get_running_loop()
        while not exited.done():
            await asyncio.wait({exited}, timeout=HEARTBEAT_SECONDS)
            client.receive()  # What came while this process itself was held up counts as heard.
            if not exited.done() and loop.time() - client.heard > self._silence:
                log.error(
                    "the engine's process on %s has been silent for %.0f s and is taken for dead", self._device, self._silence
                )
                return 0.0
        return STOP_SECONDS


async def _end(process: EngineProcess, exited: asyncio.Future[int], patience: float) -> int:
    """Ask the process to end, wait for `patience` seconds, and kill it; gives its exit code."""
    process.hang_up()
    await asyncio.wait({exited}, timeout=patience)
    process.kill()
    return await exited
