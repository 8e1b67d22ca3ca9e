"""What requests change of their tokens' logits and want told, through the real loop and engine, beside transformers."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from runtime import engine, messages, ort
from runtime.draft import Drafter
from runtime.engine import Batch, Draw, Float32, Int64
from runtime.footprint import ROWS
from runtime.loop import Loop
from runtime.messages import MOST_ALTERNATIVES, Generate, Refused, Row, Sampling, Scored
from runtime.ort import OrtEngine
from runtime.penalties import Penalties
from tests import tiny

SLOTS, CONTEXT = 3, 320
FRONT = b"front"
LAVISH = Sampling(logit_bias={5: 3.0, 77: -4.0, 400: 2.5}, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[OrtEngine]:
    loaded = ort.load(tiny_bundle, "cpu-fp32", slots=SLOTS, context=CONTEXT, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture
def loop(served: OrtEngine) -> Loop:
    return Loop(served, queue=100, speculation=False)


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny.random_model().eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}/{length}/{i}").randrange(3, tiny.VOCAB) for i in range(length)]


def run(loop: Loop, *requests: Generate) -> dict[str, list[Row]]:
    for request in requests:
        assert loop.submit(FRONT, request) is None
    rows: dict[str, list[Row]] = {}
    while loop.busy:
        for news in loop.step():
            rows.setdefault(news.row.id, []).append(news.row)
    return rows


def tokens(rows: list[Row]) -> list[int]:
    return [token for row in rows for token in row.tokens]


def logits_of(reference: Any, ids: list[int]) -> npt.NDArray[np.float32]:
    """transformers' own [len(ids), vocab]."""
    with torch.no_grad():
        given: npt.NDArray[np.float32] = reference(torch.tensor([ids])).logits[0].float().numpy()
    return given


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return torch.from_numpy(logits.astype(np.float64)).log_softmax(-1).numpy()


def lavish(reference: Any, ids: list[int], count: int, sampling: Sampling) -> list[int]:
    """The greedy continuation of `ids` by `count` tokens, by vLLM's formulas over transformers' logits."""
    answer: list[int] = []
    for _ in range(count):
        logits = logits_of(reference, ids + answer)[-1].astype(np.float64)
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        for token in {*ids, *answer}:
            by = sampling.repetition_penalty
            logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
        for token, times in Counter(answer).items():
            logits[token] -= times * sampling.frequency_penalty + sampling.presence_penalty
        answer.append(int(logits.argmax()))
    return answer


def test_given_a_repetition_penalty_then_the_answer_is_transformers_own(loop: Loop, reference: Any) -> None:
    for penalty in (1.2, 1.8, 0.8):
        requests = [
            Generate(f"{penalty}/{length}", prompt(length), max_tokens=40, sampling=Sampling(repetition_penalty=penalty))
            for length in (1, 9, 70)
        ]
        rows = run(loop, *requests)
        for request in requests:
            ids = torch.tensor([request.prompt])
            expected = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=40,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert tokens(rows[request.id]) == expected[0, len(request.prompt) :].tolist()


def test_given_all_penalties_and_biases_then_the_answer_is_what_their_formulas_give(loop: Loop, reference: Any) -> None:
    """Beside a request without any, and one with others."""
    other = Sampling(frequency_penalty=-0.5)
    rows = run(
        loop,
        Generate("all", prompt(20), max_tokens=60, sampling=LAVISH),
        Generate("none", prompt(21), max_tokens=60),
        Generate("other", prompt(22), max_tokens=60, sampling=other),
    )
    assert tokens(rows["all"]) == lavish(reference, prompt(20), 60, LAVISH)
    assert tokens(rows["none"]) == lavish(reference, prompt(21), 60, Sampling())
    assert tokens(rows["other"]) == lavish(reference, prompt(22), 60, other)
    own = log_softmax(logits_of(reference, prompt(20) + tokens(rows["all"])))
    told = [logprob for row in rows["all"] for logprob in row.logprobs]
    assert np.abs(told - own[np.arange(19, 79), tokens(rows["all"])]).max() < 1e-4


def test_given_guesses_then_each_is_verified_with_the_penalties_of_its_own_place(served: OrtEngine, loop: Loop) -> None:
    """Guesses from a prediction that is right in most places, and from a draft engine that is the engine itself."""
    drawn = Sampling(0.7, 0, 0.95, 0.0, 3, LAVISH.logit_bias, 0.3, 0.2, 1.2)
    for sampling in (LAVISH, drawn):
        alone = tokens(run(loop, Generate("a", prompt(20), max_tokens=60, sampling=sampling, min_tokens=9))["a"])
        predicted = [token if i % 13 else 9 for i, token in enumerate(alone)]
        for drafter in (None, Drafter(served, served)):
            guessing = Loop(served, queue=9, drafter=drafter)
            request = Generate("a", prompt(20), max_tokens=60, sampling=sampling, prediction=predicted, min_tokens=9)
            assert tokens(run(guessing, request)["a"]) == alone
            assert guessing.counters.accepted_tokens > 10


