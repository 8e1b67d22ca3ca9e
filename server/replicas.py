"""Workers that run the same engine on several devices: which one takes a request."""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from runtime.messages import Ready
from server.engine_client import EngineClient, EngineSource

_SHORTEST = 32
"""Tokens that two prompts must have in common for the second to follow the first."""
_REMEMBERED = 10_000
"""Beginnings of prompts: some hundreds of long conversations."""


class Replica(EngineSource, Protocol):
    """A worker among those that a request may go to."""

    @property
    def device(self) -> str:
        """What it runs on; no two replicas have the same."""
        ...


class Prompts:
    """Which replica was sent a prompt that begins alike, as far as that is remembered."""

    def __init__(self) -> None:
        self._holders: OrderedDict[int, str] = OrderedDict()
        """Devices by the hash of a prompt's beginning, the one that was looked up or sent last at the end."""

    def send(self, prompt: Sequence[int], device: str) -> None:
        """Note that `prompt` goes to `device`."""
        for beginning in _beginnings(prompt):
            self._holders[beginning] = device
            self._holders.move_to_end(beginning)
        while len(self._holders) > _REMEMBERED:
            self._holders.popitem(last=False)

    def holder(self, prompt: Sequence[int]) -> str | None:
        """The device that was sent the longest beginning of `prompt`."""
        known = (self._holders[beginning] for beginning in reversed(_beginnings(prompt)) if beginning in self._holders)
        return next(known, None)


def _beginnings(prompt: Sequence[int]) -> list[int]:
    """Hashes of the prompt's first 32, 64, 128, ... tokens; a collision sends a request elsewhere, and no more."""
    sizes = itertools.takewhile(lambda size: size < len(prompt), (_SHORTEST << power for power in itertools.count()))
    return [hash(tuple(prompt[:size])) for size in sizes]


def choose(replicas: Sequence[Replica], prompts: Prompts, prompt: Sequence[int]) -> tuple[EngineClient, Ready] | None:
    """The connection that `prompt` goes to: of the replica that holds its beginning, if it has a free slot, else `least_busy`.

    Computing a prompt again costs less than waiting for a slot.
    """
    ready = {replica.device: connection for replica in replicas for connection in ready_ones([replica])}
    holder = prompts.holder(prompt) if len(ready) > 1 else None
    connection = ready.get(holder) if holder is not None else None
    if connection is None or _outstanding(connection)[0]:
        connection = min(ready.values(), key=_outstanding, default=None)
    if connection is not None and len(ready) > 1:
        prompts.send(prompt, next(device for device, other in ready.items() if other is connection))
    return connection


def least_busy(replicas: Iterable[Replica]) -> tuple[EngineClient, Ready] | None:
    """The connection to the ready replica with the least outstanding work, the first of several such; None if none is ready.

    Work is counted in requests, not in tokens: how long an answer becomes nobody knows, and max_tokens, mostly left out, would
    make every short question weigh as much as a whole context. Requests that wait for a slot count before those that run, as
    devices may differ in slots: none waits while another device has a free one, none is refused while another's queue has room.
    The order decides ties so that a lone conversation stays with the worker that still holds its prompt.
    """
    return min(ready_ones(replicas), key=_outstanding, default=None)


def ready_ones(replicas: Iterable[Replica]) -> list[tuple[EngineClient, Ready]]:
    """The connections to the replicas that take requests."""
    connections = [(replica.client, replica.client.ready) for replica in replicas if replica.client is not None]
    return [(client, ready) for client, ready in connections if ready is not None]


def _outstanding(connection: tuple[EngineClient, Ready]) -> tuple[int, int]:
    client, ready = connection
    return max(0, client.outstanding + 1 - ready.slots), client.outstanding  # With the request that is to be placed.
