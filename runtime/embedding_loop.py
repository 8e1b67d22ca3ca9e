"""The loop of a worker for embeddings: whose texts are computed next, and what came of it. It has the shape of `runtime.loop`.

There is no slot to hold and nothing to decode: a request is done once each of its texts has been in a batch. Requests take
turns, clients before requests: each batch is led by the one that has waited longest for its turn, which puts in its longest
texts, and is filled up with texts of about that length from all others. A batch is short, so that a request of a few texts
waits for as many batches as there are others, not for their thousands of texts.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.counters import Counters
from runtime.encoder import Embedder
from runtime.engine import DeviceLost, Float32
from runtime.footprint import TEXT_TOKENS, VECTOR_BYTES
from runtime.loop import News
from runtime.messages import MOST_INPUTS, PRIORITIES, Embed, Embedded, Finish, Refused, Row
from runtime.texts import Batch, Texts, padding

log = logging.getLogger(__name__)

QUEUE_TOKENS = 2**19
"""Tokens of texts that may wait where nobody says how many: some minutes' work of a small model on a few cores."""
TURN_SECONDS = 0.5
"""That a batch may take, for all others wait for its end: a large model's are smaller."""
LEAST_TOKENS = 128
"""Of a batch, however long it takes: fewer rows would read the weights for little."""
_WEIGHT = 0.25
"""Of the newest batch in the average of how long a token takes."""


@dataclass(frozen=True)
class Done:
    """All embeddings of a request of one front end."""

    owner: bytes
    embedded: Embedded


