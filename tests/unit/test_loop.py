"""The decode loop on a real engine: a tiny random model, compiled for these tests."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import ort, pace
from runtime.engine import Batch, DeviceLost, Draw, EngineError
from runtime.loop import Loop
from runtime.messages import Generate, Refused, Row, Sampling
from runtime.ort import OrtEngine
from runtime.pace import LEAST_PREFILL

SLOTS = 4
CONTEXT = 320
FRONT = b"front"
SHARED = 64
"""Tokens that prompts have in common: whole blocks."""


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[OrtEngine]:
    engine = ort.load(tiny_bundle, "cpu-fp32", slots=SLOTS, context=CONTEXT, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def loop(engine: OrtEngine) -> Loop:
    """Without guesses, whose attention rounds otherwise in the last bits: see test_guesses.py."""
    return Loop(engine, queue=100, speculation=False)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}/{length}/{i}").randrange(3, 200) for i in range(length)]


def run(loop: Loop, *requests: Generate, owner: bytes = FRONT) -> dict[str, list[Row]]:
    """Submit everything at once and run until the loop is idle: each request's rows in their order."""
    for request in requests:
        assert loop.submit(owner, request) is None
    return drain(loop)


def drain(loop: Loop) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    while loop.busy:
        for news in loop.step():
            rows.setdefault(news.row.id, []).append(news.row)
        loop.slots.check()
    assert loop.slots.free == SLOTS
    return rows


def tokens(rows: list[Row]) -> list[int]:
    return [token for row in rows for token in row.tokens]


def logprobs(rows: list[Row]) -> list[float]:
    return [logprob for row in rows for logprob in row.logprobs]


def test_a_request_gets_its_tokens_one_row_at_a_time_and_one_finish(loop: Loop) -> None:
    rows = run(loop, Generate("a", prompt(7), max_tokens=5))["a"]
    assert [len(row.tokens) for row in rows] == [1] * 5
    assert [row.finish for row in rows] == [None] * 4 + ["length"]
    assert all(logprob <= 0 for logprob in logprobs(rows))


def test_answers_do_not_depend_on_who_shares_the_batch(loop: Loop) -> None:
    """To the last bit of the log-probabilities, with more requests than slots, of ragged lengths, some sampled."""
    requests = [
        Generate(
            f"r{i}",
            prompt(length, seed=i),
            max_tokens=3 + i * 2,
            sampling=Sampling(temperature=0.8 if i % 2 else 0.0, top_k=20 if i % 4 == 1 else 0, top_p=0.9, seed=i),
        )
        for i, length in enumerate((1, 3, 17, SHARED - 1, SHARED, SHARED + 1, 40, 9, 2, 100, 5, 30))
    ]
    alone = {request.id: run(loop, request)[request.id] for request in requests}
    together = run(loop, *requests)
    for request in requests:
        assert tokens(together[request.id]) == tokens(alone[request.id])
        assert logprobs(together[request.id]) == logprobs(alone[request.id])


def test_requests_that_come_and_go_at_random_answer_as_if_alone(loop: Loop) -> None:
    chance = random.Random(7)
    requests = [Generate(f"r{i}", prompt(chance.randrange(1, 60), i), max_tokens=chance.randrange(1, 25)) for i in range(40)]
    alone = {request.id: tokens(run(loop, request)[request.id]) for request in requests}
    rows: dict[str, list[Row]] = {}
    waiting, cancelled = list(requests), set()
    while waiting or loop.busy:
        if waiting and chance.random() < 0.5:
            assert loop.submit(FRONT, waiting.pop()) is None
        if chance.random() < 0.1:
            victim = chance.choice(requests).id
            news = loop.cancel(FRONT, victim)
            if news is not None:
                cancelled.add(victim)
                rows.setdefault(victim, []).append(news.row)
        for item in loop.step():
            rows.setdefault(item.row.id, []).append(item.row)
        loop.slots.check()
    assert loop.slots.free == SLOTS
    assert cancelled
    for request in requests:
        got = tokens(rows[request.id])
        assert got == alone[request.id][: len(got)]
        assert rows[request.id][-1].finish == ("cancelled" if request.id in cancelled else "length")
        assert request.id in cancelled or len(got) == request.max_tokens


