"""The decode loop: who runs next, and what came of it. Its `step` tells the whole story."""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from runtime import admission
from runtime.counters import Counters
from runtime.draft import Drafter
from runtime.engine import Batch, DeviceLost, Draw, Engine
from runtime.grammar import PATIENCE, GrammarError, Grammars, Matcher
from runtime.messages import Finish, Generate, Refused, Row, Scored
from runtime.pace import Pace
from runtime.penalties import Penalties
from runtime.queue import Deadlines, Queue
from runtime.sampling import UNKNOWN, Place, draw
from runtime.sequence import Sequence
from runtime.slots import Slots
from runtime.speculation import Lookup, Plan, worthwhile

log = logging.getLogger(__name__)
T = TypeVar("T")
Tops = list[tuple[int, float]]
"""The most likely tokens in one place and their log-probabilities, likeliest first; none where none are wanted."""

BUDGET_CHUNKS = 2
"""Steps full of prompt tokens after which the running streams get their next token, at most."""
QUEUE_FILLS = 8
"""How often the tokens that may wait by default would fill every slot to its end. Whoever is last then waits for about as many
tokens a slot with one slot as with 64, whereas the same number for both would be hours for the one and nothing for the other.
With 8 slots it is what 64 requests can come to at most, which is how many may wait by default."""
_TILE = 16
_NAP = 0.005
"""Seconds that an iteration waits for a constraint to be compiled where there is nothing else to do."""


_NOTHING = Row("", [], [])
"""No tokens."""


@dataclass(frozen=True)
class News:
    """One row for one front end."""

    owner: bytes
    row: Row


