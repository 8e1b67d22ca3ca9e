"""Learning a model by running it: geometry, windows and position tables, and whether it keeps to the step contract.

A few eager passes over short prompts, before anything is traced. What is learned is what the model did, not what its
configuration says; a model that cannot decode in steps is refused here, with the reason.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from export import positions
from export.cache import Layer, SlotCache, Step
from export.errors import UnsupportedModel
from export.limits import MIN_LENGTH, UNKNOWN_LENGTH
from export.positions import TOLERANCE, difference
from export.rotary import length_boundaries
from export.step import StepModule, Survey, in_words, prepare

_LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""Names under which configurations say how many positions there are, the most usual first."""
PROBE_TOKENS = 11
"""Length of the survey's prompt: longer than any convolution kernel, prime so that no reshape fits by accident."""

_STEPS = (((0, 6), (0, 6)), ((6, 9), (4, 7)), ((9, 10), (7, 8)), ((10, 11), (8, 9)))
"""Positions [start, end) of two rows' tokens in each step that is checked: a chunk each, a ragged chunk in which the second
row writes over positions that it gives up (as rejected guesses do), and two decode steps."""


def probe_tokens(vocab: int, length: int = PROBE_TOKENS) -> torch.Tensor:
    """A prompt [1, length] int64 that no position table would be indexed by: its steps are not all one."""
    return (torch.arange(length) ** 2 * 7 + 3)[None] % vocab


@torch.no_grad()
def survey(model: PreTrainedModel, longest: int | None = None) -> Survey:
    """Run `model` on short prompts and note every layer's KV geometry, window and position tables.

    `longest` is how many tokens a row will have at most; None takes the configuration's number. Raises UnsupportedModel when
    the model does not keep to the step contract: no KV cache, a recurrent state, or other logits in steps than its own plain
    forward pass gives, near the start or where its configuration says that something changes.
    """
    name = type(model).__name__
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    prompts = probe_tokens(vocab, 2 * PROBE_TOKENS).reshape(2, PROBE_TOKENS)
    tables: dict[str, int] = {}
    with watching_tables(model, tables):
        plain = [_plain(model, prompt) for prompt in prompts]
    padded = _padded(model, prompts[0])
    padded_plain = None if padded is None else _plain(model, padded)
    prepare(model)
    places = torch.arange(PROBE_TOKENS)
    length = torch.tensor([PROBE_TOKENS], dtype=torch.int32)
    cache = SlotCache(Step(places[None], length, places, length))
    got = StepModule(model, Survey([], tables)).logits(prompts[:1], cache)
    if not cache.keys:
        raise UnsupportedModel(f"{name} wrote no keys and values to its cache, so it cannot decode in steps")
    if not (departed := difference(got, plain[0])) <= TOLERANCE:  # so that NaN does not pass
        raise UnsupportedModel(
            f"{name} gives other logits through a cache than without one (by {departed:.1e} of the largest); it does "
            "something with its cache that the step contract lacks"
        )
    layers = [
        Layer(i, key.shape[1], key.shape[3], cache.values[i].shape[3], cache.windows.get(i))
        for i, key in sorted(cache.keys.items())
    ]
    limit = _limit(model, tables, longest)
    kept = _kept(model, Survey(layers, tables, length_boundaries(model), max_length=limit), prompts, plain)
    if padded is not None and padded_plain is not None:
        counted = StepModule(model, kept).logits(padded[None], SlotCache(Step(places[None], length, places, length)))
        if not difference(counted, padded_plain) <= TOLERANCE:
            kept = replace(kept, padding=int(model.config.get_text_config(decoder=True).pad_token_id))
    return _within_what_was_compared(model, kept, asked=longest is not None)


