"""The decode loop: who runs next, and what came of it. Its `step` tells the whole story."""

import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from runtime.engine import Batch, Draw, Engine
from runtime.messages import Finish, Generate, Refused, Row
from runtime.sampling import uniform
from runtime.sequence import Sequence
from runtime.slots import Slots

log = logging.getLogger(__name__)

PREFILL_CHUNK = 64
"""Prompt tokens a step. Chunks begin at multiples of it in every prompt, so that a request's numbers do not depend on what
else was prefilled in the same iteration; prompts that begin alike share rows in whole chunks."""
PREFILL_BUDGET = 256
"""Prompt tokens after which the running streams get their next token; the last chunk may go over it."""


@dataclass
class Counters:
    """What the loop has done since its start."""

    steps: int = 0
    prompt_tokens: int = 0
    """Computed; those found in a slot are not among them."""
    generated_tokens: int = 0
    step_seconds: float = 0.0


@dataclass(frozen=True)
class News:
    """One row for one front end."""

    owner: bytes
    row: Row


class Loop:
    """Continuous batching over the slots of `engine`: prompts are prefilled in chunks, running sequences decode together."""

    def __init__(self, engine: Engine, *, queue: int, prefill_budget: int = PREFILL_BUDGET) -> None:
        self.engine = engine
        self.queue = queue
        self.prefill_budget = prefill_budget
        self.counters = Counters()
        self.slots = Slots(engine, PREFILL_CHUNK)
        self._waiting: deque[Sequence] = deque()
        self._by_key: dict[tuple[bytes, str], Sequence] = {}

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return self.engine.slots - self.slots.free

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """There is something to compute."""
        return bool(self._by_key)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the held slots."""
        return sum(sequence.computed for sequence in self.slots.held)

    # What front ends ask for ---------------------------------------------------------------------------------------

    def submit(self, owner: bytes, request: Generate) -> Refused | None:
        """Queue `request`, or say why not."""
        refused = self._refusal(owner, request)
        if refused is None:
            sequence = Sequence(owner, request)
            self._by_key[sequence.key] = sequence
            self._waiting.append(sequence)
        return refused

    def cancel(self, owner: bytes, request_id: str) -> News | None:
        """Forget a request and free its slot; None when it has ended already."""
        sequence = self._by_key.get((owner, request_id))
        return None if sequence is None else self._end(sequence, "cancelled")

    def cancel_all(self, owner: bytes) -> None:
        """Forget every request of a front end that is gone."""
        for sequence in [s for s in self._by_key.values() if s.owner == owner]:
            self._end(sequence, "cancelled")

    def _refusal(self, owner: bytes, request: Generate) -> Refused | None:
        length, context = len(request.prompt), self.engine.context
        if length >= context:
            message = f"the prompt has {length} tokens; the context holds {context}, prompt and answer together"
            return Refused(request.id, "prompt too long", message)
        if not request.prompt or request.max_tokens < 1:
            return Refused(request.id, "bad request", "a request needs a prompt and max_tokens of at least 1")
        if not all(0 <= token < self.engine.vocab_size for token in request.prompt):
            message = f"the prompt has a token outside the vocabulary of {self.engine.vocab_size}"
            return Refused(request.id, "bad request", message)
        if (owner, request.id) in self._by_key:
            return Refused(request.id, "bad request", f"request {request.id!r} is running already")
        if len(self._waiting) >= self.queue + self.slots.free:
            return Refused(request.id, "queue full", f"{len(self._waiting)} requests wait already")
        return None

    # One iteration -------------------------------------------------------------------------------------------------

    def step(self) -> list[News]:
        """Prefill within the budget, decode every running sequence by one token, and report what is new."""
        news = self._prefill()
        news += self._decode()
        return news

    def _prefill(self) -> list[News]:
        news: list[News] = []
        budget = self.prefill_budget
        while budget > 0:
            if self.slots.prefilling is None:
                if not self._waiting or not self.slots.free:
                    break
                self.slots.start(self._waiting.popleft())
            sequence = self.slots.prefilling
            assert sequence is not None
            chunk = min(PREFILL_CHUNK, sequence.prompt_left)
            budget -= chunk
            news += self._prefill_chunk(sequence, chunk)
        return news

    def _prefill_chunk(self, sequence: Sequence, size: int) -> list[News]:
        end = sequence.computed + size
        last = end == len(sequence.prompt)
        rows = [sequence] if last else []
        batch = Batch(
            first_slot=sequence.slot,
            input_ids=sequence.prompt[None, sequence.computed : end],
            kv_lengths=np.array([end], np.int32),
            logit_rows=np.array([size - 1] if last else [], np.int64),
            draw=_draw(rows),
        )
        outcome = self._run(batch, [sequence])
        if isinstance(outcome, list):
            return outcome
        sequence.computed = end
        self.slots.prefilled(sequence)
        self.counters.prompt_tokens += size
        if not last:
            return []
        self.slots.promote()
        return self._take([sequence], *outcome)

    def _decode(self) -> list[News]:
        sequences = list(self.slots.decoding)
        if not sequences:
            return []
        batch = Batch(
            first_slot=0,
            input_ids=np.array([[s.tokens[-1]] for s in sequences], np.int64),
            kv_lengths=np.array([s.length for s in sequences], np.int32),
            logit_rows=np.arange(len(sequences), dtype=np.int64),
            draw=_draw(sequences),
        )
        outcome = self._run(batch, sequences)
        if isinstance(outcome, list):
            return outcome
        for sequence in sequences:
            sequence.computed = sequence.length
        return self._take(sequences, *outcome)

    def _run(self, batch: Batch, sequences: list[Sequence]) -> tuple[list[int], list[float]] | list[News]:
        """The engine's tokens and log-probabilities; or, when it failed, the end of every sequence that took part."""
        start = time.perf_counter()
        try:
            tokens, logprobs = self.engine.step(batch)
        except Exception as error:  # whatever the runtime raised concerns these sequences, and the others go on
            log.exception("the engine failed on a step of %d rows", len(sequences))
            self.slots.forget()
            return [self._end(sequence, "error", f"the engine failed: {error}") for sequence in sequences]
        self.counters.steps += 1
        self.counters.step_seconds += time.perf_counter() - start
        return tokens.tolist(), logprobs.tolist()

    def _take(self, sequences: Iterable[Sequence], tokens: list[int], logprobs: list[float]) -> list[News]:
        news = []
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            shown = sequence.accept(token, self.engine.context)
            self.counters.generated_tokens += 1
            if sequence.finish is None:
                cached = sequence.cached if len(sequence.tokens) == 1 else 0
                news.append(News(sequence.owner, Row(sequence.request.id, [token], [logprob], cached=cached)))
            else:
                new = ([token], [logprob]) if shown else ([], [])
                news.append(self._end(sequence, sequence.finish, tokens=new[0], logprobs=new[1]))
        return news

    def _end(
        self,
        sequence: Sequence,
        finish: Finish,
        message: str = "",
        tokens: list[int] | None = None,
        logprobs: list[float] | None = None,
    ) -> News:
        sequence.finish = finish
        cached = sequence.cached if len(sequence.tokens) <= 1 else 0  # told once, in the first row
        del self._by_key[sequence.key]
        if sequence.slot >= 0:
            self.slots.release(sequence)
        else:
            self._waiting.remove(sequence)
        return News(sequence.owner, Row(sequence.request.id, tokens or [], logprobs or [], finish, cached, message))


def _draw(sequences: list[Sequence]) -> Draw:
    """How each sequence's next token is chosen."""
    if all(sequence.request.sampling.temperature <= 0 for sequence in sequences):
        return Draw.greedy(len(sequences))
    settings = [sequence.request.sampling for sequence in sequences]
    return Draw(
        temperature=np.array([s.temperature for s in settings], np.float32),
        top_k=np.array([s.top_k for s in settings], np.int64),
        top_p=np.array([s.top_p for s in settings], np.float32),
        min_p=np.array([s.min_p for s in settings], np.float32),
        uniform=np.array([uniform(s.request.sampling.seed, len(s.tokens)) for s in sequences], np.float32),
        forced=np.full(len(settings), -1, np.int64),
    )