def test_given_an_answer_of_any_length_then_a_step_says_the_same_of_it_as_counting_anew() -> None:
    request = Generate("a", prompt(50), max_tokens=500, sampling=LAVISH, stop_ids=[7, 5, 10**6], min_tokens=100)
    kept, chance, said = Penalties(request, tiny.VOCAB), random.Random(4), list[int]()
    for number in range(300):
        guesses = [chance.randrange(tiny.VOCAB // 4) for _ in range(number % 5)]
        ids, bias, scale, penalty = kept.after(guesses)
        assert len(set(ids.tolist())) == len(ids)
        counts, seen = Counter(said + guesses), {*request.prompt, *said, *guesses}
        early = {5, 7} if len(said) + len(guesses) < 100 else set()
        assert set(ids.tolist()) == seen | LAVISH.logit_bias.keys() | {5, 7}
        for token, b, s, p in zip(ids.tolist(), bias, scale, penalty, strict=True):
            off = counts[token] * 0.7 + 0.4 * (counts[token] > 0)
            assert b == np.float32(LAVISH.logit_bias.get(token, 0))
            assert s == np.float32(1.3 if token in seen else 1)
            assert p == pytest.approx(1e9 if token in early else off, rel=1e-6)
        said.append(chance.randrange(tiny.VOCAB // 4))
        kept.take(said[-1])


def test_given_min_tokens_then_no_stop_token_comes_before_and_the_answer_stops_after(loop: Loop) -> None:
    free = tokens(run(loop, Generate("a", prompt(6), max_tokens=40))["a"])
    stops = sorted({free[0], free[3], free[12]})
    for sampling in (Sampling(), Sampling(temperature=1.5, seed=5)):
        request = Generate("b", prompt(6), max_tokens=300, stop_ids=stops, min_tokens=25, sampling=sampling)
        rows = run(loop, request)["b"]
        assert not {*tokens(rows)} & {*stops}
        assert len(tokens(rows)) >= 25
    biased = Generate("c", prompt(6), max_tokens=40, stop_ids=[8], min_tokens=11, sampling=Sampling(logit_bias={8: 1e6}))
    rows = run(loop, biased)["c"]
    assert (len(tokens(rows)), rows[-1].finish) == (11, "stop")


def test_given_top_logprobs_then_the_likeliest_tokens_of_each_place_are_told(loop: Loop, reference: Any) -> None:
    """Also of requests whose draws are changed, and only to those who want them, as many as each wants."""
    requests = [
        Generate("a", prompt(30), max_tokens=25, top_logprobs=5),
        Generate("b", prompt(31), max_tokens=25, top_logprobs=MOST_ALTERNATIVES, sampling=LAVISH),
        Generate("c", prompt(32), max_tokens=25),
    ]
    rows = run(loop, *requests)
    for request in requests:
        answer = tokens(rows[request.id])
        tops = [top for row in rows[request.id] for top in row.tops]
        assert len(tops) == (25 if request.top_logprobs else 0)
        own = log_softmax(logits_of(reference, request.prompt + answer))[len(request.prompt) - 1 :]
        for place, top in enumerate(tops):
            check_tops(top, own[place], request.top_logprobs)
    assert all(top[0][0] == token for row in rows["a"] for token, top in zip(row.tokens, row.tops, strict=True))


def check_tops(top: list[tuple[int, float]], own: npt.NDArray[np.float64], count: int) -> None:
    assert len(top) == count
    told = [logprob for _, logprob in top]
    assert told == sorted(told, reverse=True)
    assert np.abs(np.array(told) - np.sort(own)[::-1][:count]).max(initial=0) < 1e-4
    assert np.abs(np.array(told) - own[[token for token, _ in top]]).max(initial=0) < 1e-4


def test_given_guesses_then_alternatives_stand_with_their_tokens(served: OrtEngine, loop: Loop) -> None:
    (alone,) = run(loop, Generate("a", prompt(20), max_tokens=60, top_logprobs=3)).values()
    guessing = Loop(served, queue=9)
    request = Generate("a", prompt(20), max_tokens=60, top_logprobs=3, prediction=tokens(alone))
    (guessed,) = run(guessing, request).values()
    assert guessing.counters.accepted_tokens > 10
    assert tokens(guessed) == tokens(alone)
    one, other = ([top for row in rows for top in row.tops] for rows in (alone, guessed))
    assert [[token for token, _ in top] for top in one] == [[token for token, _ in top] for top in other]
    assert np.abs(np.array(one)[..., 1] - np.array(other)[..., 1]).max() < 1e-4


@pytest.mark.parametrize("length", [1, 2, ROWS - 1, ROWS, ROWS + 1, 200])
@pytest.mark.parametrize("top", [0, 4])
def test_given_prompt_logprobs_then_every_token_but_the_first_is_scored(
    loop: Loop, reference: Any, length: int, top: int
) -> None:
    """Twice, so that the prompt stands in a slot; it is computed all the same."""
    plain = tokens(run(loop, Generate("plain", prompt(length), max_tokens=3))["plain"])
    for _ in range(2):
        rows = run(loop, Generate("a", prompt(length), max_tokens=3, prompt_logprobs=True, top_logprobs=top))["a"]
        assert tokens(rows) == plain
        assert [row.cached for row in rows] == [0] * 3
        assert [row.prompt for row in rows[1:]] == [[], []]
        own = log_softmax(logits_of(reference, prompt(length)))
        scored = rows[0].prompt
        assert len(scored) == length - 1
        for place, score in enumerate(scored):
            assert score.logprob == pytest.approx(own[place, prompt(length)[place + 1]], abs=1e-4)
            check_tops(score.tops, own[place], top)


def test_given_prompt_logprobs_and_one_token_then_the_only_row_has_both(loop: Loop) -> None:
    (row,) = run(loop, Generate("a", prompt(70), max_tokens=1, prompt_logprobs=True, sampling=Sampling(1.0)))["a"]
    assert (len(row.tokens), row.finish, len(row.prompt)) == (1, "length", 69)
    assert messages.decode_reply(messages.encode(messages.Progress([row]))) == messages.Progress([row])
    assert isinstance(row.prompt[0], Scored)


class Foresighted(OrtEngine):
    """Runs no step ahead, but is offered them, as engines on a GPU are, and keeps what it was offered."""

    offered: list[Draw | None]

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        self.offered.append(ahead)
        return super().step(batch, ahead)


def test_given_penalties_then_no_step_is_begun_before_its_draw_is_known(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "OrtEngine", Foresighted)
    loaded = ort.load(tiny_bundle, "cpu-fp32", slots=1, context=CONTEXT, threads=1)
    assert isinstance(loaded, Foresighted)
    loaded.runs_ahead = True
    loop = Loop(loaded, queue=9, speculation=False)
    for sampling, foreseen in (
        (Sampling(), True),
        (Sampling(logit_bias={4: 2.0}, temperature=1.0, seed=8), True),
        (Sampling(repetition_penalty=1.1), False),
        (Sampling(presence_penalty=0.1), False),
        (Sampling(frequency_penalty=0.1), False),
    ):
        loaded.offered = []
        run(loop, Generate("a", prompt(9), max_tokens=9, sampling=sampling, top_logprobs=2))
        assert any(draw is not None for draw in loaded.offered) == foreseen
    loaded.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": Sampling(logit_bias={tiny.VOCAB: 1.0})}, "outside the vocabulary of 512"),
        ({"sampling": Sampling(logit_bias={-1: 1.0})}, "outside the vocabulary"),
        ({"sampling": Sampling(logit_bias={1: math.nan})}, "logit_bias of token 1 is nan"),
        ({"sampling": Sampling(logit_bias={1: math.inf})}, "logit_bias of token 1 is inf"),
        ({"sampling": Sampling(logit_bias=dict.fromkeys(range(3000), 1.0))}, "at most 1024"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "repetition_penalty is 0.0"),
        ({"sampling": Sampling(repetition_penalty=-1.0)}, "repetition_penalty is -1.0"),
        ({"sampling": Sampling(frequency_penalty=math.nan)}, "frequency_penalty is nan"),
        ({"sampling": Sampling(presence_penalty=-math.inf)}, "presence_penalty is -inf"),
        ({"sampling": Sampling(temperature=math.inf)}, "temperature is inf"),
        ({"sampling": Sampling(top_p=math.nan)}, "top_p is nan"),
        ({"top_logprobs": MOST_ALTERNATIVES + 1}, "it goes from 0 to 20"),
        ({"top_logprobs": -1}, "it goes from 0 to 20"),
        ({"min_tokens": 11}, "it goes from 0 to max_tokens, 10"),
        ({"min_tokens": -1}, "min_tokens is -1"),
    ],
)
def test_given_numbers_that_no_engine_can_compute_with_then_the_request_is_refused(
    loop: Loop, changes: dict[str, Any], message: str
) -> None:
    refused = loop.submit(FRONT, Generate("a", prompt(5), **{"max_tokens": 10, **changes}))
    assert isinstance(refused, Refused)
    assert refused.reason == "bad request"
    assert message in refused.message
    assert not loop.busy


def test_engines_and_messages_agree_on_the_alternatives() -> None:
    assert engine.MOST_ALTERNATIVES == messages.MOST_ALTERNATIVES


def test_given_a_mask_then_the_engine_draws_within_it(served: OrtEngine) -> None:
    """As an array, and as a function that is asked for it."""
    chance = np.random.default_rng(5)
    for _ in range(50):
        allowed = np.zeros((2, 32 * 16), bool)
        for row in allowed:
            row[chance.choice(tiny.VOCAB, chance.integers(1, 6), replace=False)] = True
        mask = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
        plain = Draw.greedy(2)
        heat = np.array([0.0, chance.uniform(0, 2)], np.float32)
        for given in (mask, lambda mask=mask: mask):
            draw = Draw(heat, plain.top_k, plain.top_p, plain.min_p, chance.random(2).astype(np.float32), plain.forced, given)
            got, _ = served.step(Batch(0, np.array([[3], [4]]), np.array([1, 1], np.int32), np.arange(2), draw))
            assert allowed[np.arange(2), got].all()
