"""Histograms: every observation is counted once, in its place."""

import pytest

from runtime import tally

BOUNDS = (1, 2, 5)


@pytest.mark.parametrize(("value", "place"), [(0, 0), (1, 0), (1.001, 1), (2, 1), (5, 2), (5.1, 3), (1e9, 3)])
def test_an_observation_counts_for_the_least_bound_that_it_does_not_exceed(value: float, place: int) -> None:
    counts = tally.empty(BOUNDS)
    tally.observe(counts, BOUNDS, value)
    assert counts == [int(i == place) for i in range(4)]


@pytest.mark.parametrize("bounds", [tally.QUEUE_SECONDS, tally.STEP_SECONDS, tally.BATCH_ROWS])
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
