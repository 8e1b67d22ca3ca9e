"""What is told of an engine, to whoever asks for the server's status."""

from server import fleet
from server.engine_client import EngineClient
from server.fleet import WorkerState


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
