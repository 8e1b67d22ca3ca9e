"""The KV slots of one step as transformers' `Cache`, and what the model shows of itself through it.

Every write of keys and values goes through `Cache.update`, and every mask is made from the cache's sizes and an index
predicate. So one object sees each layer's heads, dimensions and window, without a configuration being read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from export.errors import UnsupportedModel

Dialect = Literal["onnxruntime", "tensorrt"]
"""Whose operators serve the layers that a fused operator can serve: see `attention`."""

LATER_DOMAIN = "onnx24"
"""Stands for ONNX's own domain in operators younger than the opset that is traced; `graph.tidy` puts the right one."""

WHOLE = -1
"""The window of a layer that sees its whole past (GroupQueryAttention's `local_window_size` uses the same value)."""

INDEXERS = 1000
"""Added to a layer's index to number the slot of its indexer's keys."""

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
        """A fused operator can serve this layer."""
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
    rope_lengths: torch.Tensor
    """[batch] int32: tokens that each row's position factors are chosen for, where these depend on it; no fewer than
    `kv_lengths`: a chunk of a prompt is computed as a part of the whole."""


class _NoLayers(list[Any]):
    """What stands for the list of a cache's layer objects: there are none, and a model that reaches for one is refused."""

    def __getitem__(self, index: Any) -> Any:
        raise UnsupportedModel(
            "the model reaches into its cache's layer objects, for a state of their own kind beside keys and values; the step "
            "contract holds keys and values only"
        )


@dataclass
class SlotCache(Cache):
    """The graph's KV inputs; what the layers write becomes the graph's KV outputs.

    With `plan` empty every layer is explicit and unseen buffers are created, which is how `survey` runs. With `one_row` the
    model sees the batch as one row of [batch * seq] tokens, one sequence after another, and only its attention tells them
    apart: for models that have one position for all rows of a column.
    """

    step: Step
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    plan: dict[int, Layer] = field(default_factory=dict)
    dialect: Dialect = "onnxruntime"
    one_row: bool = False

    def __post_init__(self) -> None:
        super().__init__(layers=_NoLayers())
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
        if self.dialect == "onnxruntime" and layer_idx in self.plan and self.plan[layer_idx].fused:
            self.written[layer_idx] = (key, value)
            return key, value
        key, value = self.by_row(key), self.by_row(value)
        new_key = self._scatter(self.keys.get(layer_idx), key)
        new_value = self._scatter(self.values.get(layer_idx), value)
        self.keys[layer_idx], self.values[layer_idx] = new_key, new_value
        longest = self.step.kv_range.shape[0]
        self.written[layer_idx] = (new_key[:, :, :longest], new_value[:, :, :longest])
        return self.written[layer_idx]

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Keys [batch, seq, dim] by which a layer selects what it attends to; they lie halved in a slot of their own."""
        first, second = indexer_key_states[:, None].chunk(2, dim=-1)
        return torch.cat(self.update(first, second, INDEXERS + layer_idx), dim=-1)[:, 0]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens before this step in the longest row. Models that want a row's own positions get `position_ids`.

        With `one_row`, what 0, 1, ... [batch * seq] is to be increased by to give each token's position, [batch * seq] int64.
        """
        if self.one_row:
            positions = self.step.position_ids.reshape(-1)
            return positions - torch.arange(positions.shape[0])
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
    has_previous_state = _recurrent

    def __len__(self) -> int:
        return len(self.plan) or len(self.keys)

    # What attention asks of it -------------------------------------------------------------------------------------

    def layer_of(self, key: torch.Tensor, value: torch.Tensor) -> int | None:
        """The layer whose `update` gave exactly these tensors, or None."""
        for index, (written_key, written_value) in self.written.items():
            if key is written_key and value is written_value:
                return index
        return None

    def by_row(self, states: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values as the model made them, as [batch, heads, seq, dim]."""
        if not self.one_row:
            return states
        batch, seq = self.step.position_ids.shape
        _, heads, _, dim = states.shape
        return states.transpose(1, 2).reshape(batch, seq, heads, dim).transpose(1, 2)

    def as_model(self, tokens: torch.Tensor) -> torch.Tensor:
        """Something for each token, [batch, seq, ...], in the form in which the model sees the batch."""
        return tokens.flatten(0, 1)[None] if self.one_row else tokens

    def of_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Something for each row, [batch], for each token as the model sees them."""
        return self.as_model(rows[:, None].expand(self.step.position_ids.shape))

    def longer_than(self, length: int) -> torch.Tensor:
        """Which tokens, as the model sees them, belong to a row that has more than `length` tokens once it is complete."""
        return self.of_tokens(self.step.rope_lengths > length)

    def visible(self, window: int) -> torch.Tensor:
        """Which keys a query sees through `window`: bool [batch, 1, seq, longest]."""
        queries, keys = self._axes()
        seen = keys <= queries
        return seen if window == WHOLE else seen & (keys > queries - window)

    def _axes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of queries [batch, 1, seq, 1] and of keys [1, 1, 1, longest]."""
        return self.step.position_ids[:, None, :, None], self.step.kv_range[None, None, None, :]

    def mask(self, allowed: Callable[..., torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The additive mask [batch, 1, seq, longest] of transformers' index predicate, remembered with its window."""
        rows = torch.arange(self.step.position_ids.shape[0])[:, None, None, None]
        heads = torch.zeros(1, dtype=torch.int64)[None, :, None, None]
        queries, keys = self._axes()
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
