"""Histograms as plain counts: observations up to each bound, and one more count for those above every bound.

A count's observations lie above the bound before it and not above its own, as a Prometheus bucket's do before they are
accumulated.
"""

from bisect import bisect_left
from collections.abc import Sequence

QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Bounds of the time that a request waits for a slot."""
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Bounds of the time that an engine takes for a step."""
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Bounds of the rows of a decode step."""


def empty(bounds: Sequence[float]) -> list[int]:
    """Counts for `bounds` of no observations."""
    return [0] * (len(bounds) + 1)


def observe(counts: list[int], bounds: Sequence[float], value: float) -> None:
    """Count `value` where it belongs among the ascending `bounds`."""
    counts[bisect_left(bounds, value)] += 1
