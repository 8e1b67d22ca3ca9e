"""Whether a model keeps to the step contract at every position, not only at those of a short prompt.

What a model computes may change with the position: windows, attention chunks, the length that it was first trained on, floors
of an attention temperature, the end of a table. A configuration names these lengths, so its numbers are where to look: rows
that end just before, at and past each of them, each in a batch with a short row, against the model's own pass over that row
alone.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from export.cache import SlotCache, Step
from export.errors import UnsupportedModel
from export.limits import MIN_LENGTH
from export.step import StepModule, Survey, plain_attention

_LENGTHS = re.compile(r"posit|window|chunk|length|floor|context|seq|local|max_|orig|topk|block|size_limit")
"""In the name of a configuration's field: its number may be a length in tokens."""
_AROUND = (0, 1, 5)
"""Rows end so many tokens past a length that was found."""
MAX_PROBED = 24
"""Lengths from a configuration that are looked at, at the most."""
MAX_WORK = 5e10
"""Weights times tokens up to which a row is computed from its first token; what stands before longer rows is made up."""
MAX_PATIENCE = 5e12
"""The same where there is no making up, since the model does not decode over a cache of transformers' own."""
MAX_BYTES = 4 << 30
"""Of made-up keys and values, and of a pass's attention; half of what is available where that is less."""
_COPIES = 5
"""How often the made-up past is held at the same time: two slots, the step's copies of them, transformers' cache."""
SHORT = 7
"""Tokens of the short row."""
NEW = 3
"""Tokens of the long row that are compared: two in a chunk, one in a decode step with the short row."""


_Compare = Callable[[PreTrainedModel, Survey, tuple[torch.Tensor, torch.Tensor]], float | None]


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

    Rows that are too long to be computed as a whole are compared over a past that is made up, through the first layers only,
    so many that each kind of layer is among them: what changes with the position does not depend on how many follow. Raises
    UnsupportedModel where two prompts of a length depart by more than rounding. Two, because experts or chosen keys may be
    tied, which rounding decides; another prompt has other ties.
    """
    whole = tuple(length for length in lengths if affordable(model, length))
    looked = max((length for length in whole if _agrees(_against_whole_pass, model, seen, vocab, length)), default=0)
    with first_layers(model, seen) as (short, form):
        for length in within_memory(form, tuple(length for length in lengths if length not in whole)):
            if _agrees(_against_own_cache, short, form, vocab, length):
                looked = max(looked, length)
    rest = (length for length in lengths if length > looked and affordable(model, length, MAX_PATIENCE))
    return max([looked, *(length for length in rest if _agrees(_against_whole_pass, model, seen, vocab, length))])


def _agrees(compare: _Compare, model: PreTrainedModel, seen: Survey, vocab: int, length: int) -> bool:
    """Whether a row of `length` tokens could be compared; raises UnsupportedModel where it departs."""
    departed: float | None = 0.0
    for seed in range(2):
        departed = compare(model, seen, prompts_of(vocab, length, seed))
        if departed is None or departed <= TOLERANCE:
            return departed is not None
    advice = f". --max-length {length - 1} or less may leave that out" if length > MIN_LENGTH else ""
    raise UnsupportedModel(
        f"{type(model).__name__} gives other logits for a row of {length} tokens beside a short one than alone (by "
        f"{departed:.1e} of the largest): something in it depends on positions in a way that the step contract lacks{advice}"
    )


@contextmanager
def first_layers(model: PreTrainedModel, seen: Survey) -> Iterator[tuple[PreTrainedModel, Survey]]:
    """While this lasts, `model` has only its first layers, as many as show every kind; and what the survey saw of these.

    A model whose layers are not one list, in which a layer has the number of its cache, stays as it is.
    """
    found = [
        (parent, name, layers)
        for parent in model.modules()
        for name, layers in parent.named_children()
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == len(seen.layers)
    ]
    if len(found) != 1 or [layer.index for layer in seen.layers] != list(range(len(seen.layers))):
        yield model, seen
        return
    (parent, name, layers), *_ = found
    kinds = [_kind(layer) for layer in layers]
    count = 1 + max(kinds.index(kind) for kind in set(kinds))
    try:
        setattr(parent, name, torch.nn.ModuleList(list(layers)[:count]))
        yield model, replace(seen, layers=seen.layers[:count])
    finally:
        setattr(parent, name, layers)


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What tells a layer from one of another kind: its parts, their switches and numbers, but for its place in the model."""
    return tuple(
        (name, type(part).__name__, key, value)
        for name, part in layer.named_modules()
        for key, value in sorted(vars(part).items())
        if isinstance(value, bool | int | float | str) and key not in ("layer_idx", "layer_id", "idx")
    )


def affordable(model: PreTrainedModel, length: int, work: float | None = None) -> bool:
    """Whether a row of `length` tokens may be computed from its first token, by its attention's memory and its work: weights
    times tokens, at most `work`, `MAX_WORK` if nothing is said.
    """
    scores = 4 * 4 * _heads(model.config.get_text_config(decoder=True)) * length**2
    most = MAX_WORK if work is None else work
    return sum(parameter.numel() for parameter in model.parameters()) * length <= most and scores <= _room() / 4


def _heads(config: PreTrainedConfig) -> int:
    """Query heads of a layer, of the layer that has the most where they differ."""
    layers = config.per_layer_config if config.is_heterogeneous else [config]
    counts = [getattr(layer, "num_attention_heads", None) for layer in layers]
    return max([count for count in counts if isinstance(count, int)], default=_USUAL_HEADS)


def within_memory(seen: Survey, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """`lengths`, ascending; in place of those whose made-up past would take too much memory, the longest that does not."""
    row_bytes = sum(4 * layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in seen.layers)
    longest = int(_room() / (_COPIES * row_bytes))
    return tuple(sorted({min(length, longest) for length in lengths}))


def _room() -> float:
    """Bytes that a comparison may take."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return MAX_BYTES
    available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 2 * MAX_BYTES)
    return min(MAX_BYTES, available / 2)


_USUAL_HEADS = 32
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
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        return None  # it wants a cache of its own
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise
        return None
    return torch.cat([own_long, own_short[-1:]])