def test_sampling_depends_on_the_seed_alone(loop: Loop) -> None:
    def sampled(seed: int) -> list[int]:
        request = Generate("s", prompt(5), max_tokens=30, sampling=Sampling(temperature=2.0, seed=seed))
        return tokens(run(loop, request)["s"])

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(loop: Loop) -> None:
    free = tokens(run(loop, Generate("a", prompt(6), max_tokens=20))["a"])
    stop = free[7]
    rows = run(loop, Generate("b", prompt(6), max_tokens=20, stop_ids=[stop]))["b"]
    assert tokens(rows) == free[: free.index(stop)]
    assert rows[-1].finish == "stop"


def test_an_answer_ends_where_the_context_does(loop: Loop) -> None:
    rows = run(loop, Generate("a", prompt(CONTEXT - 4), max_tokens=100))["a"]
    assert len(tokens(rows)) == 4
    assert rows[-1].finish == "length"


def test_a_long_prompt_does_not_hold_up_a_running_stream(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of its tokens as much of the newcomer's prompt is computed as takes 1.5 decode steps, or the least."""
    monkeypatch.setattr(pace, "LEAST_STALL", 0.0)
    loop.submit(FRONT, Generate("running", prompt(4), max_tokens=300))
    for _ in range(5):
        loop.step()
    loop.submit(FRONT, Generate("long", prompt(CONTEXT - 10), max_tokens=2))
    gaps = []
    while loop.slots.prefilling is not None or loop.waiting:
        before, fitting = loop.counters.prompt_tokens, loop._pace.prefill_tokens(loop.prefill_budget, 0.0)
        assert "running" in [news.row.id for news in loop.step()]
        gaps.append(loop.counters.prompt_tokens - before)
        assert gaps[-1] <= max(LEAST_PREFILL, fitting)
    assert sum(gaps) == CONTEXT - 10
    assert min(gaps[:-2]) >= LEAST_PREFILL - 2
    loop.cancel(FRONT, "running")
    drain(loop)


def test_prompts_that_begin_alike_share_rows_and_not_one_bit_changes(engine: OrtEngine) -> None:
    """Random conversations over few beginnings, more of them than slots, against an engine that remembers nothing."""
    chance = random.Random(3)
    beginnings = [prompt(length, seed) for seed, length in enumerate((SHARED, 2 * SHARED + 5, 130, 200))]
    requests = []
    for i in range(60):
        start = chance.choice(beginnings)
        rest = prompt(chance.randrange(1, 90), 1000 + i % 9)
        requests.append(
            Generate(f"r{i}", start[: chance.randrange(1, len(start) + 1)] + rest, max_tokens=chance.randrange(1, 9))
        )
        if chance.random() < 0.4:  # a conversation goes on
            beginnings[chance.randrange(4)] = requests[-1].prompt[: CONTEXT - 100]
    loop = Loop(engine, queue=100, speculation=False)
    warm: dict[str, list[Row]] = {}
    waiting = list(requests)
    while waiting or loop.busy:
        for _ in range(chance.randrange(3)):
            if waiting:
                assert loop.submit(FRONT, waiting.pop(0)) is None
        for news in loop.step():
            warm.setdefault(news.row.id, []).append(news.row)
        loop.slots.check()
    shared = sum(row.cached for rows in warm.values() for row in rows)
    assert shared > 20 * SHARED
    assert loop.counters.prompt_tokens + shared == sum(len(request.prompt) for request in requests)
    for request in requests:
        cold = run(Loop(engine, queue=1, speculation=False), request)[request.id]
        assert tokens(warm[request.id]) == tokens(cold)
        assert logprobs(warm[request.id]) == logprobs(cold)


def test_a_second_request_computes_only_what_is_new(loop: Loop) -> None:
    shared = prompt(4 * SHARED)
    first = run(loop, Generate("a", [*shared, 5, 6], max_tokens=2))["a"]
    before = loop.counters.prompt_tokens
    second = run(loop, Generate("b", [*shared, 7, 8, 9], max_tokens=2))["b"]
    assert [row.cached for row in first] == [0, 0]
    assert [row.cached for row in second] == [4 * SHARED, 0]
    assert loop.counters.prompt_tokens - before == 3


def test_a_running_stream_shares_its_prompt(loop: Loop) -> None:
    shared = prompt(2 * SHARED)
    loop.submit(FRONT, Generate("running", [*shared, 5, 6], max_tokens=40))
    loop.step()
    loop.submit(FRONT, Generate("new", [*shared, 7, 8], max_tokens=2))
    rows = drain(loop)
    assert rows["new"][0].cached == 2 * SHARED


def test_what_was_used_last_is_remembered_longest(loop: Loop) -> None:
    """One more prompt than there are slots, in turn: the oldest is forgotten, the others are not."""
    prompts = [prompt(SHARED + 2, seed) for seed in range(SLOTS + 1)]
    for i, each in enumerate(prompts):
        run(loop, Generate(str(i), each, max_tokens=1))
    cached = [run(loop, Generate(str(i), each, max_tokens=1))[str(i)][0].cached for i, each in enumerate(prompts[1:])]
    assert cached == [SHARED] * SLOTS
    assert run(loop, Generate("old", prompts[0], max_tokens=1))["old"][0].cached == 0


def test_an_engine_that_failed_is_not_trusted_to_have_written_its_rows(
    engine: OrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(engine, queue=8)
    shared = prompt(SHARED + 2)
    run(loop, Generate("a", shared, max_tokens=1))

    def failing(self: OrtEngine, batch: Batch, ahead: Draw | None) -> object:
        raise EngineError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(OrtEngine, "step", failing)
        assert run(loop, Generate("b", prompt(5), max_tokens=1))["b"][-1].finish == "error"
    assert run(loop, Generate("c", shared, max_tokens=1))["c"][0].cached == 0


def test_a_lost_device_ends_the_loop_and_not_only_a_request(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: OrtEngine, batch: Batch, ahead: Draw | None) -> object:
        raise DeviceLost("the GPU fell off the bus")

    monkeypatch.setattr(OrtEngine, "step", lost)
    loop.submit(FRONT, Generate("a", prompt(5), max_tokens=3))
    with pytest.raises(DeviceLost, match="fell off the bus"):
        loop.step()


def test_cancelling_frees_the_slot_at_once_in_every_stage(loop: Loop) -> None:
    for i in range(SLOTS + 2):
        loop.submit(FRONT, Generate(f"r{i}", prompt(20, i), max_tokens=50))
    loop.submit(FRONT, Generate("prefilling", prompt(CONTEXT - 10), max_tokens=5))
    loop.cancel(FRONT, "r1")
    loop.step()
    assert loop.slots.free == 0
    for name in ("r0", "r2", "prefilling", "r5"):
        news = loop.cancel(FRONT, name)
        assert news is not None
        assert news.row.finish == "cancelled"
        loop.slots.check()
    assert loop.cancel(FRONT, "r0") is None
    assert loop.slots.free == 2
    assert set(drain(loop)) == {"r3", "r4"}


def test_a_front_end_that_is_gone_leaves_nothing_behind(loop: Loop) -> None:
    loop.submit(b"gone", Generate("a", prompt(5), max_tokens=50))
    loop.submit(b"here", Generate("a", prompt(5), max_tokens=3))
    loop.step()
    loop.cancel_all(b"gone")
    assert loop.running == 1
    assert tokens(drain(loop)["a"])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Generate("a", prompt(CONTEXT), max_tokens=1), "prompt too long"),
        (Generate("a", [], max_tokens=1), "bad request"),
        (Generate("a", [1], max_tokens=0), "bad request"),
        (Generate("a", [10**9], max_tokens=1), "bad request"),
        (Generate("a", [-1], max_tokens=1), "bad request"),
        (Generate("a", [1], max_tokens=1, priority=101), "bad request"),
        (Generate("a", [1], max_tokens=1, queue_seconds=-1.0), "bad request"),
        (Generate("a", [1], max_tokens=1, total_seconds=float("nan")), "bad request"),
    ],
)
def test_what_cannot_run_is_refused_with_a_reason(loop: Loop, request_: Generate, reason: str) -> None:
    refused = loop.submit(FRONT, request_)
    assert isinstance(refused, Refused)
    assert refused.reason == reason
    assert refused.message
    assert not loop.busy


