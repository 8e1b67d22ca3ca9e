"""What the GPU draws: as the same graph does on the CPU, and as the distribution says."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from export import graph, sampler
from runtime.engine import Batch, Draw
from runtime.gpu import GpuEngine
from runtime.ort_providers import check_installed

if TYPE_CHECKING:
    from tests.gpu.conftest import Loaded

CARRIED = {"fp16": 0.02, "bf16": 0.1, "int4": 0.03}
"""Of the whole distribution: how far a drawn token's place may lie from where it was to be drawn, as logits are rounded."""


def draws(rows: int, seed: int = 0) -> Draw:
    """Greedy rows, forced ones, and every way to cut a distribution."""
    chance = np.random.default_rng(seed)
    number = np.arange(rows)
    return Draw(
        temperature=np.where(number % 4 == 0, 0.0, chance.uniform(0.5, 1.5, rows)).astype(np.float32),
        top_k=np.where(number % 3 == 0, chance.integers(1, 50, rows), 0),
        top_p=np.where(number % 2 == 0, chance.uniform(0.5, 1.0, rows), 1.0).astype(np.float32),
        min_p=np.where(number % 5 == 0, 0.05, 0.0).astype(np.float32),
        uniform=chance.random(rows).astype(np.float32),
        forced=np.where(number % 7 == 6, number, -1),
    )


def place(logprobs: npt.NDArray[np.float64], draw: Draw, row: int, token: int) -> tuple[float, float]:
    """Where `token` begins and ends in what the settings of `row` keep of the distribution `logprobs` [vocab], in [0, 1]."""
    weights = np.exp((logprobs - logprobs.max()) / draw.temperature[row])
    descending = np.sort(weights)[::-1]
    among = descending[: draw.top_k[row] or None]
    enough = int(np.searchsorted(np.cumsum(among), draw.top_p[row] * among.sum() * (1 - 1e-6)))
    least = max(float(among[min(enough, len(among) - 1)]), float(draw.min_p[row]))
    kept = np.where(weights >= least * 0.98, weights, 0.0)  # one at the edge may have been cut or not
    ends = np.cumsum(kept) / kept.sum()
    return float(ends[token] - kept[token] / kept.sum()), float(ends[token])


@pytest.mark.parametrize("vocab", [512, 128256])
def test_the_gpu_draws_what_the_cpu_draws(vocab: int, tmp_path: Path) -> None:
    check_installed("cuda")
    path, rows = tmp_path / graph.SAMPLER, 64
    graph.write_whole(sampler.sampling_graph(vocab), path)
    draw = draws(rows)
    feeds: dict[str, Any] = {"logits": np.random.default_rng(1).normal(0, 3, (rows, vocab)).astype(np.float32)}
    feeds |= {name: getattr(draw, name) for name in sampler.INPUTS}
    answers = []
    for provider in ("CUDAExecutionProvider", "CPUExecutionProvider"):
        session = ort.InferenceSession(path, providers=[provider], enable_fallback=0)
        assert session.get_providers()[0] == provider
        answers.append(session.run(["tokens", "logprobs"], feeds))
    (tokens, logprobs), (expected, expected_logprobs) = answers
    sure = (draw.temperature == 0) | (draw.forced >= 0)
    same = tokens == expected
    assert sure.any()
    assert same[sure].all()
    assert same.mean() >= 0.95, f"rows {np.flatnonzero(~same)} differ"  # a sum's rounding decides a few at the edges
    np.testing.assert_allclose(logprobs[same], expected_logprobs[same], atol=1e-4)


def distribution(engine: GpuEngine, slot: int, token: int, length: int) -> npt.NDArray[np.float64]:
    """Log-probabilities [vocab] after `token`, which is the last of the `length` in `slot`: one forced row for each."""
    found = []
    for begin in range(0, engine.vocab_size, 64):
        forced = Draw.force(np.arange(begin, begin + 64, dtype=np.int64))
        ids, lengths, rows = np.array([[token]], np.int64), np.array([length], np.int32), np.zeros(64, np.int64)
        found.append(engine.step(Batch(slot, ids, lengths, rows, forced))[1])
    return np.concatenate(found).astype(np.float64)


def test_the_engine_draws_from_its_own_distribution(loaded: "Loaded") -> None:
    engine, prompts = loaded.engine, loaded.prompts
    last = np.array([[prompt[-1]] for prompt in prompts], np.int64)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for slot, prompt in enumerate(prompts):
        before, no_rows = np.array([prompt[:-1]], np.int64), np.zeros(0, np.int64)
        engine.step(Batch(slot, before, np.array([len(prompt) - 1], np.int32), no_rows, Draw.greedy(0)))
    known = [distribution(engine, slot, prompt[-1], len(prompt)) for slot, prompt in enumerate(prompts)]
    assert all(abs(np.exp(logprobs).sum() - 1) < 1e-2 for logprobs in known)
    carried, drawn = CARRIED[loaded.exported.precision], 0
    for seed in range(6):
        draw = draws(len(prompts), seed)
        tokens, _ = engine.step(Batch(0, last, lengths, np.arange(len(prompts), dtype=np.int64), draw))
        for row, token in enumerate(tokens.tolist()):
            if draw.forced[row] >= 0:
                assert token == draw.forced[row]
            elif draw.temperature[row] == 0:
                assert known[row].max() - known[row][token] < carried * 10
            else:
                begin, end = place(known[row], draw, row, token)
                assert begin - carried <= draw.uniform[row] <= end + carried
                drawn += 1
    assert drawn > 20
