"""The life of an engine process: it is started, watched, ended, and replaced when it dies."""

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

import runtime
from runtime.messages import HEARTBEAT_SECONDS
from server.engine_client import EngineClient, EngineUnavailableError

SILENCE_SECONDS = 60 * HEARTBEAT_SECONDS
"""A worker from which nothing comes for so long is taken for dead."""
STOP_SECONDS = 5.0
"""What a worker gets to end by itself."""
BACK_OFF_SECONDS = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
"""Before the first, second, ... start after a worker that died; again from the first once an engine has loaded."""
HOPELESS = 2
"""The exit code of a worker that cannot start and would not a second time; it has said why on stderr."""

CODE = Path(runtime.__file__).parent.parent
"""Where this process has its code from, so that a worker has the same, whatever the working directory."""

log = logging.getLogger(__name__)


def command(folder: Path, variant: str, *, slots: int, context: int, queue: int, log_level: str) -> list[str]:
    """The command line of a worker for a bundle's variant, without its socket."""
    options = {"bundle": folder, "variant": variant, "slots": slots, "context": context, "queue": queue, "log-level": log_level}
    return [sys.executable, "-P", "-m", "runtime.worker", *(f"--{name}={value}" for name, value in options.items())]


class WorkerHopelessError(Exception):
    """The engine cannot be loaded, now or later."""


class Worker:
    """Keeps one engine process alive and a connection to it.

    An async context, at whose end the process has ended. The command is given `--socket=ADDRESS`, and a stdin whose
    end says that this process is gone.
    """

    def __init__(self, command: Sequence[str], *, silence: float = SILENCE_SECONDS) -> None:
        self._command = command
        self._silence = silence
        self._client: EngineClient | None = None
        self._starts = 0
        self._loaded = asyncio.Event()

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
        self._sockets = tempfile.TemporaryDirectory(prefix="engineshed-")
        self._keeping = asyncio.create_task(self._keep(), name="keep the worker")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; requests that it still has end with an error."""
        self._keeping.cancel()
        with suppress(asyncio.CancelledError, WorkerHopelessError):
            await self._keeping
        self._sockets.cleanup()

    async def loaded(self) -> None:
        """Return once an engine has been loaded for the first time; raises WorkerHopelessError."""
        loaded = asyncio.create_task(self._loaded.wait())
        await asyncio.wait({loaded, self._keeping}, return_when=asyncio.FIRST_COMPLETED)
        loaded.cancel()
        if self._keeping.done():
            self._keeping.result()

    async def hopeless(self) -> None:
        """Wait for the day on which no engine can be loaded any more: never returns, raises WorkerHopelessError."""
        await asyncio.shield(self._keeping)

    async def _keep(self) -> None:
        failures = 0
        while True:
            loaded, code = await self._live(f"ipc://{self._sockets.name}/{self._starts}")
            if code == HOPELESS and not loaded:
                raise WorkerHopelessError("the engine cannot be loaded")
            failures = 0 if loaded else failures + 1
            pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
            log.error("the engine's process ended with code %d; a new one starts in %.1f s", code, pause)
            await asyncio.sleep(pause)

    async def _live(self, address: str) -> tuple[bool, int]:
        """One process from its start to its end: whether it loaded its engine, and its exit code."""
        client = _connect(address)
        process = await asyncio.create_subprocess_exec(
            *self._command,
            f"--socket={address}",
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])])},
            start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends that one in good order.
        )
        self._starts += 1
        exited = asyncio.create_task(process.wait())
        attached = asyncio.create_task(client.attach())
        patience = STOP_SECONDS
        try:
            await asyncio.wait({attached, exited}, return_when=asyncio.FIRST_COMPLETED)
            if client.ready is not None:
                self._client = client
                self._loaded.set()
                patience = await self._watch(client, exited)
        finally:
            self._client = None
            loaded = client.ready is not None
            client.close(EngineUnavailableError("The engine stopped before the answer was complete. Try again in a moment."))
            code = await _end(process, patience)
        return loaded, code

    async def _watch(self, client: EngineClient, exited: asyncio.Task[int]) -> float:
        """Wait until the process has ended or should be; gives the seconds that it deserves for that."""
        loop = asyncio.get_running_loop()
        while not exited.done():
            await asyncio.wait({exited}, timeout=HEARTBEAT_SECONDS)
            client.receive()  # What came while this process itself was held up counts as heard.
            if not exited.done() and loop.time() - client.heard > self._silence:
                log.error("the engine's process has been silent for %.0f s and is taken for dead", self._silence)
                return 0.0
        return STOP_SECONDS


def _connect(address: str) -> EngineClient:
    try:
        return EngineClient(address)
    except zmq.ZMQError as error:
        raise WorkerHopelessError(f"no engine can be reached at {address} ({error.strerror}); try a shorter TMPDIR") from error


async def _end(process: asyncio.subprocess.Process, patience: float) -> int:
    """Ask the process to end, wait for `patience` seconds, and kill it; gives its exit code."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        return await asyncio.wait_for(process.wait(), patience)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        return await process.wait()