@dataclass
class EmbeddingLoop:
    """Batches of texts over `engine`.

    `queue` requests may wait for their first text to be computed, and `queue_tokens` tokens of texts altogether (0:
    `QUEUE_TOKENS`). A batch has up to `budget` tokens, padding included, fewer where they would take more than `TURN_SECONDS`;
    or one text that is longer. `clock` gives the seconds that requests' time limits are counted in.
    """

    engine: Embedder
    queue: int
    queue_tokens: int = 0
    budget: int = TEXT_TOKENS
    clock: Callable[[], float] = time.monotonic
    counters: Counters = field(default_factory=Counters)
    _by_key: dict[tuple[bytes, str], Texts] = field(default_factory=dict)
    _turns: dict[str, int] = field(default_factory=dict)
    """When a client that has a request here led a batch last."""
    _turn: int = 0
    _token_seconds: float = 0.0
    """What a token of a batch takes, padding included, a running average; 0 before the first one."""

    @property
    def running(self) -> int:
        """Requests of which texts have been computed."""
        return sum(texts.started is not None for texts in self._by_key.values())

    @property
    def waiting(self) -> int:
        """Requests of which none has."""
        return len(self._by_key) - self.running

    @property
    def waiting_tokens(self) -> int:
        """Tokens of texts that are not computed yet."""
        return sum(texts.tokens for texts in self._by_key.values())

    @property
    def kv_tokens(self) -> int:
        """None: there is no cache."""
        return 0

    @property
    def busy(self) -> bool:
        """There is something to compute."""
        return bool(self._by_key)

    def check(self) -> None:
        """There is nothing to keep in order while it is idle."""

    # What front ends ask for ---------------------------------------------------------------------------------------

    def submit(self, owner: bytes, request: Embed) -> Refused | None:
        """Queue `request`, or say why not."""
        refused = self._refusal(owner, request)
        if refused is None:
            self._turn += 1
            texts = Texts(owner, request, self.clock(), self._turn)
            self._by_key[texts.key] = texts
            self._turns.setdefault(request.client, self._turn)
        return refused

    def cancel(self, owner: bytes, request_id: str) -> News | None:
        """Forget a request; None when it has ended already."""
        texts = self._by_key.get((owner, request_id))
        return None if texts is None else self._end(texts, "cancelled")

    def cancel_all(self, owner: bytes) -> None:
        """Forget every request of a front end that is gone."""
        for texts in [each for each in self._by_key.values() if each.owner == owner]:
            self._end(texts, "cancelled")

    def _refusal(self, owner: bytes, request: Embed) -> Refused | None:
        lengths = [len(text) for text in request.inputs]
        if not 1 <= len(lengths) <= MOST_INPUTS or min(lengths) == 0:
            return Refused(request.id, "bad request", f"a request has 1 to {MOST_INPUTS} inputs, of at least one token each")
        if max(lengths) > self.engine.context:
            message = f"an input has {max(lengths)} tokens; the model takes {self.engine.context} of a text"
            return Refused(request.id, "prompt too long", message)
        if any(min(text) < 0 or max(text) >= self.engine.vocab_size for text in request.inputs):
            message = f"an input has a token outside the vocabulary of {self.engine.vocab_size}"
            return Refused(request.id, "bad request", message)
        if request.priority not in PRIORITIES:
            message = f"priority is {request.priority}; it goes from {PRIORITIES[0]} to {PRIORITIES[-1]}"
            return Refused(request.id, "bad request", message)
        if not (request.queue_seconds >= 0 and request.total_seconds >= 0):  # of NaN neither is true
            return Refused(request.id, "bad request", "queue_seconds and total_seconds are 0, for no limit, or more")
        if (owner, request.id) in self._by_key:
            return Refused(request.id, "bad request", f"request {request.id!r} is running already")
        full = self._full(sum(lengths), len(lengths))
        return None if full is None else Refused(request.id, "queue full", full)

    def _full(self, tokens: int, inputs: int) -> str | None:
        """Why a request cannot wait; None where it can. Who finds nobody here does not wait."""
        if not self._by_key:
            return None
        if self.waiting >= self.queue + (not self.running):
            return f"{self.waiting} requests wait already"
        there, most = self.waiting_tokens, self.queue_tokens or QUEUE_TOKENS
        if there + tokens > most:
            return f"{there} tokens of texts wait already; with the {tokens} of this one that is more than the {most} that may"
        size = 4 * self.engine.dimensions
        held = size * sum(len(texts.request.inputs) for texts in self._by_key.values())
        if held + size * inputs > VECTOR_BYTES:
            return (
                f"the embeddings of the requests that are here take {held >> 20} MiB, and no more than {VECTOR_BYTES >> 20} may"
            )
        return None

    # One iteration -------------------------------------------------------------------------------------------------

    def step(self) -> Sequence[News | Done]:
        """End what is out of time, and compute one batch: what is new."""
        news: list[News | Done] = list(self._expire())
        if self._by_key:
            news += self._compute(self._batch())
        return news

    def _expire(self) -> list[News]:
        now = self.clock()
        late = [texts for texts in self._by_key.values() if texts.deadline <= now]
        self.counters.timeouts += len(late)
        return [self._end(texts, "timeout", texts.timeout(now)) for texts in late]

    def _batch(self) -> Batch:
        """The texts of the next batch, taken from their requests. There must be some."""
        first, *others = sorted(self._by_key.values(), key=self._order)
        self._turn += 1
        first.turn = self._turns[first.request.client] = self._turn
        least = first.longest()
        longest = max(texts.longest(least + padding(least)) for texts in (first, *others))
        room = max(1, self._tokens // longest)
        parts = []
        for texts in (first, *others):
            taken = texts.take(longest, room)
            if taken:
                parts.append((texts, taken))
                room -= len(taken)
            if not room:
                break
        return Batch(parts)

    @property
    def _tokens(self) -> int:
        """Of the next batch."""
        if not self._token_seconds:
            return min(self.budget, LEAST_TOKENS)
        return min(self.budget, max(LEAST_TOKENS, int(TURN_SECONDS / self._token_seconds)))

    def _order(self, texts: Texts) -> tuple[int, int, int]:
        """The least is next: by priority, then the client that has waited longest for a turn, then its request that has."""
        return texts.request.priority, self._turns[texts.request.client], texts.turn

    def _compute(self, batch: Batch) -> list[News | Done]:
        now = self.clock()
        for texts, _ in batch.parts:
            if texts.started is None:
                texts.started = now
                self.counters.waited(now - texts.arrived)
        start = time.perf_counter()
        ids, lengths = batch.arrays()
        try:
            vectors = self.engine.embed(ids, lengths)
        except DeviceLost:
            raise
        except Exception as error:  # whatever the runtime raised concerns these requests, and the others go on
            log.exception("the engine failed on a batch of %d texts", sum(len(indices) for _, indices in batch.parts))
            return [self._end(texts, "error", f"the engine failed: {error}") for texts, _ in batch.parts]
        spent = time.perf_counter() - start
        self._token_seconds += (_WEIGHT if self._token_seconds else 1) * (spent / ids.size - self._token_seconds)
        self.counters.stepped(spent)
        self.counters.prompt_tokens += batch.tokens
        return self._hand_out(batch, vectors)

    def _hand_out(self, batch: Batch, vectors: Float32) -> list[News | Done]:
        """Give each request its rows, and those their answers that have all."""
        done: list[News | Done] = []
        at = 0
        for texts, indices in batch.parts:
            if texts.vectors is None:
                texts.vectors = np.empty((len(texts.request.inputs), self.engine.dimensions), np.float32)
            texts.vectors[indices] = vectors[at : at + len(indices)]
            at += len(indices)
            if not texts.left:
                raw = texts.vectors.astype("<f4", copy=False).tobytes()
                self.counters.finished += 1
                self._forget(texts)
                done.append(Done(texts.owner, Embedded(texts.request.id, raw, self.engine.dimensions)))
        return done

    def _end(self, texts: Texts, finish: Finish, message: str = "") -> News:
        """End a request that gets no embeddings."""
        if texts.started is None:
            self.counters.waited(self.clock() - texts.arrived)
        self._forget(texts)
        return News(texts.owner, Row(texts.request.id, [], [], finish, message=message))

    def _forget(self, texts: Texts) -> None:
        del self._by_key[texts.key]
        client = texts.request.client
        if not any(other.request.client == client for other in self._by_key.values()):
            del self._turns[client]
