"""export.sampler: a graph that is nothing but the sampler, run by ONNX Runtime, beside transformers' own warpers."""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from export.sampler import CANDIDATES, append_sampler, sampling_graph

SMALL, LARGE = 40, 1000
VOCABS = [SMALL, LARGE]
LAST = float(np.nextafter(np.float32(1), np.float32(0)))
"""The largest number that `uniform` can be."""
Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Settings:
    """How one row is sampled."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5
    forced: int = -1
    allowed: frozenset[int] | None = None
    """The only tokens that may come; None for all."""
    bias: tuple[tuple[int, float], ...] = ()
    scale: tuple[tuple[int, float], ...] = ()
    penalty: tuple[tuple[int, float], ...] = ()

    @property
    def adorned(self) -> bool:
        """It wants what the plain sampler for GPUs lacks."""
        return self.allowed is not None or bool(self.bias or self.scale or self.penalty)


GREEDY = Settings(temperature=0.0)


@dataclass(frozen=True)
class Drawn:
    """What the graph gave."""

    tokens: list[int]
    logprobs: npt.NDArray[np.float32] = field(repr=False)
    top_tokens: npt.NDArray[np.int64] = field(repr=False)
    top_logprobs: npt.NDArray[np.float32] = field(repr=False)


KINDS = ("branching", "flat", "adorned")
"""The sampler as a part of the CPU's graphs, and the two graphs of their own for GPUs."""
_kind = KINDS[0]


@pytest.fixture(scope="module", params=KINDS, autouse=True)
def kind_of_sampler(request: pytest.FixtureRequest) -> None:
    """Every test runs with both."""
    global _kind
    _kind = request.param


@cache
def sampler(vocab: int, kind: str) -> ort.InferenceSession:
    """A graph from logits [rows, vocab], named "given" or "logits", to tokens and log-probabilities."""
    if kind != "branching":
        flat = sampling_graph(vocab, adorned=kind == "adorned")
        return ort.InferenceSession(ir.serde.serialize_model(flat).SerializeToString(), providers=["CPUExecutionProvider"])
    shape, dtype = ir.Shape(["rows", vocab]), ir.TensorType(ir.DataType.FLOAT)
    given, logits = (ir.Value(name=name, shape=shape, type=dtype) for name in ("given", "logits"))
    node = ir.Node("", "Identity", [given], outputs=[logits])
    model = ir.Model(ir.Graph([given], [logits], nodes=[node], opset_imports={"": 23}, name="sampler"), ir_version=11)
    append_sampler(model, vocab)
    return ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"])


def draw(logits: Array, rows: list[Settings], alternatives: int = 0) -> Drawn:
    """Run the sampler over `logits` [rows, vocab], or [vocab] for all rows."""
    vocab, count = logits.shape[-1], len(rows)
    adorned = any(row.adorned for row in rows) or alternatives > 0
    kind = "adorned" if _kind == "flat" and adorned else _kind
    feeds: dict[str, npt.NDArray[np.generic]] = {
        "given" if kind == "branching" else "logits": np.broadcast_to(logits, (count, vocab)).astype(np.float32)
    }
    for name in ("temperature", "top_p", "min_p", "uniform"):
        feeds[name] = np.array([getattr(row, name) for row in rows], np.float32)
    for name in ("top_k", "forced"):
        feeds[name] = np.array([getattr(row, name) for row in rows], np.int64)
    if kind != "flat":
        feeds |= adornments(vocab, rows, always=kind == "adorned" or adorned)
    if kind == "branching":
        feeds["alternatives"] = np.array([alternatives], np.int64)
    tokens, logprobs, *tops = sampler(vocab, kind).run(None, feeds)
    assert tokens.dtype == np.int64
    assert logprobs.dtype == np.float32
    assert tokens.shape == logprobs.shape == (count,)
    top_tokens, top_logprobs = tops or (np.zeros((count, 0), np.int64), np.zeros((count, 0), np.float32))
    return Drawn(tokens.tolist(), logprobs, top_tokens[:, :alternatives], top_logprobs[:, :alternatives])