def test_a_full_queue_refuses(engine: OrtEngine) -> None:
    loop = Loop(engine, queue=2)
    outcomes = [loop.submit(FRONT, Generate(f"r{i}", prompt(3), max_tokens=2)) for i in range(SLOTS + 3)]
    assert outcomes[:-1] == [None] * (SLOTS + 2)
    last = outcomes[-1]
    assert isinstance(last, Refused)
    assert last.reason == "queue full"
    assert len(drain(loop)) == SLOTS + 2


def test_more_tokens_than_may_wait_are_refused_with_the_numbers(engine: OrtEngine) -> None:
    """Those for whom there is a slot do not wait; what counts is what a request may come to in its context."""
    loop = Loop(engine, queue=100, queue_tokens=CONTEXT + 50)
    for i in range(SLOTS):
        assert loop.submit(FRONT, Generate(f"slot {i}", prompt(3), max_tokens=10_000)) is None
    assert loop.submit(FRONT, Generate("a", prompt(3), max_tokens=10_000)) is None
    assert loop.submit(FRONT, Generate("b", prompt(10), max_tokens=40)) is None
    refused = loop.submit(FRONT, Generate("c", prompt(10), max_tokens=30))
    assert isinstance(refused, Refused)
    assert refused.reason == "queue full"
    total = (SLOTS + 1) * CONTEXT + 50
    assert f"6 requests wait already and come to {total} tokens" in refused.message
    assert f"with the 40 of this one that is more than the {CONTEXT + 50} that may wait" in refused.message
    assert loop.waiting_tokens == total
    loop.cancel_all(FRONT)
    assert loop.waiting_tokens == 0


