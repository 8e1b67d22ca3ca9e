"""One build of a model on its devices: its workers from their start to their end."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from runtime.bundle import SamplingDefaults
from server import fleet
from server.supervision.catalog import Entry
from server.supervision.launch import Launch
from server.supervision.placement import Occupant
from server.supervision.process import ServeError
from server.supervision.workers import Worker

log = logging.getLogger(__name__)

_NOTHING = SamplingDefaults()
_ids = itertools.count(1)


@dataclass(eq=False)
class Deployment:
    """The workers of one build of a model, each kept alive whatever becomes of the others."""

    entry: Entry
    launches: Sequence[Launch]
    silence: float
    """Seconds after which a worker from which nothing comes is taken for dead."""
    changed: Callable[[], None]
    """Called whenever something is another than before."""
    sampling: SamplingDefaults = _NOTHING
    """How tokens are drawn where a request does not say."""
    id: str = field(default_factory=lambda: f"d{next(_ids)}")
    used: float = field(default_factory=time.monotonic)
    """When it was asked for last, in seconds of CLOCK_MONOTONIC."""
    draining_since: float | None = None
    """Likewise, when it was told to take no more requests."""
    drained_in: int = 0
    """The version of the fleet in which that was told."""
    reasons: list[str] = field(default_factory=list)
    """Why workers were given up."""

    def __post_init__(self) -> None:
        """Have the processes started. Needs a running event loop."""
        self.workers = [
            Worker(launch.command, device=launch.seat.name, silence=self.silence, changed=self.changed)
            for launch in self.launches
        ]
        self._ended = False
        self._lives = [
            asyncio.create_task(self._live(worker), name=f"the worker on {worker.device}") for worker in self.workers
        ]
        self._ending: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The model's."""
        return self.entry.name

    @property
    def ready(self) -> bool:
        """One of its engines takes requests."""
        return any(worker.state == "ready" for worker in self.workers)

    @property
    def settled(self) -> bool:
        """Every worker has been ready once, or was given up."""
        return all(worker.was_ready or worker.state == "given up" for worker in self.workers)

    @property
    def given_up(self) -> bool:
        """None of its workers will take requests again."""
        return len(self.reasons) == len(self.workers)

    @property
    def draining(self) -> bool:
        """It takes no new requests."""
        return self.draining_since is not None

    @property
    def ending(self) -> bool:
        """Its processes have been told to end."""
        return self._ending is not None

    @property
    def ended(self) -> bool:
        """Nothing of it is left."""
        return self._ended

    @property
    def occupant(self) -> Occupant:
        """What it holds, or may come to hold."""
        return Occupant(self.id, {launch.seat.name: launch.need for launch in self.launches})

    def describe(self) -> fleet.Deployment:
        """It, as the HTTP processes are told."""
        workers = tuple(
            fleet.Worker(worker.device, launch.variant, worker.state, worker.address)
            for worker, launch in zip(self.workers, self.launches, strict=True)
        )
        folder, build = str(self.entry.folder), self.entry.build
        return fleet.Deployment(self.id, self.name, folder, build, self.draining, workers, self.sampling)

    def __str__(self) -> str:
        """The first of its engines that is ready, for a log."""
        ready = next((worker.client.ready for worker in self.workers if worker.client is not None), None)
        if ready is None:
            return self.name
        return f"{self.name} ({ready.variant}): {ready.slots} slots of {ready.context} tokens"

    def drain(self) -> None:
        """Take no more requests from now on."""
        if self.draining_since is None:
            self.draining_since = time.monotonic()
            self.changed()

    def end(self) -> None:
        """End the processes; `ended` once they have."""
        if self._ending is None:
            self._ending = asyncio.create_task(self.stop())

    async def stop(self) -> None:
        """End the processes, all at the same time, and wait for it."""
        for life in self._lives:
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        self._ended = True
        self.changed()

    async def _live(self, worker: Worker) -> None:
        """One worker until it is given up."""
        try:
            async with worker:
                await worker.hopeless()
        except ServeError as error:
            self.reasons.append(f"{worker.device}: {error}")
            if len(self.workers) > 1:
                log.error("%s is left out of %s: %s; reload the model to try it again", worker.device, self.name, error)
            self.changed()
