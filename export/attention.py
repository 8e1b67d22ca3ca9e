"""How a model's attention and cache are spoken to an engine.

transformers dispatches attention by name and sends every cache write through `Cache.update`. Both are taken over here, so
that the traced graph holds the operators that the runtime is fast at, whatever the model:

* fused: `com.microsoft::GroupQueryAttention`, which appends to the KV slot itself. For causal and sliding-window attention
  over a layer's own keys and values.
* explicit: `TensorScatter` into the slot, then the model's own attention (or a plain one) under an additive mask. For all
  the rest: ALiBi, chunked windows, latent attention, models that do not dispatch.

Which of the two serves a layer is not guessed from a configuration: `survey` runs the model once and watches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from export.errors import UnsupportedModel

NAME = "engineshed"
"""The `attn_implementation` under which attention and masks are registered with transformers."""

LATER_DOMAIN = "onnx24"
"""Stands for ONNX's own domain in operators younger than the opset that is traced; `graph.tidy` puts the right one."""

WHOLE = -1
"""The window of a layer that sees its whole past (GroupQueryAttention's `local_window_size` uses the same value)."""

_PROBES = (0, 1, 2, 3, 5, 8, 13, 34, 100, 255, 1000, 4095, 20_000, 200_000)
"""Query positions at which a mask is sampled to learn its shape; windows up to 200,000 positions are seen."""


@dataclass(frozen=True)
class Layer:
    """One layer's KV geometry, as the model itself showed it."""

    index: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    """Positions a query sees, `WHOLE` for all, None where only an explicit mask says it."""

    @property
    def fused(self) -> bool:
        """GroupQueryAttention can serve this layer."""
        return self.window is not None


@dataclass
class Step:
    """The tensors of one step that attention needs, beside the layers' buffers."""

    position_ids: torch.Tensor
    """[batch, seq] int64: where each new token stands in its slot."""
    kv_lengths: torch.Tensor
    """[batch] int32: rows that are valid in each slot once the new tokens are written."""
    kv_range: torch.Tensor
    """[longest] int64: 0, 1, ... up to the longest of `kv_lengths`; its shape carries the length that masks need."""


