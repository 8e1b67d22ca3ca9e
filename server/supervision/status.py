"""What is told of engines, processes and memory to whoever asks for the server's status."""

import contextlib
from collections.abc import Iterator, Sequence

import psutil

from server import fleet
from server.engine_client import EngineClient
from server.fleet import WorkerState
from server.supervision.deployment import Deployment
from server.supervision.fronts import Front
from server.supervision.placement import Seat


def engine(
    model: str,
    device: str,
    variant: str,
    client: EngineClient | None,
    *,
    state: WorkerState,
    draining: bool = False,
    restarts: int = 0,
) -> fleet.Engine:
    """The engine behind `client`, or one that nobody is connected to."""
    ready = client.ready if client is not None else None
    slots, context, queue = (ready.slots, ready.context, ready.queue) if ready is not None else (0, 0, 0)
    beat = client.heartbeat if client is not None else None
    return fleet.Engine(model, device, variant, state, draining, restarts, slots, context, queue, beat)


def engines(deployments: Sequence[Deployment]) -> Iterator[fleet.Engine]:
    """Those of all `deployments`."""
    for deployment in deployments:
        for worker, launch in zip(deployment.workers, deployment.launches, strict=True):
            yield engine(
                deployment.name,
                worker.device,
                launch.variant,
                worker.client,
                state=worker.state,
                draining=deployment.draining,
                restarts=worker.restarts,
            )


def processes(fronts: Sequence[Front], deployments: Sequence[Deployment]) -> Iterator[fleet.Process]:
    """This process, the supervisor, and those that it keeps, as far as they run."""
    workers = [
        (f"{deployment.name}@{worker.device}", worker.pid, worker.restarts)
        for deployment in deployments
        for worker in deployment.workers
    ]
    others = [(front.name, front.pid, front.restarts) for front in fronts]
    for name, pid, restarts in [("supervisor", psutil.Process().pid, 0), *others, *workers]:
        if pid is not None:
            with contextlib.suppress(psutil.Error):  # it has just ended
                yield fleet.Process(name, pid, psutil.Process(pid).memory_info().rss, restarts)


def memory(seats: Sequence[Seat], deployments: Sequence[Deployment]) -> Iterator[fleet.Memory]:
    """What each device has, and what `deployments` hold of it."""
    occupants = [deployment.occupant for deployment in deployments]
    for seat in seats:
        yield fleet.Memory(seat.name, seat.budget, sum(occupant.held.get(seat.name, 0) for occupant in occupants))
