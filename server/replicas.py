"""Workers that run the same engine on several devices: which one takes a request, and when none is left."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NoReturn, Protocol, Self

from runtime.messages import Ready
from server.engine_client import EngineClient, EngineSource
from server.process import ServeError
from server.workers import Worker

log = logging.getLogger(__name__)


class Replica(EngineSource, Protocol):
    """A worker among those that a request may go to."""

    @property
    def device(self) -> str:
        """What it runs on; no two replicas have the same."""
        ...


def least_busy(replicas: Iterable[Replica]) -> tuple[EngineClient, Ready] | None:
    """The connection to the ready replica with the least outstanding work, the first of several such; None if none is ready.

    Work is counted in requests, not in tokens: how long an answer becomes nobody knows, and max_tokens, mostly left out, would
    make every short question weigh as much as a whole context. Requests that wait for a slot count before those that run, as
    devices may differ in slots: none waits while another device has a free one, none is refused while another's queue has room.
    The order decides ties so that a lone conversation stays with the worker that still holds its prompt.
    """
    return min(_ready(replicas), key=_outstanding, default=None)


def in_flight(replicas: Iterable[Replica]) -> int:
    """Requests that have not ended, on all of them."""
    return sum(client.in_flight for client, _ in _ready(replicas))


def _ready(replicas: Iterable[Replica]) -> list[tuple[EngineClient, Ready]]:
    connections = [(replica.client, replica.client.ready) for replica in replicas if replica.client is not None]
    return [(client, ready) for client, ready in connections if ready is not None]


def _outstanding(connection: tuple[EngineClient, Ready]) -> tuple[int, int]:
    client, ready = connection
    return max(0, client.in_flight + 1 - ready.slots), client.in_flight  # With the request that is to be placed.


class Replicas:
    """Keeps every one of `workers` alive, whatever becomes of the others.

    An async context, at whose end all their processes have ended.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    async def __aenter__(self) -> Self:
        """Have the processes started."""
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._lives = [
            asyncio.create_task(self._live(worker), name=f"the worker on {worker.device}") for worker in self._workers
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, all at the same time; requests that they still have end with an error."""
        for life in self._lives:
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)

    async def loaded(self) -> Ready:
        """Wait until the first of the engines has been loaded; gives what it said of itself. Waits forever if none can be."""
        return await asyncio.shield(self._loaded)

    async def hopeless(self) -> NoReturn:
        """Wait for the day on which no worker can load its engine any more: never returns, raises ServeError."""
        reasons = await asyncio.gather(*map(asyncio.shield, self._lives))
        raise reasons[0]

    async def _live(self, worker: Worker) -> ServeError:
        """One worker until it is hopeless; gives the reason."""
        try:
            async with worker:
                self._tell(worker, await worker.loaded())
                await worker.hopeless()
        except ServeError as error:
            if len(self._workers) > 1:
                log.error(
                    "%s is left out: %s, and the worker has said why; restart the server to try it again",
                    worker.device,
                    error,
                )
            return error

    def _tell(self, worker: Worker, ready: Ready) -> None:
        if len(self._workers) > 1:
            log.info("the engine on %s is loaded: %d slots of %d tokens", worker.device, ready.slots, ready.context)
        if not self._loaded.done():
            self._loaded.set_result(ready)
