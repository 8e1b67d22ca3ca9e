"""Learning a model by running it: geometry, windows and position tables, and whether it keeps to the step contract.

A few eager passes over short prompts, before anything is traced. What is learned is what the model did, not what its
configuration says; a model that cannot decode in steps is refused here, with the reason.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from export.cache import Layer, SlotCache, Step
from export.errors import UnsupportedModel
from export.step import StepModule, Survey, prepare

PROBE_TOKENS = 11
"""Length of the survey's prompt: longer than any convolution kernel, prime so that no reshape fits by accident."""

_TOLERANCE = 1e-3
"""Of the largest logit, by which a step may depart from one plain pass; float32 rounding stays below a tenth of it."""

_STEPS = (((0, 6), (0, 6)), ((6, 9), (4, 7)), ((9, 10), (7, 8)), ((10, 11), (8, 9)))
"""Positions [start, end) of two rows' tokens in each step that is checked: a chunk each, a ragged chunk in which the second
row writes over positions that it gives up (as rejected guesses do), and two decode steps."""


def probe_tokens(vocab: int, length: int = PROBE_TOKENS) -> torch.Tensor:
    """A prompt [1, length] int64 that no position table would be indexed by: its steps are not all one."""
    return (torch.arange(length) ** 2 * 7 + 3)[None] % vocab


@torch.no_grad()
def survey(model: PreTrainedModel) -> Survey:
    """Run `model` on short prompts and note every layer's KV geometry, window and position tables.

    Raises UnsupportedModel when the model does not keep to the step contract: no KV cache, a recurrent state, or other
    logits in steps than its own plain forward pass gives.
    """
    name = type(model).__name__
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    prompts = probe_tokens(vocab, 2 * PROBE_TOKENS).reshape(2, PROBE_TOKENS)
    tables: dict[str, int] = {}
    with watching_tables(model, tables):
        plain = [_plain(model, prompt) for prompt in prompts]
    prepare(model)
    positions = torch.arange(PROBE_TOKENS)
    cache = SlotCache(Step(positions[None], torch.tensor([PROBE_TOKENS], dtype=torch.int32), positions))
    got = _run(StepModule(model, Survey([], tables)), prompts[:1], cache)
    if not cache.keys:
        raise UnsupportedModel(f"{name} wrote no keys and values to its cache, so it cannot decode in steps")
    if not (difference := _difference(got, plain[0])) <= _TOLERANCE:  # so that NaN does not pass
        raise UnsupportedModel(
            f"{name} gives other logits through a cache than without one (by {difference:.1e} of the largest); it does "
            "something with its cache that the step contract lacks"
        )
    layers = [
        Layer(i, key.shape[1], key.shape[3], cache.values[i].shape[3], cache.windows.get(i))
        for i, key in sorted(cache.keys.items())
    ]
    seen = Survey(layers, tables)
    _check_steps(model, seen, prompts, plain)
    return seen


def _plain(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    """Logits [len(prompt), vocab] of one pass without a cache."""
    try:
        logits: torch.Tensor = model(input_ids=prompt[None], use_cache=False).logits
    except Exception as error:
        raise UnsupportedModel(f"{type(model).__name__} does not run on tokens alone: {_words(error)}") from error
    if logits.shape[:2] != (1, len(prompt)):
        raise UnsupportedModel(
            f"{type(model).__name__} gives logits {list(logits.shape)} for {len(prompt)} tokens, not one row for each of them"
        )
    return logits[0].float()


def _check_steps(model: PreTrainedModel, seen: Survey, prompts: torch.Tensor, plain: list[torch.Tensor]) -> None:
    module = StepModule(model, seen)
    keys = {x.index: torch.full((2, x.kv_heads, PROBE_TOKENS, x.key_dim), 7.0, dtype=model.dtype) for x in seen.layers}
    values = {x.index: torch.full((2, x.kv_heads, PROBE_TOKENS, x.value_dim), 7.0, dtype=model.dtype) for x in seen.layers}
    for rows in _STEPS:
        positions = torch.stack([torch.arange(*row) for row in rows])
        lengths = torch.tensor([end for _, end in rows], dtype=torch.int32)
        cache = SlotCache(Step(positions, lengths, torch.arange(int(lengths.max()))), keys, values)
        got = _run(module, prompts.gather(1, positions), cache)
        expected = torch.cat([logits[start:end] for logits, (start, end) in zip(plain, rows, strict=True)])
        if not (difference := _difference(got, expected)) <= _TOLERANCE:
            raise UnsupportedModel(
                f"{type(model).__name__} gives other logits in steps of several rows than in one pass (by {difference:.1e} of "
                "the largest); it reads more of its past than positions, mask and cache carry"
            )


def _run(module: StepModule, tokens: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """The logits of all `tokens`."""
    try:
        return module.run(tokens, cache, torch.arange(tokens.numel()))
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{type(module.model).__name__} does not run on a cache of keys and values in slots: {_words(error)}"
        ) from error


def _words(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / (expected.abs().max() + 1e-6))


@contextmanager
def watching_tables(model: PreTrainedModel, tables: dict[str, int]) -> Iterator[None]:
    """While this lasts, a pass over `PROBE_TOKENS` tokens notes in `tables` which weights it indexes by position plus what."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    original = torch.nn.functional.embedding
    positions = torch.arange(PROBE_TOKENS)

    def embedding(input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        flat = input.reshape(-1)
        if id(weight) in names and flat.shape[0] == PROBE_TOKENS and bool((flat - flat[0] == positions).all()):
            tables[names[id(weight)]] = int(flat[0])
        return original(input, weight, *args, **kwargs)

    torch.nn.functional.embedding = embedding
    try:
        yield
    finally:
        torch.nn.functional.embedding = original