@dataclass
class SlotCache(Cache):
    """The graph's KV inputs; what the layers write becomes the graph's KV outputs.

    With `plan` empty every layer is explicit and unseen buffers are created, which is how `survey` runs.
    """

    step: Step
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    plan: dict[int, Layer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(layers=[])
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: list[tuple[torch.Tensor, int | None]] = []
        self.windows: dict[int, int | None] = {}

    # What models ask of a cache ------------------------------------------------------------------------------------

    def update(  # type: ignore[override]
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new keys and values [batch, kv_heads, seq, dim]; return what its attention should read."""
        if key.dim() != 4 or value.dim() != 4:
            raise UnsupportedModel(
                f"layer {layer_idx} caches a tensor of {key.dim()} dimensions; a KV slot holds [heads, length, dim]"
            )
        if layer_idx in self.plan and self.plan[layer_idx].fused:
            self.written[layer_idx] = (key, value)
            return key, value
        new_key = self._scatter(self.keys.get(layer_idx), key)
        new_value = self._scatter(self.values.get(layer_idx), value)
        self.keys[layer_idx], self.values[layer_idx] = new_key, new_value
        longest = self.step.kv_range.shape[0]
        self.written[layer_idx] = (new_key[:, :, :longest], new_value[:, :, :longest])
        return self.written[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this step in the longest row. Models that want a row's own positions get `position_ids`."""
        return self.step.kv_range.shape[0] - self.step.position_ids.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that a mask covers, and the position of the first."""
        return self.step.kv_range.shape[0], 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """A slot's capacity is the runtime's affair."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """A slot's capacity is the runtime's affair."""
        return -1

    def _recurrent(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModel(
            "the model keeps a recurrent or convolutional state beside its keys and values (state-space or linear "
            "attention layers); the step contract holds keys and values only"
        )

    update_conv_state = update_recurrent_state = get_conv_state = get_recurrent_state = _recurrent
    update_indexer = has_previous_state = _recurrent

    def __len__(self) -> int:
        return len(self.plan) or len(self.keys)

    # What attention asks of it -------------------------------------------------------------------------------------

    def layer_of(self, key: torch.Tensor, value: torch.Tensor) -> int | None:
        """The layer whose `update` gave exactly these tensors, or None."""
        for index, (written_key, written_value) in self.written.items():
            if key is written_key and value is written_value:
                return index
        return None

    def mask(self, allowed: Callable[..., torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The additive mask [batch, 1, seq, longest] of transformers' index predicate, remembered with its window."""
        rows = torch.arange(self.step.position_ids.shape[0])[:, None, None, None]
        heads = torch.zeros(1, dtype=torch.int64)[None, :, None, None]
        queries = self.step.position_ids[:, None, :, None]
        keys = self.step.kv_range[None, None, None, :]
        seen = allowed(rows, heads, queries, keys)
        mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        mask = mask.expand(queries.shape[0], 1, queries.shape[2], keys.shape[3])
        self._masks.append((mask, None if self.plan else _window(allowed)))
        return mask

    def window_of(self, mask: torch.Tensor | None) -> int | None:
        """The window that a mask from `mask` stands for; None for a mask of another shape or origin."""
        if mask is None:
            return WHOLE
        return next((window for known, window in self._masks if known is mask), None)

    def causal(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask of a model that passes none to its attention."""
        return self.mask(lambda rows, heads, queries, keys: keys <= queries, dtype)

    def _scatter(self, past: torch.Tensor | None, update: torch.Tensor) -> torch.Tensor:
        if torch.onnx.is_in_onnx_export():
            assert past is not None
            return torch.onnx.ops.symbolic(
                f"{LATER_DOMAIN}::TensorScatter",
                (past, update, self.step.position_ids[:, 0]),
                {"axis": 2, "mode": "linear"},
                dtype=update.dtype,
                shape=past.shape,
                version=1,
            )
        batch, heads, _, dim = update.shape
        longest = self.step.kv_range.shape[0]
        new = update.new_zeros(batch, heads, longest, dim) if past is None else past.clone()
        new[torch.arange(batch)[:, None], :, self.step.position_ids] = update.transpose(1, 2)
        return new


def _window(allowed: Callable[..., torch.Tensor]) -> int | None:
    """The window of an index predicate: `WHOLE`, a number of positions, or None when it is neither."""
    windows = set()
    for query in _PROBES:
        keys = torch.arange(query + 3)
        zero = torch.zeros(1, dtype=torch.int64)
        try:
            seen = torch.broadcast_to(allowed(zero, zero, torch.tensor([query]), keys), keys.shape)
        except (IndexError, RuntimeError, TypeError):
            return None  # the predicate looks at this batch's data, so no fixed window says the same
        count = int(seen.sum())
        if count == 0 or not bool(seen[query + 1 - count : query + 1].all()):
            return None
        windows.add(WHOLE if count == query + 1 else count)
    if windows == {WHOLE}:
        return WHOLE
    windows.discard(WHOLE)
    (window, *others) = windows
    if others:
        return None
    # A query nearer to the start than the window sees everything; any further one exactly the window.
    return window if all((q + 1 > window) == (_count(allowed, q) < q + 1) for q in _PROBES) else None


def _count(allowed: Callable[..., torch.Tensor], query: int) -> int:
    zero = torch.zeros(1, dtype=torch.int64)
    return int(torch.broadcast_to(allowed(zero, zero, torch.tensor([query]), torch.arange(query + 1)), (query + 1,)).sum())


# The functions that transformers calls -----------------------------------------------------------------------------

_cache: SlotCache | None = None


@contextmanager
def speaking_to(cache: SlotCache) -> Iterator[None]:
    """While this lasts, attention named `NAME` reads and writes `cache`."""
    global _cache
    previous, _cache = _cache, cache
    try:
        yield
    finally:
        _cache = previous


def _current() -> SlotCache:
    if _cache is None:
        raise RuntimeError(f"attention {NAME!r} was called outside speaking_to()")
    return _cache


def _mask(*args: Any, mask_function: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return _current().mask(mask_function, dtype)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [batch, heads, seq, dim], out [batch, seq, heads, dim]."""
    cache = _current()
    layer = cache.layer_of(key, value)
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    bias = kwargs.get("position_bias")
    if layer is not None and layer in cache.plan and cache.plan[layer].fused:
        return _fused(cache, cache.plan[layer], query, key, value, scale, softcap, s_aux), None
    if layer is not None and not cache.plan:
        plain = bias is None and key.shape[-1] == value.shape[-1] and query.shape[-1] == key.shape[-1]
        fusable = plain and key.shape[-1] % 8 == 0 and query.shape[1] % key.shape[1] == 0 and layer not in cache.windows
        cache.windows[layer] = cache.window_of(attention_mask) if fusable else None
    if attention_mask is None and getattr(module, "is_causal", True):
        attention_mask = cache.causal(query.dtype)
    return _explicit(query, key, value, attention_mask, bias, scale, softcap, s_aux), None


def _fused(
    cache: SlotCache,
    layer: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, seq, dim = query.shape
    flat = [x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value)]
    past_key, past_value = cache.keys[layer.index], cache.values[layer.index]
    last = cache.step.kv_lengths - 1
    longest = cache.step.kv_lengths.max()
    unused: tuple[torch.Tensor | None, ...] = (None, None, None, None)  # cos, sin, position ids, attention bias
    sink_input = () if sinks is None else (*unused, sinks.reshape(-1))
    out, cache.keys[layer.index], cache.values[layer.index] = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*flat, past_key, past_value, last, longest, *sink_input),
        {
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "scale": scale,
            "do_rotary": 0,
            "local_window_size": layer.window if layer.window is not None else WHOLE,
            "softcap": float(softcap or 0.0),
        },
        dtypes=[query.dtype] * 3,
        shapes=[flat[0].shape, past_key.shape, past_value.shape],
        version=1,
    )
    return out.reshape(batch, seq, heads, dim)


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1).float(), dim=-1)[..., :-1].to(value.dtype)
    else:
        weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