def adornments(vocab: int, rows: list[Settings], always: bool) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors for masks and adjustments: as long as the longest row, and padded by the rule of `Adjustments`."""
    words = -(-vocab // 32)
    mask = np.zeros((len(rows) if always else 0, 32 * words), bool)
    for number in range(len(mask)):
        allowed = rows[number].allowed
        mask[number, slice(None) if allowed is None else list(allowed)] = True
    changed = [sorted({token for change in (row.bias, row.scale, row.penalty) for token, _ in change}) for row in rows]
    most = max(map(len, changed), default=0)
    ids = np.array([(tokens + (tokens[:1] or [3]) * most)[:most] for tokens in changed], np.int64).reshape(len(rows), most)
    feeds: dict[str, npt.NDArray[np.generic]] = {"mask": np.packbits(mask, axis=1, bitorder="little"), "adjust_ids": ids}
    for name, nothing in (("bias", 0.0), ("scale", 1.0), ("penalty", 0.0)):
        values = [[dict(getattr(row, name)).get(int(token), nothing) for token in ids[i]] for i, row in enumerate(rows)]
        feeds[f"adjust_{name}"] = np.array(values, np.float32).reshape(ids.shape)
    return feeds


def at(row: Settings, uniforms: Array) -> list[Settings]:
    """`row` at each of these places."""
    return [replace(row, uniform=float(place)) for place in uniforms]


def random_logits(vocab: int, seed: int, spread: float = 3.0, rows: int | None = None) -> npt.NDArray[np.float32]:
    shape = (vocab,) if rows is None else (rows, vocab)
    drawn: npt.NDArray[np.float32] = (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)
    return drawn


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """In double precision."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def warped(logits: npt.NDArray[np.float32], row: Settings) -> npt.NDArray[np.float64]:
    """The distribution [vocab] that transformers would draw from."""
    past = torch.LongTensor(1, 0)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    scores = TemperatureLogitsWarper(float(np.float32(row.temperature)))(past, scores)
    if row.top_k > 0:
        scores = TopKLogitsWarper(row.top_k)(past, scores)
    scores = TopPLogitsWarper(float(np.float32(row.top_p)))(past, scores)
    scores = MinPLogitsWarper(float(np.float32(row.min_p)))(past, scores)
    result: npt.NDArray[np.float64] = scores.softmax(-1)[0].numpy()
    return result


def is_clear(logits: npt.NDArray[np.float32], row: Settings) -> bool:
    """No token stands so near a threshold that float32 may decide otherwise than float64."""
    tempered = np.sort(np.exp(log_softmax(logits / np.float64(np.float32(row.temperature)))))[::-1]
    if row.top_k > 0:
        tempered = tempered[: row.top_k] / tempered[: row.top_k].sum()
    near_p = np.abs(np.cumsum(tempered)[:-1] - np.float32(row.top_p)).min(initial=1) if row.top_p < 1 else 1
    near_min = np.abs(tempered / tempered[0] - np.float32(row.min_p)).min() if row.min_p > 0 else 1
    return bool(near_p > 1e-5 and near_min > 1e-6)


@pytest.mark.parametrize("vocab", VOCABS)
def test_given_temperature_zero_when_drawn_then_the_most_likely_token_comes(vocab: int) -> None:
    logits = random_logits(vocab, seed=1, rows=9)
    assert draw(logits, [GREEDY] * 9).tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("row", [GREEDY, Settings(), Settings(temperature=0.3, top_k=5, top_p=0.5, min_p=0.1)])
def test_given_any_settings_when_drawn_then_log_probabilities_are_those_of_the_unscaled_distribution(
    vocab: int, row: Settings
) -> None:
    logits = random_logits(vocab, seed=2, rows=9)
    drawn = draw(logits, [row] * 9)
    expected = np.take_along_axis(log_softmax(logits), np.array(drawn.tokens)[:, None], 1)[:, 0]
    assert np.abs(drawn.logprobs - expected).max() < 1e-5


