"""Whether a model keeps to the step contract at every position, not only at those of a short prompt.

What a model computes may change with the position: windows, attention chunks, the length that it was first trained on, floors
of an attention temperature, the end of a table. A configuration names these lengths, so its numbers are where to look: rows
that end just before, at and past each of them, each in a batch with a short row, against the model's own pass over that row
alone.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from export.cache import SlotCache, Step
from export.errors import UnsupportedModel
from export.step import StepModule, Survey, plain_attention

_LENGTHS = re.compile(r"posit|window|chunk|length|floor|context|seq|local|max_|orig|topk|block|size_limit")
"""In the name of a configuration's field: its number may be a length in tokens."""
_AROUND = (0, 1, 5)
"""Rows end so many tokens past a length that was found."""
MAX_PROBED = 24
"""Lengths from a configuration that are looked at, at the most."""
MAX_WORK = 5e10
"""Weights times tokens up to which a row is computed from its first token; what stands before longer rows is made up."""
MAX_BYTES = 2 << 30
"""Of made-up keys and values."""
SHORT = 7
"""Tokens of the short row."""
NEW = 3
"""Tokens of the long row that are compared: two in a chunk, one in a decode step with the short row."""


def configured_lengths(config: Any, longest: int) -> tuple[int, ...]:
    """The numbers in `config` (a transformers configuration) that may be lengths in tokens, below `longest`, ascending."""
    found = {value for value in _numbers(config.to_dict(), "") if 1 < value < longest}
    return tuple(sorted(found))


def row_lengths(config: Any, longest: int) -> tuple[int, ...]:
    """Tokens of the rows that show whether anything changes at a length of `config`, ascending, and at the far end."""
    lengths = configured_lengths(config, longest)
    if len(lengths) > MAX_PROBED:  # the largest tell most: short prompts pass the others anyway
        lengths = lengths[-MAX_PROBED:]
    around = {length + more for length in lengths for more in _AROUND if SHORT < length + more <= longest}
    return tuple(sorted(around | ({longest} if longest > SHORT else set())))


@torch.no_grad()
def check(model: PreTrainedModel, seen: Survey, vocab: int, lengths: tuple[int, ...]) -> int:
    """Compare `model`'s steps with its own pass for rows of `lengths` tokens; the longest row that could be compared.

    Raises UnsupportedModel where two prompts of a length depart by more than rounding. Two, because experts or chosen keys
    may be tied, which rounding decides; another prompt has other ties. Rows whose past must be made up have to fit in
    `MAX_BYTES`.
    """
    looked = 0
    for length in within_memory(model, seen, lengths):
        whole = affordable(model, length)
        for seed in range(2):
            compare = _against_whole_pass if whole else _against_own_cache
            departed = compare(model, seen, prompts_of(vocab, length, seed))
            if departed is None or departed <= TOLERANCE:
                break
        else:
            raise UnsupportedModel(
                f"{type(model).__name__} gives other logits for a row of {length} tokens beside a short one than alone (by "
                f"{departed:.1e} of the largest): something in it depends on positions in a way that the step contract lacks. "
                f"--max-length {length - 1} or less may leave that out"
            )
        if departed is not None:
            looked = length
    return looked


def affordable(model: PreTrainedModel, length: int) -> bool:
    """Whether a row of `length` tokens may be computed from its first token."""
    return sum(parameter.numel() for parameter in model.parameters()) * length <= MAX_WORK


