"""The engine on a GPU: the tokens that the CPU gives, whatever is padded, recorded, begun ahead and dropped."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from runtime.engine import MOST_ALTERNATIVES, Adjustments, Batch, DeviceLost, Draw, Engine, EngineError, Int32
from runtime.gpu import GpuEngine
from runtime.ort import OrtEngine
from tests import tiny
from tests.unit.gpu.conftest import CHUNK, CONTEXT, SLOTS, Load
from tests.unit.gpu.device import HostDevice

Greedy = Callable[[list[int], int], list[int]]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}/{length}/{i}").randrange(3, tiny.VOCAB) for i in range(length)]


def prefill(engine: Engine, slot: int, tokens: list[int], chunks: list[int] | None = None) -> int:
    """Write `tokens` to `slot` in chunks of these sizes, all that fits if none are given; the next token."""
    done, sizes = 0, list(chunks or [])
    while done < len(tokens):
        end = min(len(tokens), done + (sizes.pop(0) if sizes else CHUNK))
        rows = [end - done - 1] if end == len(tokens) else []
        got, _ = engine.step(chunk(slot, tokens[done:end], end, rows))
        assert len(got) == len(rows)
        done = end
    return int(got[0])


def chunk(slot: int, tokens: list[int], end: int, rows: list[int], draw: Draw | None = None) -> Batch:
    return Batch(slot, np.array([tokens]), np.array([end], np.int32), np.array(rows, np.int64), draw or Draw.greedy(len(rows)))


def decode(tokens: list[int], lengths: list[int], draw: Draw | None = None, rows: list[int] | None = None) -> Batch:
    rows = list(range(len(tokens))) if rows is None else rows
    return Batch(
        0, np.array(tokens)[:, None], np.array(lengths, np.int32), np.array(rows, np.int64), draw or Draw.greedy(len(rows))
    )


def sampled(temperatures: list[float], seed: int) -> Draw:
    """Draws with all cuts, which differ from row to row."""
    rows, numbers = len(temperatures), np.random.default_rng(seed)
    return Draw(
        np.array(temperatures, np.float32),
        numbers.integers(0, 40, rows),
        numbers.uniform(0.5, 1, rows).astype(np.float32),
        numbers.uniform(0, 0.1, rows).astype(np.float32),
        numbers.uniform(0, 1, rows).astype(np.float32),
        np.full(rows, -1),
    )


def answers(engine: Engine, prompts: list[list[int]], count: int, *, ahead: bool) -> list[list[int]]:
    """Each prompt's next `count` tokens, prefilled one after the other and decoded together."""
    last = [prefill(engine, slot, tokens) for slot, tokens in enumerate(prompts)]
    lengths, out = [len(tokens) for tokens in prompts], [[token] for token in last]
    for step in range(count - 1):
        lengths = [length + 1 for length in lengths]
        more = Draw.greedy(len(prompts)) if ahead and step < count - 2 else None
        tokens, _ = engine.step(decode([answer[-1] for answer in out], lengths), more)
        for answer, token in zip(out, tokens.tolist(), strict=True):
            answer.append(token)
    return out


@pytest.mark.parametrize("ahead", [False, True])
def test_ragged_prompts_get_transformers_tokens(load: Load, greedy: Greedy, ahead: bool) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 2, 7, CHUNK, CHUNK + 1)]
    assert answers(load(), prompts, 12, ahead=ahead) == [greedy(tokens, 12) for tokens in prompts]


