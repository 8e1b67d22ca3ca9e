"""What the bench asks of a server, and when."""

import random
from itertools import pairwise
from statistics import mean, median, pstdev

import pytest

from bench.load import MOST_REQUESTS, Lengths, Load, LoadError, Request, Shape, arrivals

SHAPE = Shape(Lengths(20, 40), Lengths(8, 8))


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def test_arrivals_come_at_their_rate_and_in_order() -> None:
    times = arrivals(5.0, 20_000, random.Random(1))
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= 4000
    assert mean(gaps(times)) == pytest.approx(0.2, rel=0.02)


def test_the_times_between_arrivals_are_exponential() -> None:
    between = gaps(arrivals(5.0, 20_000, random.Random(1)))
    assert pstdev(between) == pytest.approx(mean(between), rel=0.05)
    assert median(between) == pytest.approx(0.2 * 0.6931, rel=0.05)
    assert sum(gap > 0.4 for gap in between) / len(between) == pytest.approx(0.1353, rel=0.1)


def test_a_seed_asks_the_same_again_and_another_asks_otherwise() -> None:
    for load in (Load(SHAPE, 3, streams=4), Load(SHAPE, 12, rate=2.0)):
        assert load.plan(7, 0) == load.plan(7, 0)
        assert load.plan(7, 0) != load.plan(8, 0)
        assert load.plan(7, 0) != load.plan(7, 1)


def test_what_a_seed_asks_does_not_change_between_processes() -> None:
    # Literal values, so that a plan which depends on the hashing of strings, new in each process, is found out.
    assert Load(Shape(Lengths(4, 4), Lengths(2, 2)), 1, streams=1).plan(0, 0) == [[Request([141, 941, 197, 472], 2)]]


def test_a_closed_loop_is_so_many_requests_a_stream_without_times() -> None:
    plan = Load(SHAPE, 3, streams=4).plan(0, 0)
    assert [len(sequence) for sequence in plan] == [3] * 4
    assert {request.due for sequence in plan for request in sequence} == {None}


def test_an_open_loop_is_one_request_at_each_arrival() -> None:
    plan = Load(SHAPE, 12, rate=2.0).plan(0, 0)
    assert [len(sequence) for sequence in plan] == [1] * 12
    due = [request.due for sequence in plan for request in sequence if request.due is not None]
    assert len(due) == 12
    assert due == sorted(due)
    assert 0 <= due[0] < due[-1] <= 6


def test_no_two_prompts_begin_alike_unless_they_are_told_to() -> None:
    loads = (Load(SHAPE, 5, streams=4), Load(SHAPE, 5, streams=8), Load(SHAPE, 20, rate=2.0))
    prompts = [r.prompt for load in loads for repeat in range(3) for sequence in load.plan(0, repeat) for r in sequence]
    assert len({tuple(prompt[:8]) for prompt in prompts}) == len(prompts)


def test_a_shared_prefix_stands_before_every_prompt_and_adds_to_its_length() -> None:
    load = Load(Shape(Lengths(20, 40), Lengths(8, 8), shared_prefix=64), 5, streams=4)
    prompts = [r.prompt for repeat in range(2) for sequence in load.plan(0, repeat) for r in sequence]
    assert len({tuple(prompt[:64]) for prompt in prompts}) == 1
    assert len({tuple(prompt[64:72]) for prompt in prompts}) == len(prompts)
    assert all(84 <= len(prompt) <= 104 for prompt in prompts)


def test_equal_tokens_are_equal_words() -> None:
    load = Load(Shape(Lengths(20, 20), Lengths(8, 8), shared_prefix=30), 2, streams=1)
    ((first, second),) = load.plan(0, 0)
    assert first.text.split()[:30] == second.text.split()[:30]
    assert first.text != second.text
    assert len(first.text.split()) == 50


def test_a_fixed_length_is_always_the_same() -> None:
    assert {Lengths.parse("128").draw(random.Random(seed)) for seed in range(50)} == {128}


def test_uniform_lengths_reach_both_bounds_and_keep_to_them() -> None:
    chance = random.Random(0)
    drawn = [Lengths.parse("uniform:32-40").draw(chance) for _ in range(2000)]
    assert set(drawn) == set(range(32, 41))
    assert mean(drawn) == pytest.approx(36, rel=0.02)


def test_log_normal_lengths_have_their_median_and_spread_and_are_cut() -> None:
    chance = random.Random(0)
    lengths = Lengths.parse("lognormal:128,0.6")
    drawn = sorted(lengths.draw(chance) for _ in range(20_000))
    assert median(drawn) == pytest.approx(128, rel=0.03)
    assert drawn[int(0.8413 * len(drawn))] == pytest.approx(128 * 1.822, rel=0.05)
    assert lengths.most == 775
    assert drawn[0] >= 1
    assert drawn[-1] <= 775


def test_a_log_normal_may_be_given_its_greatest() -> None:
    chance = random.Random(0)
    drawn = [Lengths.parse("lognormal:128,0.6,200").draw(chance) for _ in range(2000)]
    assert max(drawn) <= 200
    assert drawn.count(200) < 50, "what is too long is drawn again, not cut to the greatest"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "12.5",
            "uniform:",
            "uniform:5",
            "uniform:1-2-3",
            "normal:5,1",
            "fixed:3",
            "lognormal:128",
            "lognormal:128,0",
        ),
        *("lognormal:128,nan", "lognormal:128,99", "lognormal:1,2,3,4"),
    ],
)
def test_what_is_no_length_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(LoadError, match="uniform:32-512"):
        Lengths.parse(text)


@pytest.mark.parametrize(
    "text", ["0", "-3", "uniform:40-32", "uniform:0-9", "lognormal:0,0.6", "lognormal:128,0.6,100", "9" * 12]
)
def test_lengths_out_of_order_are_refused(text: str) -> None:
    with pytest.raises(LoadError, match="rise from at least 1"):
        Lengths.parse(text)


def test_a_load_that_would_not_end_is_refused() -> None:
    with pytest.raises(LoadError, match="ask for 1 to"):
        Load(SHAPE, MOST_REQUESTS, streams=2)
    with pytest.raises(LoadError, match="ask for 1 to"):
        Load(SHAPE, 0, rate=2.0)
