"""How a model's attention and cache are spoken to an engine.

transformers dispatches attention by name and sends every cache write through `Cache.update`. Both are taken over here, so
that the traced graph holds the operators that the runtime is fast at, whatever the model:

* fused, for causal and sliding-window attention over a layer's own keys and values: to ONNX Runtime
  `com.microsoft::GroupQueryAttention`, which appends to the KV slot itself; to TensorRT `TensorScatter` into the slot, which it
  does in place, then `Attention` under a mask of truth values.
* explicit: `TensorScatter` into the slot, then the model's own attention (or a plain one) under an additive mask. For all
  the rest: ALiBi, chunked windows, latent attention, models that do not dispatch.

Which of the two serves a layer is not guessed from a configuration: `survey` runs the model once and watches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from export.cache import LATER_DOMAIN, WHOLE, Layer, SlotCache
from export.errors import UnsupportedModel

NAME = "engineshed"
"""The `attn_implementation` under which attention and masks are registered with transformers."""

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


def current() -> SlotCache | None:
    """The cache that attention named `NAME` reads and writes; None outside `speaking_to`."""
    return _cache


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
    query = cache.by_row(query)
    if layer is None or (cache.dialect == "onnxruntime" and layer in cache.plan and cache.plan[layer].fused):
        key, value = cache.by_row(key), cache.by_row(value)  # else they are the slots' own
    return cache.as_model(
        _attend(cache, layer, module, query, key, value, attention_mask, scaling, softcap, s_aux, kwargs)
    ), None


def _attend(
    cache: SlotCache,
    layer: int | None,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """What the rows' own queries [batch, heads, seq, dim] see: [batch, seq, heads, dim]."""
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    bias, chosen = kwargs.get("position_bias"), kwargs.get("indices")
    causal = getattr(module, "is_causal", True)
    if layer is not None and layer in cache.plan and cache.plan[layer].fused:
        if cache.dialect == "onnxruntime":
            return _fused(cache, cache.plan[layer], query, key, value, scale, softcap, s_aux)
        if not softcap and s_aux is None:  # for which TensorRT's attention has no place
            return _masked(cache, cache.plan[layer], query, key, value, scale)
    if layer is not None and not cache.plan:
        plain = bias is None and chosen is None and (causal or attention_mask is not None) and layer not in cache.windows
        even = query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[1] % key.shape[1] == 0
        fusable = plain and even and key.shape[-1] % 8 == 0
        cache.windows[layer] = cache.window_of(attention_mask) if fusable else None
    if attention_mask is None and causal:
        attention_mask = cache.causal(query.dtype)
    if chosen is not None:
        attention_mask = _only(chosen, attention_mask)
    return _explicit(query, key, value, attention_mask, bias, scale, softcap, s_aux)


def _only(chosen: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`mask` [batch, 1, seq, keys] with all keys hidden but those whose indices are in `chosen` [batch, seq, count]."""
    if mask is None:
        raise UnsupportedModel("attention to chosen keys comes without a mask, so the number of keys is not known")
    hidden = torch.full_like(mask[:, 0], torch.finfo(mask.dtype).min).scatter(-1, chosen.long(), 0.0)
    return torch.minimum(mask, hidden[:, None])


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


def _masked(
    cache: SlotCache, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """`Attention` over the whole slot, as `cache.update` gave it, under the layer's window."""
    assert layer.window is not None
    out = torch.onnx.ops.symbolic(
        f"{LATER_DOMAIN}::Attention",
        (query, key, value, cache.visible(layer.window)),
        {"is_causal": 0, "scale": scale},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )
    return out.transpose(1, 2)


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
    return torch.matmul(weights, value).transpose(1, 2).contiguous()  # models view it


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
