"""The index of what stands in the slots, against looking at every slot."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.radix import Radix

SLOTS = 5
tokens = st.lists(st.integers(0, 2), max_size=12)


def common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), tokens), max_size=30), tokens)
def test_it_finds_what_a_scan_of_all_slots_finds(changes: list[tuple[int, list[int]]], prompt: list[int]) -> None:
    """Of few different tokens, so that runs are shared, split and dropped all the time."""
    radix, held = Radix(), dict[int, list[int]]()
    for slot, run in changes:
        radix.hold(slot, np.array(run, np.int64))
        held[slot] = run
        best = max((common(run, prompt) for run in held.values()), default=0)
        length, slots = radix.longest(np.array(prompt, np.int64))
        assert length == best
        assert slots == ({slot for slot, run in held.items() if common(run, prompt) == best} if best else set())


def test_it_keeps_nothing_of_what_is_gone() -> None:
    radix = Radix()
    for length in (3, 8, 5):
        radix.hold(0, np.arange(length))
        radix.hold(1, np.arange(100, 100 + length))
    radix.hold(0, np.arange(0))
    radix.hold(1, np.arange(0))
    assert radix.longest(np.arange(8)) == (0, set())
    assert not radix._root.children
