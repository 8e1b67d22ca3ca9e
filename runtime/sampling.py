"""How a step's tokens are drawn: what each row's request says, and the random numbers.

These come from a counter-based generator, so that a draw depends on its seed and place alone.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

import numpy as np

from runtime.engine import Draw, Int32
from runtime.messages import Sampling
from runtime.penalties import Changes, together
from runtime.sequence import Sequence

_MASK = 2**64 - 1
_FORCED = Sampling()
UNKNOWN = -1
"""Stands for a token that nobody knows yet, among the guesses of a row whose draw does not depend on it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is drawn: after a sequence's own tokens and the `guesses` that are taken to follow them."""

    sequence: Sequence
    guesses: Tokens[int] = ()
    forced: int = -1
    """The token that is scored instead of one being drawn; negative for none. Nothing of the request applies to it."""


def draw(places: list[Place], *, tell: bool = True) -> Draw:
    """How the tokens at `places`, a row each, are chosen; and, where that is to `tell`, how many alternatives are told.

    The masks of their sequences must be ready; guesses of a sequence with a grammar are tokens that it forces.
    """
    made, masks = _unmasked(places, tell), _masks(places)
    return made if masks is None else replace(made, mask=masks)


def _unmasked(places: list[Place], tell: bool) -> Draw:
    free = [place.sequence if place.forced < 0 else None for place in places]
    alternatives = max((place.sequence.request.top_logprobs for place in places), default=0) if tell else 0
    penalties = any(sequence is not None and sequence.penalties is not None for sequence in free)
    hot = any(sequence is not None and sequence.request.sampling.temperature > 0 for sequence in free)
    if not (hot or penalties or alternatives) and None not in free:
        return Draw.greedy(len(places))
    settings = [_FORCED if sequence is None else sequence.request.sampling for sequence in free]
    return Draw(
        temperature=np.array([s.temperature for s in settings], np.float32),
        top_k=np.array([s.top_k for s in settings], np.int64),
        top_p=np.array([s.top_p for s in settings], np.float32),
        min_p=np.array([s.min_p for s in settings], np.float32),
        uniform=np.array([_uniform(place) for place in places], np.float32),
        forced=np.array([place.forced for place in places], np.int64),
        adjustments=together([_changes(place) for place in places]) if penalties else None,
        alternatives=alternatives,
    )


def _uniform(place: Place) -> float:
    sequence = place.sequence
    return uniform(sequence.request.sampling.seed, len(sequence.tokens) + len(place.guesses))


def _masks(places: list[Place]) -> Int32 | None:
    masks = [
        None if place.forced >= 0 or place.sequence.matcher is None else place.sequence.matcher.mask(len(place.guesses))
        for place in places
    ]
    first = next((mask for mask in masks if mask is not None), None)
    if first is None:
        return None
    everything = np.full_like(first, -1)
    return np.stack([everything if mask is None else mask for mask in masks])


def _changes(place: Place) -> Changes | None:
    penalties = place.sequence.penalties
    return None if penalties is None or place.forced >= 0 else penalties.after(place.guesses)


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