class Loop:
    """Continuous batching over the slots of `engine`: prompts are prefilled in chunks, running sequences decode together.

    `queue` requests may wait for a slot, and `queue_tokens` tokens of theirs, prompts and the longest possible answers together
    (0: `QUEUE_FILLS`). `grammars` compiles constraints; without it, requests that have one are refused. `clock` gives the
    seconds that requests' time limits are counted in.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue: int,
        queue_tokens: int = 0,
        prefill_budget: int | None = None,
        speculation: bool = True,
        drafter: Drafter | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.queue = queue
        self.queue_tokens = queue_tokens or QUEUE_FILLS * engine.slots * engine.context
        self.prefill_budget = BUDGET_CHUNKS * engine.chunk if prefill_budget is None else prefill_budget
        self.speculation = speculation
        self.drafter = drafter
        self.grammars = grammars
        self.counters = Counters()
        self.slots = Slots(engine.slots, [engine] if drafter is None else [engine, drafter], engine.length_boundaries)
        self._pace = Pace()
        self._iteration = 0
        self._clock = clock
        self._waiting = Queue(engine.context)
        self._compiling: dict[Sequence, Future[Matcher]] = {}
        """What will be pushed into `_waiting` once its constraint is compiled."""
        self._unlooked: list[Matcher] = []
        """Of sequences whose masks must be found anew, since they have a new token."""
        self._deadlines = Deadlines()
        self._outgrown: deque[Sequence] = deque()
        """Sequences that have passed one of the engine's boundaries, to be prefilled again before any that wait; and, behind
        them, the prompt that was under way when the first of them came."""
        self._by_key: dict[tuple[bytes, str], Sequence] = {}

    @property
    def running(self) -> int:
        """Sequences that hold a slot, or will get theirs back."""
        return self.engine.slots - self._free

    @property
    def _free(self) -> int:
        """Slots for sequences that wait."""
        return self.slots.free - len(self._outgrown)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting) + len(self._compiling)

    @property
    def waiting_tokens(self) -> int:
        """Of the sequences that wait for a slot: prompts and the longest answers that they may get, together."""
        return self._waiting.tokens + sum(sequence.most(self.engine.context) for sequence in self._compiling)

    @property
    def busy(self) -> bool:
        """There is something to compute."""
        return bool(self._by_key)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the held slots."""
        return sum(sequence.computed for sequence in self.slots.held)

    def check(self) -> None:
        """While nothing runs: raise RuntimeError if the slots' books are not in order."""
        self.slots.check()

    # What front ends ask for ---------------------------------------------------------------------------------------

    def submit(self, owner: bytes, request: Generate) -> Refused | None:
        """Queue `request`, or say why not."""
        sequence = Sequence(owner, request, self._clock())
        refused = self._refusal(sequence)
        if refused is None:
            self._by_key[sequence.key] = sequence
            if request.constraint is None or self.grammars is None:
                self._waiting.push(sequence)
            else:
                self._compiling[sequence] = self.grammars.matcher(request.constraint)
            self._deadlines.watch(sequence)
        return refused

    def cancel(self, owner: bytes, request_id: str) -> News | None:
        """Forget a request and free its slot; None when it has ended already."""
        sequence = self._by_key.get((owner, request_id))
        return None if sequence is None else self._end(sequence, "cancelled")

    def cancel_all(self, owner: bytes) -> None:
        """Forget every request of a front end that is gone."""
        for sequence in [s for s in self._by_key.values() if s.owner == owner]:
            self._end(sequence, "cancelled")

    def _refusal(self, sequence: Sequence) -> Refused | None:
        request = sequence.request
        refused = admission.refusal(request, self.engine, constrains=self.grammars is not None)
        if refused is not None:
            return refused
        if sequence.key in self._by_key:
            return Refused(request.id, "bad request", f"request {request.id!r} is running already")
        full = self._full(sequence.most(self.engine.context))
        return None if full is None else Refused(request.id, "queue full", full)

    def _full(self, tokens: int) -> str | None:
        """Why a request of up to `tokens` tokens cannot wait; None where it can. Those for whom a slot is free do not wait."""
        requests, free = self.waiting, self._free
        if requests >= self.queue + free:
            return f"{requests} requests wait already"
        if requests > free and self.waiting_tokens + tokens > self.queue_tokens + free * self.engine.context:
            return (
                f"{requests} requests wait already and come to {self.waiting_tokens} tokens, prompts and max_tokens together; "
                f"with the {tokens} of this one that is more than the {self.queue_tokens} that may wait"
            )
        return None

    # One iteration -------------------------------------------------------------------------------------------------

    def step(self) -> list[News]:
        """End what is out of time, verify guesses, prefill within the budget, decode everyone else by a token: what is new."""
        self._iteration += 1
        news = self._expire() + self._admit()
        start = time.perf_counter()
        plain = self._plain_cost()
        deadline = time.monotonic() + PATIENCE
        ready = [sequence for sequence in self.slots.decoding if _ready(sequence, deadline)]
        ready = self._grown(ready)
        plans = {sequence: plan for sequence in ready if (plan := self._plan(sequence, plain)).count}
        news += self._verify_some(plans)
        news += self._prefill(time.perf_counter() - start)
        self._look()
        deadline = time.monotonic() + PATIENCE
        others = self._within([sequence for sequence in self.slots.decoding if sequence not in plans])
        news += self._decode([sequence for sequence in others if _ready(sequence, deadline)])
        self._look()
        return news

    def _expire(self) -> list[News]:
        now = self._clock()
        late = self._deadlines.expired(now)
        self.counters.timeouts += len(late)
        return [self._end(sequence, "timeout", sequence.timeout(now)) for sequence in late]

    def _admit(self) -> list[News]:
        """Have those wait for a slot whose constraints are compiled by now; they hold up nobody who came later."""
        if self._compiling and not (self._waiting or self.running):
            wait(self._compiling.values(), _NAP, FIRST_COMPLETED)
        news: list[News] = []
        for sequence in [sequence for sequence, compiling in self._compiling.items() if compiling.done()]:
            try:
                sequence.matcher = self._compiling[sequence].result()
            except GrammarError as error:
                news.append(self._end(sequence, "unmet", f"the constraint cannot be met: {error}"))
            except Exception as error:  # whatever llguidance raised concerns this sequence
                log.exception("a constraint could not be compiled")
                news.append(self._end(sequence, "unmet", f"the constraint cannot be compiled: {error}"))
            else:
                del self._compiling[sequence]
                self._waiting.push(sequence)
        return news

    def _grown(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those of `sequences` that can go on; the others have grown past a boundary, and are to be computed anew."""
        within = self._within(sequences)
        past = [] if within is sequences else [sequence for sequence in sequences if sequence not in within]
        for sequence in past:
            self.slots.restart(sequence)
        prompt = self.slots.prefilling
        if past and prompt is not None and not prompt.replayed:  # for no prompt shall a stream wait
            prompt.scored = []  # which begins anew, since scores are found by computing
            past.append(self.slots.pause())
        if past:  # first come, first computed; the prompt last
            self._outgrown = deque(sorted([*self._outgrown, *past], key=lambda sequence: not sequence.replayed))
        return within

    def _within(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those of `sequences` whose next token is computed as the rows in their slots were."""
        if not self.engine.length_boundaries:
            return sequences
        return [sequence for sequence in sequences if sequence.length <= self.slots.room(sequence)]

    def _look(self) -> None:
        """Begin with the masks of those who took a token."""
        if self._unlooked and self.grammars is not None:
            self.grammars.look(self._unlooked)
            self._unlooked = []

    def _prefill(self, spent: float) -> list[News]:
        """Compute prompts; the running streams have been held up for `spent` seconds already."""
        news: list[News] = []
        budget = self._pace.prefill_tokens(self.prefill_budget, spent) if self.slots.decoding else self.prefill_budget
        while budget > 0:
            if self.slots.prefilling is None:
                if self._outgrown:
                    self.slots.start(self._outgrown.popleft())
                elif self._waiting and self._free > 0:
                    self._start(self._waiting.pop())
                else:
                    break
            sequence = self.slots.prefilling
            assert sequence is not None
            most = min(self.engine.chunk, self.engine.rows) if sequence.scores_prompt else self.engine.chunk
            chunk = _chunk(sequence.prefix_left, min(max(budget, _TILE), most))
            budget -= chunk
            news += self._prefill_chunk(sequence, chunk)
        return news

    def _start(self, sequence: Sequence) -> None:
        self.slots.start(sequence)
        if Penalties.wanted(sequence.request):
            sequence.penalties = Penalties(sequence.request, self.engine.vocab_size)
        sequence.started = self._clock()
        self.counters.waited(sequence.started - sequence.arrived)
        self.counters.cached_tokens += sequence.cached

    def _prefill_chunk(self, sequence: Sequence, size: int) -> list[News]:
        end = sequence.computed + size
        last = end == sequence.prefix_length
        places = [Place(sequence)] if last else []
        if sequence.scores_prompt:
            places = [
                Place(sequence, forced=token) for token in sequence.prompt[sequence.computed + 1 : end + 1].tolist()
            ] + places
        start = time.perf_counter()
        batch = Batch(
            first_slot=sequence.slot,
            input_ids=sequence.prefix[None, sequence.computed : end],
            kv_lengths=np.array([end], np.int32),
            logit_rows=np.arange(size - len(places), size, dtype=np.int64),
            draw=draw(places),
            rope_lengths=np.array([sequence.prefix_length], np.int32),
        )
        outcome = self._run(batch, [sequence])
        if isinstance(outcome, list):
            return outcome
        tokens, logprobs = outcome
        tops = self._alternatives(batch.draw, [sequence] * len(tokens))
        if sequence.scores_prompt:
            scored = size - last
            sequence.scored += map(Scored, logprobs[:scored], tops[:scored])
        if self._speculates(sequence):
            self._ask_drafter(lambda drafter: drafter.read(sequence.slot, sequence.prefix[:end]))
        self._pace.prefilled(size, time.perf_counter() - start)
        self.counters.prompt_tokens += sequence.count_prompt(end)
        sequence.computed = end
        self.slots.prefilled(sequence)
        if not last:
            return []
        self.slots.promote()
        if self._speculates(sequence) and sequence.lookup is None:
            sequence.lookup = Lookup(sequence.request.prompt, sequence.request.prediction)
        return [self._take(sequence, tokens[-1:], logprobs[-1:], tops[-1:])]

    def _decode(self, sequences: list[Sequence]) -> list[News]:
        """The next token of `sequences`; those between their slots come along, and what is computed for them is not used."""
        if not sequences:
            return []
        rows = self.slots.decoding[: sequences[-1].slot + 1]
        start = time.perf_counter()
        batch = Batch(
            first_slot=0,
            input_ids=np.array([[s.tokens[-1]] for s in rows], np.int64),
            kv_lengths=np.array([s.length for s in rows], np.int32),
            logit_rows=np.array([s.slot for s in sequences], np.int64),
            draw=draw([Place(s) for s in sequences]),
        )
        outcome = self._run(batch, sequences, self._ahead(rows, sequences))
        if isinstance(outcome, list):
            return outcome
        self._pace.decoded(time.perf_counter() - start)
        self.counters.decoded(len(sequences))
        for sequence in sequences:  # before the first of them ends and others take its slot
            sequence.computed = sequence.length
        told = zip(sequences, *outcome, self._alternatives(batch.draw, sequences), strict=True)
        return [self._take(sequence, [token], [logprob], [top]) for sequence, token, logprob, top in told]

    def _ahead(self, rows: list[Sequence], sequences: list[Sequence]) -> Draw | None:
        """The draws of the next decode step, where it is likely to be for the same rows; None where it is not."""
        if not self.engine.runs_ahead or len(rows) != len(sequences) or len(rows) != len(self.slots.decoding):
            return None
        if self.slots.prefilling is not None or self._outgrown or (self._waiting and self.slots.free):
            return None
        if any(s.length + 1 >= self.engine.context or len(s.tokens) + 1 >= s.request.max_tokens for s in rows):
            return None
        if not all(s.foreseeable and s.length < self.slots.room(s) for s in rows):
            return None
        return draw([Place(s, (UNKNOWN,)) for s in rows])

    # Guesses -------------------------------------------------------------------------------------------------------

    def _plain_cost(self) -> float:
        """What a token costs in the step that the decoding sequences share, in steps for one token."""
        beside = len(self.slots.decoding)
        return 1.0 if beside <= 1 else (1 + self.engine.many_cost + self.engine.row_cost * (beside - 1)) / beside

    def _plan(self, sequence: Sequence, plain: float) -> Plan:
        """How many of its next tokens are worth guessing where one costs `plain` without guesses."""
        end = int(min(self.engine.context, self.slots.room(sequence)))
        room = min(sequence.request.max_tokens - len(sequence.tokens) - 1, end - sequence.length)
        fixed, cost = self.engine.many_cost, self.engine.row_cost
        if sequence.matcher is not None:
            certain = len(sequence.guess(room)) if self.speculation and sequence.request.speculation else 0
            return worthwhile(1.0, cost, certain, fixed=fixed, plain=plain)
        if sequence.lookup is None:
            return Plan()
        plan = worthwhile(sequence.lookup.confidence, cost, room, fixed=fixed, plain=plain)
        if self.drafter is None:
            return plan
        draft = worthwhile(sequence.draft_share, cost + self.drafter.cost, room, fixed=fixed, plain=plain, drafted=True)
        return draft if draft.gain > plan.gain else plan

    def _verify_some(self, plans: dict[Sequence, Plan]) -> list[News]:
        """Verify guesses, first of those who waited longest; while others wait, for no longer than they may."""
        news: list[News] = []
        prompts = self.slots.prefilling is not None or bool(self._outgrown) or bool(self._waiting and self._free > 0)
        hurry = prompts or len(plans) < len(self.slots.decoding)
        limit = self._pace.stall / 2 if prompts else self._pace.stall
        start = time.perf_counter()
        for sequence in sorted(plans, key=lambda sequence: sequence.turn):
            if hurry and news and time.perf_counter() - start > limit:
                break
            sequence.turn = self._iteration
            news += self._verify(sequence, plans[sequence])
        return news

    def _verify(self, sequence: Sequence, plan: Plan) -> list[News]:
        """The engine's own tokens in the places of guesses, up to the first that differs from its guess, and that one."""
        if plan.drafted:
            guesses = self._ask_drafter(lambda drafter: drafter.guess(sequence, plan.count)) or []
        else:
            guesses = sequence.guess(plan.count)
        count = len(guesses) + 1
        batch = Batch(
            first_slot=sequence.slot,
            input_ids=np.array([[sequence.tokens[-1], *guesses]], np.int64),
            kv_lengths=np.array([sequence.length + len(guesses)], np.int32),
            logit_rows=np.arange(count, dtype=np.int64),
            draw=draw([Place(sequence, guesses[:later]) for later in range(count)]),
        )
        outcome = self._run(batch, [sequence])
        if isinstance(outcome, list):
            return outcome
        tokens, logprobs = outcome
        right = next((i for i, guess in enumerate(guesses) if guess != tokens[i]), len(guesses))
        self.counters.guessed_tokens += len(guesses)
        self.counters.accepted_tokens += right
        if plan.drafted:
            sequence.judge_draft(len(guesses), right)
        told = right + 1
        tops = self._alternatives(batch.draw, [sequence] * told)
        return [self._take(sequence, tokens[:told], logprobs[:told], tops)]

    def _speculates(self, sequence: Sequence) -> bool:
        """Whether its tokens are guessed; those that its grammar forces are another matter."""
        return self.speculation and sequence.request.speculation and sequence.matcher is None

    def _ask_drafter(self, ask: Callable[[Drafter], T]) -> T | None:
        """What the draft engine gives; None where there is none, now and later once it has failed."""
        if self.drafter is None:
            return None
        try:
            return ask(self.drafter)
        except Exception:  # the engine itself is well, and needs no guesses
            log.exception("the draft engine failed; going on without it")
            self.slots.memories.remove(self.drafter)
            self.drafter = None
            return None

    def _run(
        self, batch: Batch, sequences: list[Sequence], ahead: Draw | None = None
    ) -> tuple[list[int], list[float]] | list[News]:
        """The engine's tokens and log-probabilities; or, when it failed, the end of every sequence that took part.

        Raises DeviceLost, after which there is nothing left to run on.
        """
        start = time.perf_counter()
        try:
            tokens, logprobs = self.engine.step(batch, ahead)
        except DeviceLost:
            raise
        except Exception as error:  # whatever the runtime raised concerns these sequences, and the others go on
            log.exception("the engine failed on a step of %d rows", len(sequences))
            self.slots.forget()
            return [self._end(sequence, "error", f"the engine failed: {error}") for sequence in sequences]
        self.counters.stepped(time.perf_counter() - start)
        return tokens.tolist(), logprobs.tolist()

    def _alternatives(self, draw: Draw, rows: list[Sequence]) -> list[Tops]:
        """What the engine's last step tells of its first rows, which belong to `rows`."""
        if not draw.alternatives:
            return [[]] * len(rows)
        tokens, logprobs = (array[: len(rows)].tolist() for array in self.engine.alternatives())
        return [
            list(zip(*pair, strict=True))[: sequence.request.top_logprobs]
            for sequence, *pair in zip(rows, tokens, logprobs, strict=True)
        ]

    def _take(self, sequence: Sequence, tokens: list[int], logprobs: list[float], tops: list[Tops]) -> News:
        first, shown = not sequence.tokens, 0
        tops = tops if sequence.request.top_logprobs else []
        scored, sequence.scored = sequence.scored, []  # told once, in the first row
        for token in tokens:
            self.counters.generated_tokens += 1
            shown += sequence.accept(token, self.engine.context)
            if sequence.finish is not None:
                row = Row("", tokens[:shown], logprobs[:shown], tops=tops[:shown], prompt=scored)
                failure = sequence.matcher.failure if sequence.matcher is not None and sequence.finish == "unmet" else ""
                return self._end(sequence, sequence.finish, failure and f"the constraint cannot be kept to: {failure}", row)
        if sequence.matcher is not None:
            self._unlooked.append(sequence.matcher)
        sequence.computed = sequence.length - 1
        sequence.note(tokens)
        cached = sequence.cached if first else 0
        return News(sequence.owner, Row(sequence.request.id, tokens, logprobs, cached=cached, tops=tops, prompt=scored))

    def _end(self, sequence: Sequence, finish: Finish, message: str = "", row: Row = _NOTHING) -> News:
        """The last row of `sequence`, with what `row` has of tokens."""
        sequence.finish = finish
        self.counters.finished += finish in ("stop", "length")
        cached = sequence.cached if len(sequence.tokens) <= 1 else 0  # told once, in the first row
        del self._by_key[sequence.key]
        compiling = self._compiling.pop(sequence, None)
        if compiling is None:
            self._waiting.end(sequence)
        else:
            compiling.cancel()
        if sequence.matcher is not None and self.grammars is not None:
            self.grammars.give_back(sequence.matcher)
        if sequence in self._outgrown:
            self._outgrown.remove(sequence)
        elif sequence.started is not None:
            self.slots.release(sequence)
        else:
            self.counters.waited(self._clock() - sequence.arrived)
        told = msgspec.structs.replace(row, id=sequence.request.id, finish=finish, cached=cached, message=message)
        return News(sequence.owner, told)


def _ready(sequence: Sequence, deadline: float) -> bool:
    """Whether it is known which tokens may come next; waits for it until time.monotonic() is `deadline`."""
    return sequence.matcher is None or sequence.matcher.ready(deadline)


def _chunk(left: int, most: int) -> int:
    """How many of a prompt's `left` tokens to compute at once, at most `most`, which is a tile or more.

    Kernels work through rows in tiles of 16 and more, and compute a row that is alone in its tile with other roundings: no
    chunk leaves one, so that a prompt's rows come out the same in whatever chunks they are computed.
    """
    size = min(left, most)
    if left - size == 1:
        size -= 1
    return size - 2 if size % _TILE == 1 and left > 1 else size
