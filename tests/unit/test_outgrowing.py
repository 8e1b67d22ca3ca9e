"""The decode loop over rows that outgrow the engine's boundaries: random requests, cancels, time limits, faults.

The engine is a stand-in that knows of each slot which token stands in each row, and as what kind of row it was computed. So a
row of the wrong kind, one that was never written, or one of another request is seen where it is read.
"""

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pytest

from runtime.draft import Drafter
from runtime.engine import Batch, Draw, EngineError, Float32, Int64
from runtime.loop import Loop
from runtime.messages import Generate, Sampling, Scored

BOUNDARIES = (40, 90)
FRONT = b"front"


def kind(length: int) -> int:
    return bisect_left(BOUNDARIES, length)


def following(tokens: list[int]) -> int:
    """The token after `tokens`: of their number, the last one, and the kind of the row."""
    return (tokens[-1] * 3 + 5 * kind(len(tokens)) + (len(tokens) % 17 == 0)) % 11 + 3


class Books:
    """Stands in for an engine: it computes nothing, and looks at what it is asked to compute from."""

    vocab_size, chunk, rows = 32, 24, 64
    many_cost, row_cost, step_cost = 0.0, 0.06, 1.0

    def __init__(self, slots: int, context: int, chance: random.Random, *, faulty: float = 0.0, exact: bool = True) -> None:
        self.slots, self.context, self.exact = slots, context, exact
        self.runs_ahead = chance.random() < 0.5
        self.length_boundaries: tuple[int, ...] = BOUNDARIES if exact else ()
        self.computed = 0
        self._chance, self._faulty, self._alternatives = chance, faulty, (0, 0)
        self._stored: list[list[tuple[int, int] | None]] = [[None] * context for _ in range(slots)]

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        if self._chance.random() < self._faulty:
            raise EngineError("a fault")
        count, seq = batch.input_ids.shape
        assert count == 1 or seq == 1
        wholes = batch.kv_lengths if batch.rope_lengths is None else batch.rope_lengths
        for row in range(count):
            end, whole = int(batch.kv_lengths[row]), kind(int(wholes[row]))
            assert end <= self.context
            assert kind(end) <= whole
            stored = self._stored[batch.first_slot + row]
            stored[end - seq : end] = [(int(token), whole) for token in batch.input_ids[row]]
        self.computed += count * seq
        tokens, logprobs = [], []
        for index, place in enumerate(batch.logit_rows.tolist()):
            row, at = divmod(place, seq)
            end, whole = int(batch.kv_lengths[row]) - seq + at + 1, kind(int(wholes[row]))
            past = self._stored[batch.first_slot + row][:end]
            if self.exact:
                assert all(stored is not None and stored[1] == whole for stored in past)
            forced = int(batch.draw.forced[index])
            tokens.append(following([stored[0] if stored else 0 for stored in past]) if forced < 0 else forced)
            logprobs.append(-float(end))
        self._alternatives = batch.draw.alternatives, len(tokens)
        return np.array(tokens, np.int64), np.array(logprobs, np.float32)

    def alternatives(self) -> tuple[Int64, Float32]:
        wanted, rows = self._alternatives
        return np.zeros((rows, wanted), np.int64), np.zeros((rows, wanted), np.float32)

    def copy(self, source: int, target: int, length: int) -> None:
        self._stored[target][:length] = self._stored[source][:length]

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        (one, length), (other, other_length) = first, second
        kept = self._stored[other][:other_length]
        self._stored[other][:length] = self._stored[one][:length]
        self._stored[one][:other_length] = kept

    def close(self) -> None: ...