def test_a_prompt_may_come_in_any_chunks(load: Load, greedy: Greedy) -> None:
    engine, tokens = load(), prompt(37)
    for sizes in ([1, 1, 35 - 13, 13], [5, 24, 1, 7], [24, 12, 1]):
        assert prefill(engine, 2, tokens, sizes) == greedy(tokens, 1)[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_slot_is_served_to_its_last_token(load: Load, greedy: Greedy, ahead: bool) -> None:
    tokens = prompt(CONTEXT - 9)
    (answer,) = answers(load(), [tokens], 10, ahead=ahead)
    assert answer == greedy(tokens, 10)
    engine = load()
    lengths = [CONTEXT, CONTEXT - 1]
    for slot, length in enumerate(lengths):
        prefill(engine, slot, prompt(length - 1, seed=slot))
    with_it, _ = engine.step(decode([5, 6], lengths), Draw.greedy(2) if ahead else None)
    assert engine.step(decode([5, 6], lengths))[0].tolist() == with_it.tolist()


def test_rows_that_fill_a_batch_up_leave_other_slots_alone(load: Load) -> None:
    """Full slots beside a batch that is padded over them, each read before and after, to the last bit."""
    engine = load()
    beside = {slot: prompt(CONTEXT, seed=slot) for slot in range(3, SLOTS)}
    for slot, tokens in beside.items():
        prefill(engine, slot, tokens)

    def read() -> list[list[float]]:
        rows = [engine.step(chunk(slot, tokens[-1:], CONTEXT, [0])) for slot, tokens in beside.items()]
        return [[float(tokens[0]), float(logprobs[0])] for tokens, logprobs in rows]

    before = read()
    answers(engine, [prompt(5), prompt(6), prompt(9)], 8, ahead=True)
    assert read() == before


def test_every_batch_size_comes_from_a_recording(load: Load, greedy: Greedy) -> None:
    engine = load()
    prompts = [prompt(4 + slot, seed=slot) for slot in range(SLOTS)]
    for count in range(1, SLOTS + 1):
        for _ in range(2):  # the second time without anything new to record
            assert answers(engine, prompts[:count], 4, ahead=False) == [greedy(tokens, 4) for tokens in prompts[:count]]


def test_each_row_that_is_asked_for_gets_its_token(load: Load, greedy: Greedy) -> None:
    engine, tokens = load(), prompt(10)
    prefill(engine, 1, tokens)
    right = greedy(tokens, 6)
    guesses = [right[0], right[1], 7, right[3]]
    got, _ = engine.step(chunk(1, guesses, len(tokens) + len(guesses), [0, 1, 2, 3]))
    assert got[:2].tolist() == right[1:3]
    got, _ = engine.step(decode([3, right[0]], [1, len(tokens) + 1], rows=[1]))
    assert got.tolist() == right[1:2]


def test_forced_tokens_are_scored_as_the_cpu_scores_them(load: Load, reference: OrtEngine) -> None:
    tokens, targets = prompt(9), prompt(9, seed=1)
    batch = chunk(0, tokens, 9, list(range(9)), Draw.force(np.array([*targets[:8], -1])))
    got, logprobs = load().step(batch)
    expected, right = reference.step(batch)
    assert got.tolist() == expected.tolist() == [*targets[:8], expected[8]]
    assert np.allclose(logprobs, right, atol=1e-4)


def test_sampled_and_greedy_rows_mix(load: Load, reference: OrtEngine) -> None:
    engine, lengths = load(), [3, 8, 5]
    last = [prefill(engine, slot, prompt(length, seed=slot)) for slot, length in enumerate(lengths)]
    assert last == [prefill(reference, slot, prompt(length, seed=slot)) for slot, length in enumerate(lengths)]
    for step in range(6):
        lengths = [length + 1 for length in lengths]
        draw = sampled([0.8, 0.0, 1.3] if step % 3 else [0.0, 0.0, 0.0], seed=step)
        batch = decode(last, lengths, draw)
        tokens, logprobs = engine.step(batch, sampled([0.8, 0.0, 1.3], seed=step + 1))
        expected, right = reference.step(batch)
        assert tokens.tolist() == expected.tolist()
        assert np.allclose(logprobs, right, atol=1e-4)
        last = tokens.tolist()


def adorned(temperatures: list[float], seed: int, *, masked: bool = True, adjusted: int = 9, told: int = 4) -> Draw:
    """`sampled`, under masks of few tokens, with so many adjusted logits a row and as many alternatives as are told."""
    rows, numbers = len(temperatures), np.random.default_rng(seed)
    allowed = np.zeros((rows, tiny.VOCAB), bool)
    for row in allowed:
        row[numbers.choice(tiny.VOCAB, numbers.integers(1, 40), replace=False)] = True
    mask = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    shape = rows, adjusted
    adjustments = Adjustments(
        numbers.permuted(np.tile(np.arange(tiny.VOCAB), (rows, 1)), axis=1)[:, :adjusted],
        numbers.normal(0, 3, shape).astype(np.float32),
        numbers.uniform(0.5, 2, shape).astype(np.float32),
        numbers.normal(0, 2, shape).astype(np.float32),
    )
    return replace(
        sampled(temperatures, seed),
        mask=mask if masked else None,
        adjustments=adjustments if adjusted else None,
        alternatives=told,
    )


WISHES: list[dict[str, Any]] = [
    {},
    {"adjusted": 300},
    {"masked": False, "told": 0},
    {"adjusted": 0, "told": 0},
    {"masked": False, "adjusted": 0, "told": MOST_ALTERNATIVES},
    {"masked": False, "adjusted": 0, "told": 0},
    {"adjusted": 17, "told": 0},
    {"told": 1},
]


def test_masks_adjustments_and_alternatives_are_the_cpus(load: Load, reference: OrtEngine) -> None:
    """In steps that differ in what they want, some of which were recorded and some begun ahead."""
    engine, lengths = load(), [3, 8, 5]
    last = [prefill(one, slot, prompt(length, seed=slot)) for slot, length in enumerate(lengths) for one in (engine, reference)]
    last = last[::2]
    wishes = [wish for wish in WISHES for _ in range(3)]
    for step, wish in enumerate(wishes):
        lengths = [length + 1 for length in lengths]
        heat = [0.8, 0.0, 1.3] if step % 3 else [0.0, 0.0, 0.0]
        batch, following = decode(last, lengths, adorned(heat, step, **wish)), wishes[(step + 1) % len(wishes)]
        ahead = adorned([0.8, 0.0, 1.3] if (step + 1) % 3 else [0.0, 0.0, 0.0], step + 1, **following)
        tokens, logprobs = engine.step(batch, ahead if step % 2 else None)
        expected, right = reference.step(batch)
        assert tokens.tolist() == expected.tolist()
        assert np.allclose(logprobs, right, atol=1e-4)
        if batch.draw.alternatives:
            (told, shares), (likeliest, most) = engine.alternatives(), reference.alternatives()
            assert told.tolist() == likeliest.tolist()
            assert np.allclose(shares, most, atol=1e-4)
            assert told.shape == (3, wish.get("told", 4))
        last = tokens.tolist()


def test_a_mask_is_asked_for_once_the_models_work_is_under_way(load: Load, reference: OrtEngine) -> None:
    device = HostDevice()
    engine = load(device=device)
    for one in (engine, reference):
        prefill(one, 0, prompt(4))
    given = adorned([0.0], seed=3)
    asked_for: list[int] = []
    before = device.asked

    def late() -> Int32:
        asked_for.append(device.asked - before)
        assert isinstance(given.mask, np.ndarray)
        return given.mask

    tokens, _ = engine.step(decode([5], [5], replace(given, mask=late)))
    assert tokens.tolist() == reference.step(decode([5], [5], given))[0].tolist()
    assert len(asked_for) == 1
    assert asked_for[0] >= 2  # the inputs' way up, and the model


def test_a_step_that_wants_nothing_of_it_moves_no_masks_and_tells_no_alternatives(load: Load) -> None:
    device = HostDevice()
    engine = load(device=device)
    prefill(engine, 0, prompt(4))

    def pieces(draw: Draw) -> int:
        engine.step(decode([5], [5], draw))
        before = device.asked
        engine.step(decode([5], [5], draw))
        return device.asked - before

    assert pieces(Draw.greedy(1)) == 3  # inputs up, the step, tokens down
    assert pieces(sampled([1.0], 1)) == 4
    assert pieces(adorned([1.0], 1)) == 4 + 5 + 1  # the mask and four arrays up, alternatives down


def test_a_scored_chunk_tells_alternatives(load: Load, reference: OrtEngine) -> None:
    tokens, targets = prompt(9), prompt(9, seed=1)
    forced = replace(Draw.force(np.array([*targets[:8], -1])), alternatives=5)
    batch, engine = chunk(0, tokens, 9, list(range(9)), forced), load()
    got, logprobs = engine.step(batch)
    expected, right = reference.step(batch)
    assert got.tolist() == expected.tolist()
    assert np.allclose(logprobs, right, atol=1e-4)
    assert engine.alternatives()[0].tolist() == reference.alternatives()[0].tolist()


def test_what_a_step_gave_stays_when_others_follow(load: Load) -> None:
    engine = load()
    prefill(engine, 0, prompt(3))
    tokens, logprobs = engine.step(decode([4], [4]), Draw.greedy(1))
    kept = tokens.tolist(), logprobs.tolist()
    for length in range(5, 9):
        engine.step(decode([length], [length]), Draw.greedy(1))
    assert (tokens.tolist(), logprobs.tolist()) == kept


# A step ahead ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(load: Load, greedy: Greedy) -> "Pair":
    device = HostDevice()
    return Pair(load(device=device), device, greedy)


class Pair:
    """Two sequences that decode, and what is right for them."""

    def __init__(self, engine: GpuEngine, device: HostDevice, greedy: Greedy) -> None:
        self.engine, self.device = engine, device
        self.prompts = [prompt(6, seed=1), prompt(9, seed=2)]
        self.right = [greedy(tokens, 8) for tokens in self.prompts]
        for slot, tokens in enumerate(self.prompts):
            assert prefill(engine, slot, tokens) == self.right[slot][0]

    def batch(self, number: int, draw: Draw | None = None) -> Batch:
        """The step that gives the answers' token of that number."""
        lengths = [len(tokens) + number for tokens in self.prompts]
        return decode([answer[number - 1] for answer in self.right], lengths, draw)

    def check(self, number: int, ahead: Draw | None = None) -> None:
        tokens, _ = self.engine.step(self.batch(number), ahead)
        assert tokens.tolist() == [answer[number] for answer in self.right]


def test_a_step_ahead_is_on_its_way_before_it_is_asked_for(two: Pair) -> None:
    two.check(1, Draw.greedy(2))
    before = two.device.asked
    two.check(2)
    assert two.device.asked == before


def test_another_step_than_the_one_ahead_is_computed(two: Pair) -> None:
    other = prompt(7, seed=5)
    two.check(1, Draw.greedy(2))
    prefill(two.engine, 3, other)  # another slot
    two.check(2, Draw.greedy(2))
    two.check(2, Draw.greedy(2))  # the same once more
    one = decode([two.right[0][2]], [len(two.prompts[0]) + 3])  # fewer rows
    assert two.engine.step(one)[0].tolist() == [two.right[0][3]]
    two.check(3, Draw.greedy(2))
    two.check(4)


def test_a_step_ahead_that_drew_otherwise_is_dropped(two: Pair, reference: OrtEngine) -> None:
    for slot, tokens in enumerate(two.prompts):
        prefill(reference, slot, tokens)
    two.check(1, sampled([1.5, 1.5], seed=1))
    reference.step(two.batch(1))
    batch = two.batch(2, sampled([1.5, 1.5], seed=2))
    assert two.engine.step(batch)[0].tolist() == reference.step(batch)[0].tolist()


def test_another_token_than_the_one_given_is_computed(two: Pair, reference: OrtEngine) -> None:
    for slot, tokens in enumerate(two.prompts):
        prefill(reference, slot, tokens)
    two.check(1, Draw.greedy(2))
    reference.step(two.batch(1))
    lengths = [len(tokens) + 2 for tokens in two.prompts]
    batch = decode([two.right[0][1], two.right[1][1] ^ 1], lengths)
    assert two.engine.step(batch)[0].tolist() == reference.step(batch)[0].tolist()


def test_other_lengths_than_those_foreseen_are_computed(two: Pair, reference: OrtEngine) -> None:
    """As where guesses were rejected, and the same tokens stand somewhere else."""
    for slot, text in enumerate(two.prompts):
        prefill(reference, slot, text)
    two.check(1, Draw.greedy(2))
    reference.step(two.batch(1))
    batch = decode([answer[1] for answer in two.right], [4, 5])
    tokens, logprobs = two.engine.step(batch)
    expected, right = reference.step(batch)
    assert tokens.tolist() == expected.tolist()
    assert np.allclose(logprobs, right, atol=1e-4)


def test_nothing_is_begun_ahead_of_a_step_whose_rows_are_not_its_tokens(two: Pair) -> None:
    full = two.batch(1)
    some = Batch(0, full.input_ids, full.kv_lengths, np.array([1]), Draw.greedy(1))
    for batch in (some, chunk(1, [9, 8], len(two.prompts[1]) + 3, [1])):
        two.engine.step(batch, Draw.greedy(1))
        asked = two.device.asked
        two.engine.step(batch)
        assert two.device.asked > asked


def test_exchanged_slots_are_read_as_they_are_now(two: Pair) -> None:
    """Also where the step ahead looks like the one that is asked for, by lengths and tokens."""
    engine = two.engine
    two.check(1, Draw.greedy(2))
    one, other = (len(tokens) + 1 for tokens in two.prompts)
    engine.exchange((0, one), (1, other))
    swapped = decode([two.right[1][1], two.right[0][1]], [other + 1, one + 1])
    assert engine.step(swapped, Draw.greedy(2))[0].tolist() == [two.right[1][2], two.right[0][2]]
    engine.exchange((1, one + 1), (0, other + 1))
    two.check(3)


def test_exchanging_slots_drops_a_step_that_looks_the_same(load: Load, reference: OrtEngine) -> None:
    engine, length = load(), 7
    outcomes = []
    for one in (engine, reference):
        for slot in range(2):
            prefill(one, slot, prompt(length, seed=slot))
        tokens, _ = one.step(decode([5, 6], [length + 1] * 2), Draw.greedy(2))
        one.exchange((0, length + 1), (1, length + 1))
        outcomes.append(one.step(decode(tokens.tolist(), [length + 2] * 2)))
    (tokens, logprobs), (expected, right) = outcomes
    assert tokens.tolist() == expected.tolist()
    assert np.allclose(logprobs, right, atol=1e-4)


def test_a_copied_prompt_goes_on_in_its_new_slot(two: Pair, greedy: Greedy) -> None:
    engine, shared = two.engine, two.prompts[1][:5]
    two.check(1, Draw.greedy(2))
    engine.copy(1, 4, len(shared))
    longer = [*shared, *prompt(6, seed=9)]
    got, _ = engine.step(chunk(4, longer[5:], len(longer), [len(longer) - 6]))
    assert got.tolist() == greedy(longer, 1)
    two.check(2)


def test_slots_change_places_whatever_stands_in_them(load: Load, greedy: Greedy) -> None:
    engine = load()
    long, short = prompt(CONTEXT - 1, seed=1), prompt(2, seed=2)
    for slot, tokens in ((1, long), (5, short)):
        prefill(engine, slot, tokens)
    engine.exchange((1, len(long)), (5, len(short)))
    engine.exchange((1, len(short)), (0, 0))
    for slot, tokens in ((5, long), (0, short)):
        first, second = greedy(tokens, 2)
        assert engine.step(chunk(slot, [first], len(tokens) + 1, [0]))[0].tolist() == [second]


# What is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "limit"),
    [
        (decode([1] * (SLOTS + 1), [1] * (SLOTS + 1)), f"{SLOTS} there are"),
        (decode([1], [CONTEXT + 1]), f"{CONTEXT} that a slot holds"),
        (Batch(0, np.ones((2, 2), np.int64), np.array([2, 2], np.int32), np.zeros(0, np.int64), Draw.greedy(0)), "split it"),
        (chunk(0, [1] * 600, 600, []), "split it"),
        (chunk(0, [1] * 2, 2, [0] * 70), "logit rows"),
    ],
)
def test_a_step_that_is_too_large_is_refused_by_its_limit(load: Load, batch: Batch, limit: str) -> None:
    with pytest.raises(EngineError, match=limit):
        load().step(batch)


def test_slots_that_do_not_fit_are_refused_with_the_sum(load: Load) -> None:
    with pytest.raises(EngineError, match=r"6 slots of 64 tokens of 512 bytes needs 0 MiB.*fewer slots"):
        load(device=HostDevice(limit=100_000))


def test_a_failure_of_the_gpu_is_told_by_the_step_that_waits_for_it(load: Load) -> None:
    engine = load(device=(device := HostDevice()))
    prefill(engine, 0, prompt(4))
    device.fails = True
    with pytest.raises(DeviceLost):
        engine.step(decode([1], [5]))


def test_closing_gives_the_device_back(load: Load) -> None:
    engine = load(device=(device := HostDevice()))
    prefill(engine, 0, prompt(4))
    engine.step(decode([1], [5]), Draw.greedy(1))
    engine.close()
    assert device.closed