@pytest.mark.parametrize("vocab", VOCABS)
def test_given_no_rows_when_drawn_then_nothing_comes(vocab: int) -> None:
    assert draw(np.zeros((0, vocab), np.float32), []).tokens == []


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("row", [GREEDY, Settings(top_k=1)])
def test_given_forced_tokens_when_drawn_then_they_come_with_their_own_log_probabilities(vocab: int, row: Settings) -> None:
    logits = random_logits(vocab, seed=3)
    forced = [0, 1, vocab // 2, vocab - 1, int(logits.argmin())]
    drawn = draw(logits, [replace(row, forced=token) for token in forced] + [row])
    assert drawn.tokens == [*forced, int(logits.argmax())]
    assert np.abs(drawn.logprobs - log_softmax(logits)[drawn.tokens]).max() < 1e-5


@pytest.mark.parametrize("vocab", VOCABS)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    temperature=st.floats(0.1, 5),
    top_k=st.one_of(st.just(0), st.integers(1, 60), st.integers(250, 1100)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
)
@settings(max_examples=60, deadline=None)
def test_given_any_settings_when_drawn_then_the_reachable_tokens_are_transformers_own(
    vocab: int, seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(vocab, seed, spread)
    row = Settings(temperature, top_k, top_p, min_p)
    assume(is_clear(logits, row))
    expected = warped(logits, row)
    # Each token that transformers keeps is met in the middle of its share, which also says that no other has one.
    ends = np.cumsum(expected)
    met = np.flatnonzero(expected > 1e-4)
    met = met[:: len(met) // 150 + 1]
    assert draw(logits, at(row, (ends - expected / 2)[met])).tokens == met.tolist()
    walked = draw(logits, at(row, np.linspace(0, LAST, 150))).tokens
    assert (expected[walked] > 0).all()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize(
    "row",
    [
        Settings(),
        Settings(temperature=0.7, top_k=20),
        Settings(temperature=1.5, top_p=0.8),
        Settings(temperature=2.0, top_k=500, top_p=0.95, min_p=0.02),
    ],
)
def test_given_a_walk_over_uniform_when_drawn_then_each_token_gets_its_probability(vocab: int, row: Settings) -> None:
    logits = random_logits(vocab, seed=7)
    assert is_clear(logits, row)
    places = 4000
    tokens = draw(logits, at(row, (np.arange(places) + 0.5) / places)).tokens
    shares = np.bincount(tokens, minlength=vocab) / places
    assert np.abs(shares - warped(logits, row)).max() <= 1 / places + 1e-4
    assert tokens == sorted(tokens)


def test_given_a_flat_distribution_when_more_than_the_candidates_are_kept_then_the_rest_is_found_too() -> None:
    """Top-p of a nearly flat row needs more tokens than are sorted first."""
    logits = random_logits(LARGE, seed=8, spread=0.05)
    kept = np.count_nonzero(warped(logits, Settings(top_p=0.9)))
    assert kept > 2 * CANDIDATES
    tokens = draw(logits, at(Settings(top_p=0.9), np.linspace(0, LAST, 20 * LARGE))).tokens
    assert len(set(tokens)) == kept


EXTREMES = [
    Settings(temperature=1e-5),
    Settings(temperature=100),
    Settings(top_k=1),
    Settings(top_k=10 * LARGE),
    Settings(top_p=0.0),
    Settings(top_p=1.0),
    Settings(top_p=LAST),
    Settings(min_p=0.0),
    Settings(min_p=1.0),
    Settings(temperature=1e-5, top_k=3, top_p=0.0, min_p=1.0),
    Settings(temperature=100, top_k=10 * LARGE, top_p=LAST, min_p=1e-6),
]


def masked(vocab: int) -> npt.NDArray[np.float32]:
    """Only every seventh token is possible; the first and the last are not."""
    logits = random_logits(vocab, seed=9)
    logits[np.arange(vocab) % 7 != 3] = -np.inf
    logits[-1] = -np.inf
    return logits


def only(vocab: int, token: int) -> npt.NDArray[np.float32]:
    logits = np.full(vocab, -np.inf, np.float32)
    logits[token] = -5
    return logits


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("row", EXTREMES)
@pytest.mark.parametrize("kind", ["random", "steep", "masked", "equal", "first", "last"])
def test_given_extreme_settings_when_drawn_then_only_possible_tokens_come(vocab: int, row: Settings, kind: str) -> None:
    logits = {
        "random": random_logits(vocab, seed=10),
        "steep": random_logits(vocab, seed=11, spread=1e4),
        "masked": masked(vocab),
        "equal": np.full(vocab, 2.5, np.float32),
        "first": only(vocab, 0),
        "last": only(vocab, vocab - 1),
    }[kind]
    places = np.array([0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-23, LAST])
    drawn = draw(logits, at(row, places))
    assert all(0 <= token < vocab for token in drawn.tokens)
    assert np.isfinite(logits[drawn.tokens]).all()
    assert np.isfinite(drawn.logprobs).all()
    if kind not in ("equal", "masked") and (row.top_p == 0 or row.min_p == 1 or row.top_k == 1):
        assert drawn.tokens == [int(logits.argmax())] * len(places)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("row", [Settings(), Settings(top_k=3), Settings(temperature=2.0, top_p=0.95)])
def test_given_the_ends_of_uniform_when_drawn_then_the_first_and_the_last_token_that_are_kept_come(
    vocab: int, row: Settings
) -> None:
    logits = masked(vocab)
    kept = np.flatnonzero(warped(logits, row))
    assert len(kept) > 1
    assert draw(logits, at(row, np.array([0, 1 - 2.0**-20]))).tokens == [kept[0], kept[-1]]


@pytest.mark.parametrize("vocab", VOCABS)
def test_given_equal_logits_when_drawn_then_every_token_comes_as_often(vocab: int) -> None:
    tokens = draw(np.zeros(vocab, np.float32), at(Settings(), (np.arange(4 * vocab) + 0.5) / (4 * vocab))).tokens
    assert (np.abs(np.bincount(tokens, minlength=vocab) - 4) <= 1).all()


@pytest.mark.parametrize("vocab", VOCABS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_given_rows_of_all_kinds_in_a_batch_when_drawn_then_each_comes_as_it_does_alone(vocab: int, seed: int) -> None:
    places = np.random.default_rng(seed).random(6)
    rows = [
        GREEDY,
        Settings(uniform=places[0]),
        Settings(0.8, 40, 0.9, 0.05, places[1]),
        Settings(1.0, 0, 0.2, 0.0, places[2]),
        Settings(5.0, 0, 0.99, 0.0, places[3]),  # keeps more than are sorted first
        Settings(3.0, 700, 0.95, 0.0, places[4]),
        Settings(0.0, 3, 0.1, 0.5, places[5]),
        Settings(1.0, forced=5),
    ]
    logits = random_logits(vocab, seed, rows=len(rows))
    together = draw(logits, rows)
    for number, row in enumerate(rows):
        alone = draw(logits[number : number + 1], [row])
        assert alone.tokens == together.tokens[number : number + 1]
        assert alone.logprobs.tobytes() == together.logprobs[number : number + 1].tobytes()


@pytest.mark.parametrize("vocab", VOCABS)
def test_given_equal_maxima_then_greedy_takes_the_first_as_argmax_does(vocab: int) -> None:
    """The maximum is looked for in blocks, of which the last is padded; also where all but one are the least there is."""
    ties = np.zeros((4, vocab), np.float32)
    ties[1, [7, 8, vocab - 1]] = 5
    ties[2, vocab - 1] = 5
    ties[3] = -np.inf
    ties[3, vocab - 2] = -1e30
    assert draw(ties, [GREEDY] * 4).tokens == ties.argmax(-1).tolist() == [0, 7, vocab - 1, vocab - 2]


# Masks, adjustments and alternatives --------------------------------------------------------------------------------------


def adapted(logits: npt.NDArray[np.float32], row: Settings) -> npt.NDArray[np.float32]:
    """The logits [vocab] that `row` is drawn from, in the order of `runtime.messages.Sampling`."""
    left = logits.copy()
    bias, scale, penalty = dict(row.bias), dict(row.scale), dict(row.penalty)
    for token in {*bias, *scale, *penalty}:
        biased = left[token] + np.float32(bias.get(token, 0))
        by = np.float32(scale.get(token, 1))
        left[token] = (biased / by if biased > 0 else biased * by) - np.float32(penalty.get(token, 0))
    if row.allowed is not None:
        left[[token for token in range(len(left)) if token not in row.allowed]] = -np.inf
    return left


def random_adornment(vocab: int, random: np.random.Generator, row: Settings) -> Settings:
    def some(most: int) -> list[int]:
        chosen: list[int] = random.choice(vocab, random.integers(0, most), replace=False).tolist()
        return chosen

    return replace(
        row,
        allowed=None if random.random() < 0.3 else frozenset(some(vocab - 1) or [int(random.integers(vocab))]),
        bias=tuple((token, float(random.normal() * 3)) for token in some(8)),
        scale=tuple((token, float(random.uniform(0.5, 2))) for token in some(30)),
        penalty=tuple((token, float(random.normal())) for token in some(30)),
    )


@pytest.mark.parametrize("vocab", VOCABS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_given_masks_and_adjustments_when_drawn_then_it_is_as_if_the_logits_had_come_so(vocab: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    plain = [
        GREEDY,
        GREEDY,
        Settings(uniform=random.random()),
        Settings(0.8, 40, 0.9, 0.05, random.random()),
        Settings(1.7, 0, 0.95, 0.0, random.random()),
        Settings(1.0, forced=int(random.integers(vocab))),
    ]
    rows = [random_adornment(vocab, random, row) for row in plain]
    rows[1] = plain[1]
    logits = random_logits(vocab, seed, rows=len(rows))
    left = np.stack([adapted(logits[number], row) for number, row in enumerate(rows)])
    drawn = draw(logits, rows, alternatives=5)
    assert drawn.tokens == draw(left, plain).tokens
    own = log_softmax(logits)
    assert np.abs(drawn.logprobs - np.take_along_axis(own, np.array(drawn.tokens)[:, None], 1)[:, 0]).max() < 1e-5
    assert drawn.top_tokens.tolist() == np.argsort(-logits, axis=-1, kind="stable")[:, :5].tolist()
    assert np.abs(drawn.top_logprobs - np.take_along_axis(own, drawn.top_tokens, 1)).max() < 1e-5


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["random", "steep", "equal", "least allowed"])
def test_given_any_mask_when_drawn_then_no_other_token_comes(vocab: int, kind: str) -> None:
    random = np.random.default_rng(12)
    logits = {"steep": random_logits(vocab, seed=11, spread=1e4), "equal": np.zeros(vocab, np.float32)}.get(
        kind, random_logits(vocab, seed=10)
    )
    for size in (1, 1, 2, 7, vocab // 2, vocab - 1):
        allowed = frozenset(random.choice(vocab, size, replace=False).tolist())
        if kind == "least allowed":  # those that the model excludes itself
            logits = random_logits(vocab, seed=13)
            logits[list(allowed)] = -np.inf
        rows = [
            replace(row, temperature=temperature, allowed=allowed)
            for row in at(Settings(), np.array([0, 2.0**-24, 0.5, 1 - 2.0**-23, LAST]))
            for temperature in (0, 1e-30, 1e-5, 0.5, 1, 2, 100)
        ]
        rows += [replace(row, top_p=0.5) for row in rows] + [replace(row, top_k=2, min_p=0.9) for row in rows]
        assert allowed.issuperset(draw(logits, rows).tokens)


def test_given_more_adjustments_than_float32_holds_when_drawn_then_masks_hold_still() -> None:
    row = replace(GREEDY, allowed=frozenset([3, 5]), bias=((3, -3e38), (4, 3e38)), scale=((3, 1e9), (4, 1e-9)))
    assert draw(random_logits(SMALL, seed=1), [row, replace(row, temperature=1.0)]).tokens == [5, 5]