class Session:
    """A loop that is asked for this and that, and what it told."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        slots, self.context = chance.choice([1, 2, 3, 5]), chance.choice([40, 41, 60, 90, 91, 120])
        self.faulty = chance.choice([0, 0, 0, 0.01])
        engine = Books(slots, self.context, chance, faulty=self.faulty)
        guessing = Books(slots, self.context, chance, faulty=chance.choice([0, 0, 0.01]), exact=False)
        self.now = 0.0
        self.loop = Loop(
            engine,
            queue=99,
            queue_tokens=10**9,
            prefill_budget=chance.choice([16, 32, None]),
            speculation=chance.random() < 0.8,
            drafter=Drafter(guessing, engine) if chance.random() < 0.5 else None,
            clock=lambda: self.now,
        )
        self.asked: dict[str, Generate] = {}
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.logprobs: dict[str, list[float]] = defaultdict(list)
        self.scored: dict[str, list[Scored]] = {}
        self.finished: dict[str, str] = {}
        self._base = [chance.randrange(3, 14) for _ in range(self.context)]

    def run(self, requests: int) -> None:
        for _ in range(20_000):
            self.now += 1
            if len(self.asked) < requests and self.chance.random() < 0.3:
                self._ask()
            if self.asked and self.chance.random() < 0.05:
                id_ = self.chance.choice(list(self.asked))
                if (news := self.loop.cancel(FRONT, id_)) is not None:
                    self.finished[id_] = str(news.row.finish)
            self._step()
            if len(self.asked) == requests and not self.loop.busy:
                return
        raise AssertionError("it does not come to an end")

    def _ask(self) -> None:
        pick = self.chance.choice
        length = min(pick([1, 2, 5, 20, 36, 38, 39, 40, 41, 42, 60, 88, 89, 90, 91, 100]), self.context - 1)
        fresh = [self.chance.randrange(3, 14) for _ in range(self.context)]
        request = Generate(
            str(len(self.asked)),
            (self._base if self.chance.random() < 0.6 else fresh)[:length],
            pick([1, 2, 3, 10, 70, 200]),
            Sampling(repetition_penalty=pick([1.0, 1.0, 1.2])),
            top_logprobs=pick([0, 0, 2]),
            prompt_logprobs=self.chance.random() < 0.2,
            speculation=self.chance.random() < 0.8,
            total_seconds=pick([0, 0, 0, 20.0]),
            client=pick("ab"),
            stop_ids=pick([[], [], [5]]),
        )
        assert self.loop.submit(FRONT, request) is None
        self.asked[request.id] = request

    def _step(self) -> None:
        for news in self.loop.step():
            row = news.row
            assert row.id not in self.finished
            self.tokens[row.id] += row.tokens
            self.logprobs[row.id] += row.logprobs
            if row.prompt:
                assert row.id not in self.scored
                self.scored[row.id] = list(row.prompt)
            if row.finish:
                self.finished[row.id] = row.finish
        self.loop.slots.check()
        assert self.loop.running <= self.loop.engine.slots

    def check(self) -> None:
        """Every answer is what its own row gives, whoever shared the batch; nothing is left."""
        assert self.loop.slots.free == self.loop.engine.slots
        assert self.loop.running == 0
        assert self.finished.keys() == self.asked.keys()
        for id_, request in self.asked.items():
            row = list(request.prompt)
            for token, logprob in zip(self.tokens[id_], self.logprobs[id_], strict=True):
                assert (token, logprob) == (following(row), -float(len(row)))
                row.append(token)
            if self.finished[id_] == "length":
                assert len(self.tokens[id_]) == min(request.max_tokens, self.context - len(request.prompt))
            if request.prompt_logprobs and self.tokens[id_]:
                scores = [place.logprob for place in self.scored.get(id_, [])]
                assert scores == [-float(length) for length in range(1, len(request.prompt))]
        assert self.faulty or "error" not in self.finished.values()


@pytest.mark.parametrize("seed", range(40))
def test_every_answer_is_its_own_rows(seed: int) -> None:
    session = Session(seed)
    session.run(session.chance.choice([10, 25]))
    session.check()


def test_a_loop_that_looks_past_the_boundary_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Loop(Books(1, 60, random.Random(0)), queue=1).slots.__class__.room
    monkeypatch.setattr("runtime.slots.Slots.room", lambda slots, sequence: real(slots, sequence) + 1)
    with pytest.raises(AssertionError):
        all_of(range(40))


def all_of(seeds: Iterable[int]) -> None:
    for seed in seeds:
        session = Session(seed)
        session.run(10)
        session.check()


def test_a_row_is_computed_anew_once() -> None:
    books = Books(1, 60, random.Random(0))
    loop = Loop(books, queue=1, speculation=False)
    assert loop.submit(FRONT, Generate("a", [3] * 35, 20)) is None
    while loop.busy:
        loop.step()
    assert books.computed == 35 + 5 + 41 + 13  # the prompt, steps up to the boundary, all anew, the rest


def test_a_stream_that_crosses_does_not_wait_for_a_strangers_prompt() -> None:
    books = Books(2, 4000, random.Random(0))
    loop = Loop(books, queue=2, speculation=False, prefill_budget=16)
    told: list[int] = []
    assert loop.submit(FRONT, Generate("stream", [3] * 35, 60)) is None
    while loop.counters.generated_tokens < 3:
        loop.step()
    assert loop.submit(FRONT, Generate("stranger", [4] * 3900, 1)) is None
    silent = longest = 0
    while loop.busy:
        news = [each.row.id for each in loop.step()]
        silent = 0 if "stream" in news or len(told) >= 60 else silent + 1
        told += [1 for id_ in news if id_ == "stream"]
        longest = max(longest, silent if len(told) < 50 else 0)
    assert longest < 12  # iterations, of which the stranger's prompt takes some 240


def test_what_a_paused_prompt_has_computed_is_found_again() -> None:
    books = Books(3, 4000, random.Random(0))
    loop = Loop(books, queue=2, speculation=False, prefill_budget=16)
    assert loop.submit(FRONT, Generate("stream", [3] * 38, 10)) is None
    while loop.counters.generated_tokens < 1:
        loop.step()
    assert loop.submit(FRONT, Generate("stranger", list(range(3, 14)) * 100, 1)) is None
    while loop.busy:
        loop.step()
    assert books.computed < 38 + 1100 + 60 + 100


@pytest.mark.parametrize("scored", [False, True])
def test_a_paused_prompts_tokens_are_counted_once(scored: bool) -> None:
    books = Books(5, 4000, random.Random(0))
    loop = Loop(books, queue=20, speculation=False, prefill_budget=16)
    for number in range(4):
        loop.submit(FRONT, Generate(f"stream {number}", [3 + number] * (20 + 3 * number), 60))
    while loop.counters.generated_tokens < 12:
        loop.step()
    before, computed = loop.counters.prompt_tokens, books.computed
    loop.submit(FRONT, Generate("stranger", list(range(3, 14)) * 100, 1, prompt_logprobs=scored))
    while loop.busy:
        loop.step()
    assert loop.counters.prompt_tokens - before == 1100
    assert books.computed - computed > 1100, "the streams were computed anew, too, and a prompt that is scored from its begin"


def test_streams_that_cross_one_after_the_other_go_on_in_that_order() -> None:
    books = Books(7, 4000, random.Random(0))
    loop = Loop(books, queue=20, speculation=False, prefill_budget=16)
    for number in range(6):
        loop.submit(FRONT, Generate(f"stream {number}", [3 + number] * 20, 40))
    lengths: dict[str, int] = defaultdict(lambda: 20)
    crossed, went_on = [], []
    while loop.busy:
        for news in loop.step():
            lengths[news.row.id] += len(news.row.tokens)
            if lengths[news.row.id] == BOUNDARIES[0] + 1:
                crossed.append(news.row.id)
            if lengths[news.row.id] == BOUNDARIES[0] + 2:
                went_on.append(news.row.id)
        if len(crossed) == 1 and "stranger" not in lengths:  # whose prompt comes last, whoever crosses meanwhile
            lengths["stranger"] = 0
            loop.submit(FRONT, Generate("stranger", [4] * 3000, 1))
    assert len(crossed) == 6
    assert went_on == crossed
