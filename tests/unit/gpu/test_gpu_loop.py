"""The decode loop over the engine on a GPU: requests come, end and are cancelled at any time, and each gets its own answer."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.loop import Loop
from runtime.messages import Generate, Row, Sampling
from runtime.ort import OrtEngine
from tests.unit.gpu.conftest import CONTEXT, SLOTS, Load
from tests.unit.gpu.test_gpu_engine import Greedy, prompt

FRONT = b"front"
REQUESTS = 24


@pytest.mark.parametrize("speculation", [False, True])
def test_many_requests_get_the_answers_that_each_gets_alone(load: Load, greedy: Greedy, speculation: bool) -> None:
    loop = Loop(load(), queue=REQUESTS, speculation=speculation)
    dice = random.Random(7 + speculation)
    shared = prompt(32, seed=99)  # so that rows are copied from slot to slot
    requests = {}
    for number in range(REQUESTS):
        length = dice.randrange(1, 20)
        text = [*(shared if number % 3 == 0 else []), *prompt(length, seed=number)]
        count = dice.randrange(1, CONTEXT - len(text))
        requests[f"r{number}"] = Generate(f"r{number}", text, max_tokens=min(count, 12))
    waiting, going, cancelled = list(requests.values()), set[str](), set[str]()
    got: dict[str, list[int]] = {name: [] for name in requests}
    while waiting or loop.busy:
        for _ in range(dice.randrange(3)):
            if waiting:
                going.add(waiting[0].id)
                assert loop.submit(FRONT, waiting.pop(0)) is None
        if going and dice.random() < 0.1:
            name = dice.choice(sorted(going))
            assert loop.cancel(FRONT, name) is not None
            cancelled.add(name)
            going.remove(name)
        for news in loop.step():
            assert news.row.finish != "error", news.row.message
            got[news.row.id] += news.row.tokens
            if news.row.finish is not None:
                going.remove(news.row.id)
        loop.slots.check()
    assert loop.slots.free == SLOTS
    for name, request in requests.items():
        right = greedy(list(request.prompt), request.max_tokens)
        assert got[name] == (right[: len(got[name])] if name in cancelled else right), name
    assert 0 < len(cancelled) < REQUESTS


def test_sampled_answers_are_the_seeds_own(load: Load) -> None:
    def run(together: int) -> list[list[int]]:
        loop = Loop(load(), queue=8, speculation=False)
        got: dict[str, list[int]] = {}
        requests = [
            Generate(f"r{n}", prompt(5 + n, seed=n), max_tokens=9, sampling=Sampling(temperature=0.9, top_p=0.9, seed=n))
            for n in range(4)
        ]
        while requests or loop.busy:
            while requests and loop.running + loop.waiting < together:
                loop.submit(FRONT, requests.pop(0))
            for news in loop.step():
                got.setdefault(news.row.id, []).extend(news.row.tokens)
        return [got[name] for name in sorted(got)]

    assert run(together=1) == run(together=4)


def test_penalties_alternatives_and_scored_prompts_are_the_cpus(load: Load, reference: OrtEngine) -> None:
    """Many requests with different wishes, with guesses and without."""

    def run(engine: Engine, speculation: bool) -> dict[str, list[Row]]:
        loop, got = Loop(engine, queue=20, speculation=speculation), dict[str, list[Row]]()
        for number in range(9):
            sampling = Sampling(
                temperature=0.9 if number % 2 else 0.0,
                seed=number,
                logit_bias={7: 3.0, 9: -2.0} if number % 3 else {},
                frequency_penalty=0.5 if number % 4 == 1 else 0.0,
                repetition_penalty=1.3 if number % 3 == 2 else 1.0,
            )
            request = Generate(
                f"r{number}",
                prompt(4 + 4 * number, seed=number),
                max_tokens=20,
                sampling=sampling,
                stop_ids=[7],
                min_tokens=number,
                top_logprobs=number % 3,
                prompt_logprobs=number % 2 == 0,
            )
            assert loop.submit(FRONT, request) is None
        while loop.busy:
            for news in loop.step():
                assert news.row.finish != "error", news.row.message
                got.setdefault(news.row.id, []).append(news.row)
        return got

    expected = run(reference, speculation=False)
    for speculation in (False, True):
        rows = run(load(), speculation)
        assert rows.keys() == expected.keys()
        for name, right in expected.items():
            assert list(_each(rows[name], "tokens")) == list(_each(right, "tokens")), name
            assert [row.finish for row in rows[name]][-1] == right[-1].finish
            ours, theirs = ([token for top in _each(some, "tops") for token, _ in top] for some in (rows[name], right))
            assert ours == theirs
            scores, scored = rows[name][0].prompt, right[0].prompt
            assert np.allclose([s.logprob for s in scores], [s.logprob for s in scored], atol=1e-4)
            assert [[t for t, _ in s.tops] for s in scores] == [[t for t, _ in s.tops] for s in scored]


def _each(rows: list[Row], name: str) -> Iterator[Any]:
    for row in rows:
        yield from getattr(row, name)