def _padded(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor | None:
    """`prompt` with the model's padding token in it; None where the model has none."""
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    if not isinstance(padding, int) or not 0 <= padding < int(model.get_input_embeddings().weight.shape[0]):  # type: ignore[index]
        return None
    padded = prompt.clone()
    padded[len(prompt) // 2] = padding
    return padded


def _limit(model: PreTrainedModel, tables: dict[str, int], asked: int | None) -> int:
    """Positions that rows may have: those `asked` for, else what the configuration says, and no more than there are."""
    config = model.config.get_text_config(decoder=True)
    names = ((name, length) for name in _LIMITS if isinstance(length := getattr(config, name, None), int))
    name, named = next(names, ("", None))
    if named is not None and named < 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {named} positions by its config.json ({name}); the number that it was made for "
            "belongs there"
        )
    ends = [*_table_ends(model, tables), *([int(named)] if named else [])]
    if asked is not None and asked > min(ends, default=asked):
        raise UnsupportedModel(
            f"{type(model).__name__} was made for {min(ends)} positions; --max-length {asked} is more. Where its authors say "
            "how to reach further, put that into its config.json first"
        )
    limit = asked or min(ends, default=UNKNOWN_LENGTH)
    if limit < MIN_LENGTH:
        raise UnsupportedModel(
            f"{type(model).__name__} has {limit} positions, fewer than an engine is verified with ({MIN_LENGTH}); if it was "
            "made for more, its config.json has to say so"
        )
    return limit


def _table_ends(model: PreTrainedModel, tables: dict[str, int]) -> list[int]:
    """Positions that each position table has a row for: those behind its offset."""
    return [int(operator.attrgetter(name)(model).shape[0]) - offset for name, offset in tables.items()]


def _within_what_was_compared(model: PreTrainedModel, seen: Survey, *, asked: bool) -> Survey:
    """`seen`, which takes no row past a length of the configuration that could not be looked at here, unless so `asked`."""
    named = positions.configured_lengths(model.config.get_text_config(decoder=True), seen.max_length)
    beyond = [length for length in named if length > seen.checked_length]
    if not beyond:
        return seen
    if asked:
        return replace(seen, named_beyond=beyond[0])
    if seen.checked_length < MIN_LENGTH:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be compared with its own pass in long rows here, and its configuration names "
            f"{beyond[0]} tokens, where something may change; --max-length says up to which length it is exported all the same"
        )
    return replace(seen, max_length=seen.checked_length, named_beyond=beyond[0])


def _kept(model: PreTrainedModel, seen: Survey, prompts: torch.Tensor, plain: list[torch.Tensor]) -> Survey:
    """`seen`, in the form in which the model's steps are its own passes at all positions; raises UnsupportedModel.

    Most models take a batch as it is. One that has a single position for all rows of a column gets the batch as one row.
    """
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    lengths = positions.row_lengths(model.config.get_text_config(decoder=True), seen.max_length)
    refusals: list[UnsupportedModel] = []
    for one_row in (False, True):
        form = replace(seen, one_row=one_row)
        try:
            _check_steps(model, form, prompts, plain)
            return replace(form, checked_length=positions.check(model, form, vocab, lengths))
        except UnsupportedModel as error:
            refusals.append(error)
    raise refusals[0]


def _plain(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    """Logits [len(prompt), vocab] of one pass without a cache."""
    try:
        logits: torch.Tensor = model(input_ids=prompt[None], use_cache=False).logits
    except Exception as error:
        raise UnsupportedModel(f"{type(model).__name__} does not run on tokens alone: {in_words(error)}") from error
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
        places = torch.stack([torch.arange(*row) for row in rows])
        lengths = torch.tensor([end for _, end in rows], dtype=torch.int32)
        step = Step(places, lengths, torch.arange(int(lengths.max())), lengths)
        cache = SlotCache(step, keys, values, one_row=seen.one_row)
        got = module.logits(prompts.gather(1, places), cache)
        expected = torch.cat([logits[start:end] for logits, (start, end) in zip(plain, rows, strict=True)])
        if not (departed := difference(got, expected)) <= TOLERANCE:
            raise UnsupportedModel(
                f"{type(model).__name__} gives other logits in steps of several rows than in one pass (by {departed:.1e} of "
                "the largest); it reads more of its past than positions, mask and cache carry"
            )


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
