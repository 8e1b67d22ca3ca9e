"""The waiting room: who gets the next free slot, and whose time is up.

Strictly by priority. Within one priority clients share in tokens: next is a request of the client that got the fewest (the
virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), each client's own in the order
in which they came. Whoever is alone gets everything. What was had while nobody of that priority waited was taken from no one
and does not count. A newcomer begins with as much as the one who waits and had least, so that it neither starves nor starves
others; a client that comes back owes what it had more than that.
"""

import heapq
import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from statistics import fmean

from runtime.sequence import Sequence

REMEMBERED = 256
"""Clients of one priority that may owe the others something while they have no request here. One more, and all start anew."""
_WEIGHT = 0.25
"""Of the newest request in a client's average."""


@dataclass(eq=False)
class _Client:
    """One client's requests of one priority."""

    typical: float
    """Tokens that a request of its takes, a running average."""
    settled: int = 0
    """Tokens of its requests that have ended, counted from where the client was put among the others."""
    waiting: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    """First come, first served; a deque would be searched for each one that is cancelled."""
    running: set[Sequence] = field(default_factory=set)

    @property
    def absent(self) -> bool:
        return not self.waiting and not self.running

    @property
    def served(self) -> int:
        """Tokens that it got."""
        return self.settled + sum(sequence.served for sequence in self.running)

    @property
    def expected(self) -> float:
        """Tokens that it got and those that its running requests will likely take: by what they had so far alone, a client
        whose requests have just begun would get every slot that falls free."""
        return self.settled + sum(max(sequence.served, self.typical) for sequence in self.running)

    @property
    def turn(self) -> tuple[float, float]:
        """The least is next: who had the fewest tokens, of several the one whose request has waited longest. One must wait."""
        return self.expected, next(iter(self.waiting)).arrived

    def settle(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.settled += sequence.served
        self.typical += _WEIGHT * (max(1, sequence.served) - self.typical)


class _Level:
    """The clients of one priority. Whatever goes through all of them happens once a request, never once a token."""

    def __init__(self) -> None:
        self.clients: dict[str, _Client] = {}

    @property
    def waits(self) -> bool:
        return any(client.waiting for client in self.clients.values())

    def push(self, sequence: Sequence) -> None:
        if not self.waits:
            self._start_anew()
        least = self._least()
        client = self.clients.get(sequence.request.client)
        if client is None:
            typical = fmean(other.typical for other in self.clients.values()) if self.clients else 1.0
            client = self.clients[sequence.request.client] = _Client(typical)
        if not client.waiting and least < math.inf:  # nobody saves up for later what he did not ask for
            client.settled += max(0, int(least) - client.served)
        client.waiting[sequence] = None

    def pop(self) -> Sequence:
        client = min((client for client in self.clients.values() if client.waiting), key=lambda client: client.turn)
        sequence, _ = client.waiting.popitem(last=False)
        client.running.add(sequence)
        self._forget()
        return sequence

    def end(self, sequence: Sequence) -> bool:
        """True if it was still waiting."""
        client = self.clients[sequence.request.client]
        waited = sequence in client.waiting
        if waited:
            del client.waiting[sequence]
        else:
            client.settle(sequence)
        self._forget()
        return waited

    def _least(self) -> float:
        """What the client got that waits and got the least; inf where nobody waits."""
        return min((client.served for client in self.clients.values() if client.waiting), default=math.inf)

    def _forget(self) -> None:
        """Let those go who have no request here, unless they would come back as newcomers with less than they had."""
        least = self._least()
        self.clients = {name: client for name, client in self.clients.items() if not client.absent or client.served > least}
        if sum(client.absent for client in self.clients.values()) > REMEMBERED:
            self._start_anew()

    def _start_anew(self) -> None:
        """Everyone got the same so far."""
        self.clients = {name: client for name, client in self.clients.items() if not client.absent}
        for client in self.clients.values():
            client.settled -= client.served


class Queue:
    """Sequences that wait for a slot, and, as their clients' tokens count, those that hold one.

    A sequence that was pushed leaves by `end`, whether it was popped meanwhile or not. Takes O(clients) a request, nothing a
    token.
    """

    def __init__(self, context: int) -> None:
        self._context = context
        self._levels: dict[int, _Level] = {}
        self._waiting = 0
        self.tokens = 0
        """Of those that wait: prompts and the longest answers that they may get, together."""

    def __len__(self) -> int:
        """Sequences that wait."""
        return self._waiting

    def push(self, sequence: Sequence) -> None:
        """Have `sequence` wait behind its client's other requests of the same priority."""
        self._levels.setdefault(sequence.request.priority, _Level()).push(sequence)
        self._waiting += 1
        self.tokens += sequence.most(self._context)

    def pop(self) -> Sequence:
        """The sequence whose turn it is; from now on it runs. There must be one that waits."""
        if not self._waiting:
            raise RuntimeError("nobody waits")
        priority = min(priority for priority, level in self._levels.items() if level.waits)
        sequence = self._levels[priority].pop()
        self._left(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        """Forget `sequence`, waiting or running; a running one's tokens are its client's for good."""
        priority = sequence.request.priority
        if self._levels[priority].end(sequence):
            self._left(sequence)
        if not self._levels[priority].clients:
            del self._levels[priority]

    def _left(self, sequence: Sequence) -> None:
        self._waiting -= 1
        self.tokens -= sequence.most(self._context)


class Deadlines:
    """Sequences that have a time limit, the next to run out of time first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._order = itertools.count()
        self._sweep = 0
        """Entries at which those of ended sequences are thrown out."""

    def watch(self, sequence: Sequence) -> None:
        """Report `sequence` once its deadline has passed; one that has none is not kept."""
        deadline = sequence.deadline
        if deadline == math.inf:
            return
        if len(self._heap) >= self._sweep:
            self._heap = [entry for entry in self._heap if entry[-1].finish is None]
            heapq.heapify(self._heap)
            self._sweep = 2 * len(self._heap) + 16
        heapq.heappush(self._heap, (deadline, next(self._order), sequence))

    def expired(self, now: float) -> list[Sequence]:
        """The sequences that have not ended and whose deadline is `now` or was before, each once."""
        late = []
        while self._heap and self._heap[0][0] <= now:
            *_, sequence = heapq.heappop(self._heap)
            if sequence.finish is not None:
                continue
            if sequence.deadline <= now:
                late.append(sequence)
            else:  # it got its slot in time, and what is left is the limit of everything
                self.watch(sequence)
        return late
