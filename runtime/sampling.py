"""The random numbers of sampling: a counter-based generator, so that a draw depends on its seed and place alone."""

import numpy as np

from runtime.engine import Draw
from runtime.sequence import Sequence

_MASK = 2**64 - 1


def draw(rows: list[tuple[Sequence, int]]) -> Draw:
    """How the tokens of `rows` are chosen: for each the sequence, and how many tokens after its next one this one is."""
    if all(sequence.request.sampling.temperature <= 0 for sequence, _ in rows):
        return Draw.greedy(len(rows))
    settings = [sequence.request.sampling for sequence, _ in rows]
    return Draw(
        temperature=np.array([s.temperature for s in settings], np.float32),
        top_k=np.array([s.top_k for s in settings], np.int64),
        top_p=np.array([s.top_p for s in settings], np.float32),
        min_p=np.array([s.min_p for s in settings], np.float32),
        uniform=np.array(
            [uniform(s.request.sampling.seed, len(s.tokens) + later) for s, later in rows],
            np.float32,
        ),
        forced=np.full(len(rows), -1, np.int64),
    )


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) on a 24-bit grid for the `index`-th token of a request with `seed`.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) at the state that
    `index` steps from the mixed seed would have reached. 24 bits, because the graph compares in float32.
    """
    return (_mix(_mix(seed) + index * 0x9E3779B97F4A7C15) >> 40) / 2**24


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
