"""The life of an engine process: it is started, watched, ended, and replaced when it dies."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self

from runtime.messages import HEARTBEAT_SECONDS, Ready
from server.engine_client import EngineClient, EngineUnavailableError
from server.process import EngineProcess, ServeError

SILENCE_SECONDS = 60 * HEARTBEAT_SECONDS
"""A worker from which nothing comes for so long is taken for dead."""
STOP_SECONDS = 5.0
"""What a worker gets to end by itself."""
BACK_OFF_SECONDS = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
"""Before the first, second, ... start after a worker that died; again from the first once an engine has loaded."""
HOPELESS = 2
"""The exit code of a worker that cannot start and would not a second time; it has said why on stderr."""

log = logging.getLogger(__name__)


class WorkerHopelessError(ServeError):
    """The engine cannot be loaded, now or later."""


class Worker:
    """Keeps one engine process alive and a connection to it.

    An async context, at whose end the process has ended. The first one may have been started already: `first`, which then
    is this context's to end.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        device: str = "cpu",
        first: EngineProcess | None = None,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self._command = command
        self._device = device
        self._first = first
        self._silence = silence
        self._client: EngineClient | None = None
        self._starts = 0
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
    def restarts(self) -> int:
        """Processes that were replaced."""
        return max(0, self._starts - 1)

    async def __aenter__(self) -> Self:
        """Have the process started; it takes requests when `loaded` returns."""
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
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
        failures = 0
        process = self._first or EngineProcess(self._command)
        while True:
            self._starts += 1
            with process:
                loaded, code = await self._live(process)
            if code == HOPELESS and not loaded:
                raise WorkerHopelessError("the engine cannot be loaded")
            failures = 0 if loaded else failures + 1
            pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
            log.error("the engine's process on %s ended with code %d; a new one starts in %.1f s", self._device, code, pause)
            await asyncio.sleep(pause)
            process = EngineProcess(self._command)

    async def _live(self, process: EngineProcess) -> tuple[bool, int]:
        """One process to its end: whether it loaded its engine, and its exit code."""
        client = EngineClient(process.address)
        exited = asyncio.get_running_loop().run_in_executor(self._waiting, process.wait)
        attached = asyncio.create_task(client.attach())
        patience = STOP_SECONDS
        try:
            either: set[asyncio.Future[Any]] = {attached, exited}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if client.ready is not None:
                self._client = client
                if not self._loaded.done():
                    self._loaded.set_result(client.ready)
                patience = await self._watch(client, exited)
        finally:
            self._client = None
            loaded = client.ready is not None
            client.close(EngineUnavailableError("The engine stopped before the answer was complete. Try again in a moment."))
            code = await _end(process, exited, patience)
        return loaded, code

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