def test_whoever_finds_nobody_waiting_is_never_refused_for_his_tokens(engine: OrtEngine) -> None:
    loop = Loop(engine, queue=100, queue_tokens=1)
    for i in range(SLOTS):
        loop.submit(FRONT, Generate(f"slot {i}", prompt(3, i), max_tokens=50))
    while loop.slots.free:
        loop.step()
    assert loop.submit(FRONT, Generate("large", prompt(3), max_tokens=100)) is None
    assert isinstance(loop.submit(FRONT, Generate("small", prompt(1), max_tokens=1)), Refused)
    assert len(drain(loop)) == SLOTS + 1


def test_by_default_eight_times_the_slots_contexts_may_wait(loop: Loop) -> None:
    assert loop.queue_tokens == 8 * SLOTS * CONTEXT


class Clock:
    """A time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def full(engine: OrtEngine, clock: Clock, queue_seconds: float = 0.0, total_seconds: float = 0.0) -> Loop:
    """A loop whose every slot decodes a request `r0`, `r1`, ... with these limits."""
    loop = Loop(engine, queue=100, speculation=False, clock=clock)
    for i in range(SLOTS):
        request = Generate(f"r{i}", prompt(3, i), 60 + 20 * i, queue_seconds=queue_seconds, total_seconds=total_seconds)
        loop.submit(FRONT, request)
    while len(loop.slots.decoding) < SLOTS:
        loop.step()
    return loop


def test_a_request_that_waits_too_long_for_a_slot_ends_and_the_others_wait_on(engine: OrtEngine) -> None:
    clock = Clock()
    loop = full(engine, clock)
    loop.submit(FRONT, Generate("patient", prompt(5), max_tokens=2, queue_seconds=60))
    loop.submit(FRONT, Generate("hasty", prompt(5), max_tokens=2, queue_seconds=2.5))
    clock.now += 2.4
    assert "hasty" not in [news.row.id for news in loop.step()]
    clock.now += 0.2
    (row,) = [news.row for news in loop.step() if news.row.finish is not None]
    assert (row.id, row.finish, row.tokens) == ("hasty", "timeout", [])
    assert row.message == "the request waited 2.60 s for a slot; its limit for waiting is 2.5 s (queue_seconds)"
    assert (loop.counters.timeouts, loop.waiting) == (1, 1)
    assert loop.counters.queue_seconds == pytest.approx(2.6)
    assert len(tokens(drain(loop)["patient"])) == 2
    assert loop.counters.queue_seconds == pytest.approx(5.2)


def test_a_request_with_a_slot_has_done_with_waiting(engine: OrtEngine) -> None:
    clock = Clock()
    loop = full(engine, clock, queue_seconds=1.0)
    clock.now += 100
    assert [rows[-1].finish for rows in drain(loop).values()] == ["length"] * SLOTS
    assert (loop.counters.timeouts, loop.counters.queue_seconds) == (0, 0)


def test_a_request_whose_time_is_up_ends_where_it_stands_and_frees_its_slot(engine: OrtEngine) -> None:
    """While it waits, in the middle of its prompt, and while it decodes; what it had until then was sent."""
    clock = Clock()
    loop = full(engine, clock, total_seconds=30.0)
    clock.now += 20
    loop.submit(FRONT, Generate("waiting", prompt(5), max_tokens=2, total_seconds=10.0))
    loop.submit(FRONT, Generate("prefilling", prompt(CONTEXT - 5), max_tokens=2, priority=-1, total_seconds=11.0))
    loop.cancel(FRONT, "r0")
    loop.step()
    assert loop.slots.prefilling is not None
    clock.now += 11
    ended = {news.row.id: news.row for news in loop.step()}
    assert {row.finish for row in ended.values()} == {"timeout"}
    assert set(ended) == {"waiting", "prefilling", "r1", "r2", "r3"}
    limit = "its limit for everything is"
    assert ended["waiting"].message == f"the request waited 11.00 s for a slot; {limit} 10 s (total_seconds)"
    assert ended["r1"].message == f"the request took 31.00 s, 0.00 s of them waiting for a slot; {limit} 30 s (total_seconds)"
    assert loop.counters.timeouts == 5
    assert not loop.busy
    assert loop.slots.free == SLOTS


def test_nothing_is_ended_twice(engine: OrtEngine) -> None:
    """A request that was cancelled, or had all its tokens, has nothing to run out of."""
    clock = Clock()
    loop = full(engine, clock, total_seconds=30.0)
    loop.submit(FRONT, Generate("waiting", prompt(5), max_tokens=2, queue_seconds=10.0))
    loop.cancel(FRONT, "waiting")
    loop.cancel(FRONT, "r0")
    drain(loop)
    clock.now += 100
    assert loop.step() == []
    assert loop.counters.timeouts == 0


def test_the_next_slot_goes_by_priority_and_then_to_the_client_that_had_less(engine: OrtEngine) -> None:
    loop = full(engine, Clock())
    for i, (client, priority) in enumerate([("a", 0), ("a", 0), ("b", 0), ("a", -1), ("c", 1), ("b", 0)]):
        loop.submit(FRONT, Generate(f"{client}{i}", prompt(4, i), max_tokens=5, client=client, priority=priority))
    for i in range(1, SLOTS):  # one slot for all of them
        loop.submit(FRONT, Generate(f"held {i}", prompt(3, i), max_tokens=CONTEXT, priority=-2))
    rows = drain(loop)
    started = [name for name, its in rows.items() if its[-1].finish == "length" and name[0] in "abc"]
    assert started == ["a3", "a0", "b2", "a1", "b5", "c4"]


def test_the_mean_batch_can_be_told_from_the_counters(loop: Loop) -> None:
    run(loop, Generate("a", prompt(3), max_tokens=5), Generate("b", prompt(4), max_tokens=5))
    assert loop.counters.rows == 8
    assert 4 <= loop.counters.decode_steps <= 8
    assert loop.counters.steps == 2 + loop.counters.decode_steps


def test_waiting_steps_and_batches_are_counted_by_their_size(engine: OrtEngine) -> None:
    clock = Clock()
    loop = full(engine, clock)
    loop.submit(FRONT, Generate("waits", prompt(3), max_tokens=2))
    loop.submit(FRONT, Generate("gives up", prompt(3), max_tokens=2, queue_seconds=0.7))
    clock.now += 0.8
    loop.step()
    clock.now += 100
    drain(loop)
    counters = loop.counters
    assert counters.queue_counts == [SLOTS, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]  # at once, 0.8 s, 100.8 s
    assert sum(counters.step_counts) == counters.steps
    assert sum(counters.batch_counts) == counters.decode_steps
    assert counters.batch_counts[2] > 0
    assert sum(counters.batch_counts[3:]) == 0


def test_only_requests_that_came_to_their_end_count_as_finished(loop: Loop) -> None:
    run(loop, Generate("a", prompt(3), max_tokens=5), Generate("b", prompt(4), max_tokens=1))
    loop.submit(FRONT, Generate("c", prompt(3), max_tokens=5))
    loop.cancel(FRONT, "c")
    first = tokens(run(loop, Generate("d", prompt(5), max_tokens=1))["d"])
    assert run(loop, Generate("e", prompt(5), max_tokens=9, stop_ids=first))["e"][-1].finish == "stop"
    assert loop.counters.finished == 4


def test_the_same_id_twice_is_refused(loop: Loop) -> None:
    loop.submit(FRONT, Generate("a", prompt(3), max_tokens=2))
    again = loop.submit(FRONT, Generate("a", prompt(3), max_tokens=2))
    assert isinstance(again, Refused)
    assert again.reason == "bad request"
    drain(loop)


def test_an_engine_that_fails_ends_only_the_requests_of_that_step(engine: OrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(engine, queue=8)
    loop.submit(FRONT, Generate("a", prompt(3), max_tokens=9))
    loop.step()
    real = OrtEngine.step

    def failing(self: OrtEngine, batch: Batch, ahead: Draw | None) -> object:
        raise EngineError("the device is gone")

    monkeypatch.setattr(OrtEngine, "step", failing)
    rows = drain(loop)["a"]
    assert rows[-1].finish == "error"
    assert "the device is gone" in rows[-1].message
    monkeypatch.setattr(OrtEngine, "step", real)
    assert len(tokens(run(loop, Generate("b", prompt(3), max_tokens=4))["b"])) == 4


def test_the_slots_begin_with_garbage_and_it_does_not_matter(tiny_bundle: Path, loop: Loop) -> None:
    expected = tokens(run(loop, Generate("a", prompt(12), max_tokens=10))["a"])
    dirty = ort.load(tiny_bundle, "cpu-fp32", slots=SLOTS, context=CONTEXT, threads=1)
    for buffer in dirty._kv.values():
        buffer.fill(float("nan"))
    assert tokens(run(Loop(dirty, queue=8), Generate("a", prompt(12), max_tokens=10))["a"]) == expected


def test_more_slots_than_memory_are_refused_with_the_arithmetic(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"10000000 x 512 x .* bytes.*fewer slots"):
        ort.load(tiny_bundle, "cpu-fp32", slots=10_000_000, context=512)


def test_a_context_over_the_models_own_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match="512 positions"):
        ort.load(tiny_bundle, "cpu-fp32", slots=1, context=513)