def within_memory(model: PreTrainedModel, seen: Survey, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """`lengths`, ascending; in place of those whose keys and values, three times over, pass `MAX_BYTES`, the longest that
    does not.
    """
    row_bytes = sum(4 * layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in seen.layers)
    longest = MAX_BYTES // (3 * row_bytes)
    kept = {length if length <= longest or affordable(model, length) else longest for length in lengths}
    return tuple(sorted(kept))


TOLERANCE = 1e-3
"""Of the largest logit, by which a step may depart from one plain pass; float32 rounding stays below a tenth of it."""


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """By how much `got` departs from `expected`, as a share of the largest expected value; NaN where either is."""
    return float((got - expected).abs().max() / (expected.abs().max() + 1e-6))


def _numbers(value: Any, name: str) -> Iterator[int]:
    """Integers of a configuration under names of lengths."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool) and _LENGTHS.search(name):
        yield value


def prompts_of(vocab: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A long row [length] and a short one [SHORT] of random tokens."""
    random = torch.Generator().manual_seed(1000 * length + seed)
    tokens = torch.randint(3 % vocab, vocab, (length + SHORT,), generator=random)
    return tokens[:length], tokens[length:]


class _Rows:
    """A long and a short row in two slots, computed step by step."""

    def __init__(self, model: PreTrainedModel, seen: Survey, capacity: int) -> None:
        self._module = StepModule(model, seen)
        shapes = {layer.index: (2, layer.kv_heads, capacity, layer.key_dim) for layer in seen.layers}
        self.keys = {index: torch.zeros(shape) for index, shape in shapes.items()}
        self.values = {x.index: torch.zeros(*shapes[x.index][:3], x.value_dim) for x in seen.layers}

    def step(self, first: int, tokens: torch.Tensor, ends: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
        """Logits [batch * seq, vocab] of `tokens` [batch, seq] in the slots from `first` on, which then hold `ends` tokens."""
        batch, seq = tokens.shape
        rows = slice(first, first + batch)
        kv_lengths = torch.tensor(ends, dtype=torch.int32)
        positions = kv_lengths[:, None].long() - seq + torch.arange(seq)
        step = Step(positions, kv_lengths, torch.arange(max(ends)), torch.tensor(lengths, dtype=torch.int32))
        keys, values = ({index: buffer[rows] for index, buffer in kind.items()} for kind in (self.keys, self.values))
        cache = SlotCache(step, keys, values, one_row=self._module.survey.one_row)
        logits = self._module.logits(tokens, cache)
        for index in self.keys:
            self.keys[index][rows], self.values[index][rows] = cache.keys[index], cache.values[index]
        return logits


def _compared(rows: _Rows, prompts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The logits [NEW + 1, vocab] of the long row's last `NEW` tokens and the short row's last; the rest is computed
    already.
    """
    long, short = prompts
    end, other = len(long), len(short)
    chunk = rows.step(0, long[None, -NEW:-1], (end - 1,), (end,))
    both = rows.step(0, torch.stack([long[-1:], short[-1:]]), (end, other), (end, other))
    return torch.cat([chunk, both])


def _against_whole_pass(model: PreTrainedModel, seen: Survey, prompts: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The difference to passes over each row as a whole."""
    long, short = prompts
    rows = _Rows(model, seen, len(long))
    rows.step(0, long[None, :-NEW], (len(long) - NEW,), (len(long),))
    rows.step(1, short[None, :-1], (len(short) - 1,), (len(short),))
    got = _compared(rows, prompts)
    with plain_attention(model):
        own = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in prompts]
    return difference(got, torch.cat([own[0][-NEW:], own[1][-1:]]))


def _against_own_cache(model: PreTrainedModel, seen: Survey, prompts: tuple[torch.Tensor, torch.Tensor]) -> float | None:
    """The difference to transformers' own decoding over the same made-up past; None where the model does not do that."""
    long, short = prompts
    rows = _Rows(model, seen, len(long))
    rows.step(1, short[None, :-1], (len(short) - 1,), (len(short),))
    own = own_logits(model, seen, prompts, rows.keys, rows.values)
    return None if own is None else difference(_compared(rows, prompts), own)


def own_logits(
    model: PreTrainedModel,
    seen: Survey,
    prompts: tuple[torch.Tensor, torch.Tensor],
    keys: dict[int, torch.Tensor],
    values: dict[int, torch.Tensor],
) -> torch.Tensor | None:
    """transformers' logits [NEW + 1, vocab] of the long row's last `NEW` tokens over a made-up past, and of the short one's
    last.

    The past is written into slot 0 of `keys` and `values`, by layer [slots, kv_heads, capacity, dim], as widely spread as what
    stands in slot 1. None where the model does not decode over such a past, in a cache of transformers' own.
    """
    long, short = prompts
    made = len(long) - NEW
    past, random = DynamicCache(), torch.Generator().manual_seed(len(long))
    for layer in seen.layers:
        if layer.index != len(past.layers):  # numbered otherwise than transformers' own caches are
            return None
        for buffers in (keys, values):
            filled, like = buffers[layer.index][0, :, :made], buffers[layer.index][1, :, : len(short) - 1]
            filled.normal_(0.0, max(float(like.std()), 1e-3), generator=random)
        past.update(keys[layer.index][:1, :, :made].clone(), values[layer.index][:1, :, :made].clone(), layer.index)
    places = {"position_ids": torch.arange(made, len(long))[None]} if StepModule(model, seen).accepts_positions else {}
    try:
        with plain_attention(model):
            own_long = model(input_ids=long[None, made:], past_key_values=past, use_cache=True, **places).logits[0].float()
            own_short = model(input_ids=short[None], use_cache=False).logits[0].float()
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # it wants a cache of its own
    return torch.cat([own_long, own_short[-1:]])
