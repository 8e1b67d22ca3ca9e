"""What Python does around a step, for each row of it: how long (`make microbench`), and how many bytecode instructions.

Instructions are the same on every machine and in every run, so their number can be held to a limit; C code called from them
(NumPy, msgspec, tokenizers) does not count, and a loop that moves from C into Python shows. The limits leave a third of room
over what was counted.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from runtime import messages
from runtime.engine import Batch, Draw, Float32, Int64
from runtime.loop import Loop
from runtime.messages import Generate, Progress, Row, Sampling
from runtime.radix import Radix
from runtime.sampling import uniform
from runtime.speculation import Lookup, worthwhile

ROWS = 32
VOCAB = 50_000


class Instant:
    """Stands in for the engine, whose time is not what is measured: any tokens, at once."""

    slots = ROWS
    context = 4096
    vocab_size = VOCAB
    many_cost = 0.0
    row_cost = 0.2
    step_cost = 1.0
    chunk = 128
    rows = 64
    runs_ahead = False
    length_boundaries: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._chance = np.random.default_rng(0)

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        rows = len(batch.logit_rows)
        return self._chance.integers(0, VOCAB, rows), np.full(rows, -1, np.float32)

    def alternatives(self) -> tuple[Int64, Float32]:
        return np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)

    def copy(self, source: int, target: int, length: int) -> None:
        pass

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        pass

    def close(self) -> None:
        pass


def full_loop(sampling: Sampling) -> Loop:
    """A loop whose every slot decodes."""
    loop, chance = Loop(Instant(), queue=ROWS), np.random.default_rng(1)
    for i in range(ROWS):
        prompt = chance.integers(0, VOCAB, 64).tolist()
        loop.submit(b"front", Generate(str(i), prompt, max_tokens=4000, sampling=sampling))
    while len(loop.slots.decoding) < ROWS:
        loop.step()
    return loop


def iteration(loop: Loop) -> bytes:
    """What a worker does for each new token of every row."""
    return messages.encode(Progress([news.row for news in loop.step()]))


def instructions(call: Callable[[], object]) -> int:
    """Bytecode instructions that `call` runs, in whatever Python functions."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def measure(benchmark: BenchmarkFixture, call: Callable[[], object], limit: int, per: int = 1) -> None:
    """Time `call`, and hold the instructions for each of the `per` things that it does to `limit`."""
    benchmark(call)
    assert instructions(call) / per <= limit


@pytest.mark.parametrize(("temperature", "limit"), [(0.0, 800), (0.8, 970)])
def test_an_iteration_of_the_loop_for_each_row(benchmark: BenchmarkFixture, temperature: float, limit: int) -> None:
    loop = full_loop(Sampling(temperature=temperature, top_p=0.9, seed=3))
    measure(benchmark, lambda: iteration(loop), limit, per=ROWS)


def test_an_iteration_does_not_grow_with_what_was_said_before() -> None:
    loop = full_loop(Sampling())
    first = instructions(lambda: iteration(loop))
    for _ in range(300):
        loop.step()
    assert instructions(lambda: iteration(loop)) <= 1.1 * first


def test_an_iteration_does_not_grow_with_who_waits_and_for_how_long() -> None:
    loop = full_loop(Sampling())
    first = instructions(lambda: iteration(loop))
    loop.queue = 1000
    for i in range(1000):
        request = Generate(
            f"w{i}", [5] * 9, max_tokens=9, client=f"c{i % 50}", priority=i % 3, queue_seconds=3600, total_seconds=7200
        )
        assert loop.submit(b"front", request) is None
    assert instructions(lambda: iteration(loop)) <= 1.01 * first


def test_the_random_number_of_a_token(benchmark: BenchmarkFixture) -> None:
    measure(benchmark, lambda: uniform(2**62 + 1, 77), 115)


def test_taking_note_of_a_token_for_the_guesses(benchmark: BenchmarkFixture) -> None:
    lookup = Lookup(list(range(1000)))
    measure(benchmark, lambda: lookup.extend([5]), 270)


def test_deciding_how_much_to_guess(benchmark: BenchmarkFixture) -> None:
    measure(benchmark, lambda: worthwhile(0.9, 0.2, 15), 370)


def test_finding_a_prompt_among_the_slots_does_not_grow_with_their_number(benchmark: BenchmarkFixture) -> None:
    """32 conversations that begin with the same 500 tokens, looked up by a prompt of 1,000."""
    radix, shared = Radix(), np.arange(500)
    for slot in range(ROWS):
        radix.hold(slot, np.concatenate([shared, np.full(500, 1000 + slot)]))
    prompt = np.concatenate([shared, np.full(500, 1007)])
    measure(benchmark, lambda: radix.longest(prompt), 415)
    assert radix.longest(prompt) == (1000, {7})


def test_a_message_with_a_row_for_everyone(benchmark: BenchmarkFixture) -> None:
    progress = Progress([Row(f"1234-{i}", [100 + i], [-0.5]) for i in range(ROWS)])
    frame = messages.encode(progress)
    measure(benchmark, lambda: messages.decode_reply(messages.encode(progress)), 20)
    assert len(frame) < 40 * ROWS
