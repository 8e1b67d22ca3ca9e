"""Histograms as plain counts: how often a number fell between which bounds. What a heartbeat carries, and Prometheus shows."""

from bisect import bisect_left
from collections.abc import Sequence

QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60)
"""Bounds of the time that a request waited for a slot."""
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)
"""Bounds of the time that a step took."""
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Bounds of the rows of a decode step."""


def empty(bounds: Sequence[float]) -> list[int]:
    """A count for each of `bounds`, of what is at most that and more than the one before, and one for what is above all."""
    return [0] * (len(bounds) + 1)


def observe(counts: list[int], bounds: Sequence[float], value: float) -> None:
    """Count `value`."""
    counts[bisect_left(bounds, value)] += 1
