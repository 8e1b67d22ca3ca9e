"""Guessed tokens in the decode loop, on real engines: whatever is guessed, the tokens are those that a plain loop gives."""

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from runtime import ort
from runtime.draft import Drafter
from runtime.engine import EngineError
from runtime.loop import Loop
from runtime.messages import Generate, Row, Sampling
from runtime.ort import OrtEngine
from runtime.sequence import Sequence
from tests.unit.test_loop import run

SLOTS = 4
CONTEXT = 320
FRONT = b"front"


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[OrtEngine]:
    engine = ort.load(tiny_bundle, "cpu-fp32", slots=SLOTS, context=CONTEXT, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def small(tiny_bundle: Path) -> Iterator[OrtEngine]:
    """The same model in four bits: mostly of the same opinion."""
    engine = ort.load(tiny_bundle, "cpu-int4", slots=SLOTS, context=CONTEXT, threads=1)
    yield engine
    engine.close()


class Liar(Drafter):
    """Guesses wrong, now at the first place and now at a later one."""

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        guesses = super().guess(sequence, count)
        wrong = len(sequence.tokens) % count
        return [*guesses[:wrong], *[(guess + 1) % 512 for guess in guesses[wrong:]]]


class Dying(Drafter):
    """Fails at its third guess."""

    left = 3

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        self.left -= 1
        if not self.left:
            raise EngineError("the device is gone")
        return super().guess(sequence, count)


def requests(temperature: float, speculation: bool = True) -> list[Generate]:
    """More of them than slots, of ragged lengths; some repeat themselves, so that they can be looked up."""
    chance = random.Random(11)
    made = []
    for i in range(14):
        prompt = [chance.randrange(3, 500) for _ in range(chance.randrange(1, 70))]
        sampling = Sampling(temperature=temperature, top_k=30 if i % 3 else 0, top_p=0.95, seed=i)
        made.append(Generate(f"r{i}", prompt * (1 + i % 3), chance.randrange(5, 90), sampling, [], speculation))
    return made


def answers(loop: Loop, wanted: list[Generate]) -> dict[str, list[Row]]:
    return run(loop, *wanted)


def tokens(rows: dict[str, list[Row]]) -> dict[str, list[int]]:
    return {name: [token for row in its for token in row.tokens] for name, its in rows.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("drafter", [Drafter, Liar])
def test_a_draft_engine_changes_no_token(
    engine: OrtEngine, small: OrtEngine, temperature: float, drafter: type[Drafter]
) -> None:
    """Greedy or sampled: each place's random number is its own, so even the same seed gives the same tokens."""
    plain = answers(Loop(engine, queue=100, speculation=False), requests(temperature))
    guide = drafter(small, engine)
    guide.cost = 0.01  # so that it is asked although these engines are equally small
    loop = Loop(engine, queue=100, drafter=guide)
    guessed = answers(loop, requests(temperature))
    assert tokens(guessed) == tokens(plain)
    for name, rows in plain.items():
        expected = [logprob for row in rows for logprob in row.logprobs]
        assert [logprob for row in guessed[name] for logprob in row.logprobs] == pytest.approx(expected, abs=1e-3)
        assert guessed[name][-1].finish == rows[-1].finish
    counters = loop.counters
    assert counters.guessed_tokens > 25
    assert 0 < counters.accepted_tokens < counters.guessed_tokens
    if drafter is Drafter and not temperature:
        assert counters.accepted_tokens > 0.5 * counters.guessed_tokens


def test_an_answer_that_was_predicted_takes_few_steps(engine: OrtEngine) -> None:
    wanted = [Generate(f"r{i}", [7 + i, 100, 40 + i], max_tokens=200) for i in range(SLOTS)]
    plain = tokens(answers(Loop(engine, queue=100, speculation=False), wanted))
    wrong = 99
    predicted = [
        msgspec.structs.replace(request, prediction=[*plain[request.id][:wrong], 3, *plain[request.id][wrong + 1 :]])
        for request in wanted
    ]
    loop = Loop(engine, queue=100)
    assert tokens(answers(loop, predicted)) == plain
    assert loop.counters.accepted_tokens > 150 * SLOTS
    assert loop.counters.steps < 50 * SLOTS


def test_a_prediction_that_is_wrong_changes_nothing(engine: OrtEngine) -> None:
    request = Generate("a", [7, 100, 40], max_tokens=60)
    plain = tokens(answers(Loop(engine, queue=1, speculation=False), [request]))
    nonsense = msgspec.structs.replace(request, prediction=[3, 4, 5] * 20)
    loop = Loop(engine, queue=1)
    assert tokens(answers(loop, [nonsense])) == plain
    assert loop.counters.guessed_tokens < 20


def test_a_request_that_wants_no_guesses_gets_none(engine: OrtEngine, small: OrtEngine) -> None:
    loop = Loop(engine, queue=100, drafter=Drafter(small, engine))
    rows = answers(loop, requests(0.0, speculation=False))
    assert loop.counters.guessed_tokens == 0
    assert all(len(row.tokens) <= 1 for its in rows.values() for row in its)


def test_a_request_answers_alike_alone_and_in_company(engine: OrtEngine, small: OrtEngine) -> None:
    wanted = requests(0.8)
    together = tokens(answers(Loop(engine, queue=100, drafter=Drafter(small, engine)), wanted))
    for request in wanted:
        assert tokens(answers(Loop(engine, queue=1, drafter=Drafter(small, engine)), [request])) == {
            request.id: together[request.id]
        }


def test_prompts_get_on_while_everybody_has_guesses_verified(engine: OrtEngine) -> None:
    """A newcomer's prompt is not kept waiting until the others have nothing left to guess."""
    first = [Generate(f"r{i}", [7 + i, 100, 40 + i], max_tokens=290) for i in range(SLOTS - 1)]
    plain = tokens(answers(Loop(engine, queue=100, speculation=False), first))
    loop = Loop(engine, queue=100)
    for request in first:
        loop.submit(FRONT, msgspec.structs.replace(request, prediction=plain[request.id]))
    while loop.slots.prefilling is not None or loop.waiting:
        loop.step()
    loop.submit(FRONT, Generate("new", [5] * 100, max_tokens=3))
    ended: list[str] = []
    while "new" not in ended:
        ended += [news.row.id for news in loop.step() if news.row.finish is not None or news.row.id == "new"]
    assert set(ended) == {"new"}
    loop.cancel_all(FRONT)


def test_a_draft_engine_that_fails_is_done_without(engine: OrtEngine, small: OrtEngine) -> None:
    plain = answers(Loop(engine, queue=100, speculation=False), requests(0.0))
    guide = Dying(small, engine)
    guide.cost = 0.01
    loop = Loop(engine, queue=100, drafter=guide)
    assert tokens(answers(loop, requests(0.0))) == tokens(plain)
    assert loop.drafter is None


def test_a_draft_engine_of_another_shape_is_refused(tiny_bundle: Path, engine: OrtEngine) -> None:
    other = ort.load(tiny_bundle, "cpu-int4", slots=SLOTS, context=CONTEXT // 2, threads=1)
    with pytest.raises(EngineError, match="as many slots"):
        Drafter(other, engine)
    other.close()


def test_guesses_stop_where_the_context_does(engine: OrtEngine, small: OrtEngine) -> None:
    guide = Drafter(small, engine)
    guide.cost = 0.01
    wanted = [Generate("a", [5, 9] * 145, max_tokens=1000), Generate("b", [8, 3, 9] * 100, max_tokens=1000)]
    rows = answers(Loop(engine, queue=8, drafter=guide), wanted)
    plain = answers(Loop(engine, queue=8, speculation=False), wanted)
    assert tokens(rows) == tokens(plain)
    assert len(tokens(rows)["a"]) == CONTEXT - 290
