"""What is guessed, and when."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.speculation import MOST_GUESSES, Lookup, worthwhile

TEXT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_it_expects_what_followed_the_last_tokens_before() -> None:
    lookup = Lookup([*TEXT, 99, 11, 12])
    assert lookup.guess(5) == TEXT[2:7]


def test_the_longer_run_of_last_tokens_decides() -> None:
    """Both 1 2 3 5 and, later, 9 3 6 stood there; after 1 2 3 the longer one is meant."""
    lookup = Lookup([1, 2, 3, 5, 8, 9, 3, 6, 7, 1, 2, 3])
    assert lookup.guess(1) == [5]


def test_it_expects_nothing_where_the_last_tokens_are_new() -> None:
    lookup = Lookup([*TEXT, 1, 2])
    assert lookup.guess(5) == []
    assert lookup.confidence == 0


def test_what_repeats_itself_is_expected_to_go_on() -> None:
    lookup = Lookup([5, 6, 7] * 3)
    assert lookup.guess(8) == [5, 6, 7, 5, 6, 7, 5, 6]


def test_copying_makes_it_confident_and_departing_makes_it_doubt() -> None:
    lookup = Lookup([*TEXT, 99, *TEXT[:2]])
    rising = [lookup.confidence]
    for token in TEXT[2:8]:
        lookup.extend([token])
        rising.append(lookup.confidence)
    assert rising == sorted(rising)
    assert rising[-1] > 0.7 > 0.5 > rising[0]
    lookup.extend([77])
    assert lookup.guess(3) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 3), max_size=40), st.integers(1, 20))
def test_reading_in_pieces_is_reading_at_once(prompt: list[int], answer: list[int], most: int) -> None:
    pieces, whole = Lookup(prompt), Lookup(prompt)
    for token in answer:
        pieces.extend([token])
    whole.extend(answer)
    assert pieces.guess(most) == whole.guess(most)
    assert pieces.confidence == whole.confidence
    assert len(pieces.guess(most)) in (0, most)
    assert 0 <= pieces.confidence < 1


def brute(confidence: float, cost: float, most: int) -> tuple[int, float]:
    gains = [sum(confidence**i for i in range(k + 1)) / (1 + k * cost) for k in range(most + 1)]
    return max(enumerate(gains), key=lambda pair: pair[1])


@pytest.mark.parametrize(
    ("confidence", "cost"), itertools.product((0.0, 0.2, 0.5, 0.8, 0.95, 0.999), (0.01, 0.06, 0.2, 0.6, 1.0))
)
def test_the_plan_is_the_best_of_all(confidence: float, cost: float) -> None:
    plan, (count, gain) = worthwhile(confidence, cost, 100), brute(confidence, cost, MOST_GUESSES)
    if gain > 1.1:
        assert plan.count == count
        assert plan.gain == pytest.approx(gain)
    else:
        assert (plan.count, plan.gain) == (0, 1.0)


def test_what_company_makes_cheap_is_guessed_less() -> None:
    """A token that shares its step with 31 others costs little; verifying guesses alone has to beat that."""
    alone, beside = worthwhile(0.9, 0.13, 15), worthwhile(0.9, 0.13, 15, plain=(1 + 0.13 * 7) / 8)
    assert alone.gain > 2 > 1.1 > worthwhile(0.9, 0.13, 15, plain=(1 + 0.13 * 31) / 32).gain
    assert beside.count == 0 or beside.gain < alone.gain


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    assert worthwhile(0.99, 0.05, 3).count == 3
    assert worthwhile(0.99, 0.05, 0).count == 0
    assert worthwhile(0.99, 0.05, -1).count == 0
