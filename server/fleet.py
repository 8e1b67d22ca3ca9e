"""What the supervisor and the HTTP processes tell each other: msgpack over ZeroMQ, one frame a message.

The supervisor binds a ROUTER socket; each HTTP process connects a DEALER to it. Both sides say how things stand, not what
to do: the supervisor sends a `Fleet` whenever it changes, an HTTP process a `Demand`. What was lost or came twice then does no
harm, and a process that joins late, or takes a dead one's place, needs no history.
"""

from collections.abc import Callable
from typing import Literal

import msgspec

from runtime.bundle import SamplingDefaults, Task
from runtime.messages import Heartbeat

ModelState = Literal["cold", "waiting", "loading", "ready", "quarantined", "refused"]
"""cold: it is loaded when it is asked for. waiting: for others to make room. quarantined: it crashed too often. refused: it
cannot be served, for the reason that stands beside."""
WorkerState = Literal["loading", "ready", "restarting", "given up"]
Action = Literal["load", "unload", "reload"]

# Supervisor -> HTTP process ----------------------------------------------------------------------------------------


class Worker(msgspec.Struct, frozen=True):
    """One engine on one device."""

    device: str
    """As log and metrics name it: `cuda:0`, or `cpu#1` where several engines share the CPU. One of each in a deployment."""
    variant: str
    state: WorkerState
    address: str | None = None
    """Of its socket while it is ready; each process of the worker has another."""


class Deployment(msgspec.Struct, frozen=True):
    """One build of a model, loaded on some devices."""

    id: str
    """No two deployments of a server's life have the same."""
    model: str
    folder: str
    build: str
    """The manifest's hash: another export of the same model has another."""
    draining: bool
    """It takes no new requests and ends when the last one has."""
    workers: tuple[Worker, ...]
    sampling: SamplingDefaults = SamplingDefaults()
    """How tokens are drawn where a request does not say."""


class Offer(msgspec.Struct, frozen=True):
    """A bundle that can be asked for."""

    name: str
    state: ModelState
    created: int = 0
    """Seconds since the epoch."""
    context: int = 0
    """Tokens of prompt and answer together, at most."""
    preloaded: bool = False
    """It was to be loaded at the start."""
    reason: str = ""
    """Why it is quarantined, refused or waiting."""
    task: Task = "text-generation"
    """What it is for."""
    sampling: SamplingDefaults = SamplingDefaults()
    """How tokens are drawn where a request does not say."""


class Fleet(msgspec.Struct, frozen=True, tag=True):
    """Everything that there is to ask."""

    version: int
    models: tuple[Offer, ...]
    """The one that is meant where a request names none comes first."""
    deployments: tuple[Deployment, ...]
    """The newest of a model comes last."""
    draining: bool = False
    """The server is to stop: nothing new is taken."""


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """What became of the command `id`."""

    id: int
    error: str = ""
    """Why it failed; empty where it did not."""


class Process(msgspec.Struct, frozen=True):
    """One process of the server, as the operating system sees it."""

    name: str
    """`supervisor`, `http-0`, ..., or a worker's `MODEL@DEVICE`."""
    pid: int
    rss: int
    """Bytes resident."""
    restarts: int = 0


class Engine(msgspec.Struct, frozen=True):
    """One worker's numbers."""

    model: str
    device: str
    variant: str
    state: WorkerState
    draining: bool
    restarts: int
    slots: int
    context: int
    queue: int
    beat: Heartbeat | None
    """Its last."""


class Memory(msgspec.Struct, frozen=True):
    """A device's memory, in bytes."""

    device: str
    budget: int
    reserved: int
    """By the engines that are on it, at their fullest."""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One number of a Prometheus metric."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Status(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Ask` `id`: what the server does and holds, in all its processes."""

    id: int
    started: float
    """When the server was, in seconds since the epoch."""
    models: tuple[Offer, ...]
    engines: tuple[Engine, ...]
    processes: tuple[Process, ...]
    memory: tuple[Memory, ...]
    samples: tuple[Sample, ...]
    """Of the HTTP processes' own counters, summed over all that are and were."""


class CountsRequest(msgspec.Struct, frozen=True, tag=True):
    """`Counts` are wanted at once."""

    id: int
    """At least 1; the answer has it in `Counts.id`."""


Down = Fleet | Outcome | Status | CountsRequest

# HTTP process -> supervisor ----------------------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, tag=True):
    """An HTTP process is there and wants to know the fleet, before it listens."""

    name: str
    """`http-0`, `http-1`, ..."""


class Demand(msgspec.Struct, frozen=True, tag=True):
    """What an HTTP process needs and holds; replaces its last one."""

    seen: int
    """The version of the fleet that it goes by."""
    waiting: dict[str, int]
    """Requests that wait for a model to be loaded, by its name."""
    leases: dict[str, int]
    """Requests that a deployment must not end before, by its id."""
    used: dict[str, float]
    """When a model was asked for last, by its name, in seconds of CLOCK_MONOTONIC, which all processes share."""


class Command(msgspec.Struct, frozen=True, tag=True):
    """Do `action` with a model; answered by an `Outcome`."""

    id: int
    action: Action
    model: str


class Counts(msgspec.Struct, frozen=True, tag=True):
    """An HTTP process's own counters, as they stand now; the first ones also say that it listens."""

    samples: tuple[Sample, ...]
    id: int = 0
    """Of the `CountsRequest` that they answer; 0 where nobody asked."""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """A `Status` is wanted."""

    id: int


Up = Join | Demand | Command | Counts | Ask

encode: Callable[[Up | Down], bytes] = msgspec.msgpack.Encoder().encode
decode_up: Callable[[bytes], Up] = msgspec.msgpack.Decoder(Up).decode
decode_down: Callable[[bytes], Down] = msgspec.msgpack.Decoder(Down).decode
