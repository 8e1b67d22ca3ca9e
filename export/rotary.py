"""Rotary position factors that depend on a row's length, chosen for each row by its own.

transformers recomputes some factors in the forward pass (`modeling_rope_utils.dynamic_rope_update`) by the largest position of
the call. A call is one prompt there; here it may be one chunk of a prompt, or the decode step of a whole batch. So such a
module is replaced: of "longrope" both sets of factors are computed, and each row takes the one of its own length; "dynamic"
keeps the factors that hold up to the length that the model was made for, which no slot exceeds.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from transformers import modeling_rope_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Rows(Protocol):
    """The rows of a pass, each of its own length."""

    def longer_than(self, length: int) -> torch.Tensor:
        """Which tokens belong to a row longer than `length`: bool, [batch, seq] as the model sees them, or [batch, 1]."""
        ...


Current = Callable[[], Rows | None]
"""Gives the rows of the pass that is under way; None while the model runs as transformers wrote it."""


class RotaryByRow(torch.nn.Module):
    """`rotary`, a module whose forward pass chooses factors by length, with a choice for each row."""

    def __init__(self, rotary: torch.nn.Module, current: Current) -> None:
        super().__init__()
        self.rotary = rotary
        self._current = current
        self._forward = inspect.unwrap(type(rotary).forward)
        self._boundaries = {kind: _original_length(rotary, kind) for kind in _kinds(rotary, "longrope")}
        self.short, self.long = _with_factors(rotary, long=False), _with_factors(rotary, long=True)

    def __getattr__(self, name: str) -> Any:
        """What the model reads of the module that stood here, as its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rotary"), name)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The lengths past which other factors are in force."""
        return tuple(sorted(set(self._boundaries.values())))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """The module's own outputs, each [batch, seq, ...], by the lengths of the rows."""
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        rows = self._current()
        if rows is None:
            return self.rotary(x, position_ids, **kwargs)
        short = self._forward(self.short, x, position_ids, **kwargs)
        boundary = self._boundaries.get(layer_type)
        if boundary is None:
            return short
        long = self._forward(self.long, x, position_ids, **kwargs)
        past = rows.longer_than(boundary)
        if isinstance(short, torch.Tensor):
            return _choose(past, long, short)
        return tuple(_choose(past, *pair) for pair in zip(long, short, strict=True))


def choose_by_row(model: torch.nn.Module, current: Current) -> None:
    """Put a `RotaryByRow` in the place of each module of `model` that chooses its factors by length."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, RotaryByRow)
        for name, child in parent.named_children()
        if _by_length(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, RotaryByRow(child, current))


def length_boundaries(model: torch.nn.Module) -> tuple[int, ...]:
    """The row lengths past which `model`, prepared by `choose_by_row`, computes every position in another way, ascending."""
    found = (module for module in model.modules() if isinstance(module, RotaryByRow))
    return tuple(sorted({boundary for module in found for boundary in module.boundaries}))


def _by_length(module: torch.nn.Module) -> bool:
    if not hasattr(module, "rope_type") or not _decorated(type(module).forward):
        return False
    return bool(_kinds(module, "longrope")) or bool(_kinds(module, "dynamic"))


def _decorated(forward: Any) -> bool:
    """Whether `modeling_rope_utils` stands around `forward`, as it does where factors are recomputed."""
    while forward is not None:
        if getattr(forward, "__globals__", {}).get("__name__") == modeling_rope_utils.__name__:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _kinds(rotary: Any, rope_type: str) -> list[str | None]:
    """The layer types whose factors are of `rope_type`; None stands for all layers of a model that has no types."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    return [kind for kind, value in kinds.items() if rope_type in value]


def _original_length(rotary: Any, kind: str | None) -> int:
    parameters = rotary.config.rope_parameters
    return int((parameters if kind is None else parameters[kind])["original_max_position_embeddings"])


def _with_factors(rotary: Any, *, long: bool) -> torch.nn.Module:
    """`rotary` with the factors that hold for short rows, or for those longer than what it was trained on first."""
    made: torch.nn.Module = copy.copy(rotary)
    made._buffers = dict(rotary._buffers)
    for kind, name in _frequencies(rotary):
        if long and kind in _kinds(rotary, "longrope"):
            length = _original_length(rotary, kind) + 1
            chosen, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, torch.device("cpu"), seq_len=length, layer_type=kind)
        else:
            chosen = getattr(rotary, name.removesuffix("inv_freq") + "original_inv_freq")
        made._buffers[name] = chosen.clone()
    return made


def _frequencies(rotary: Any) -> Iterator[tuple[str | None, str]]:
    """Each layer type of `rotary` with the name of the buffer that holds its inverse frequencies."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else [None]
    for kind in kinds:
        name = "inv_freq" if kind is None else f"{kind}_inv_freq"
        if name in rotary._buffers:
            yield kind, name


def _choose(past: torch.Tensor, long: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
    """`long` where `past` [batch, seq], else `short`; both [batch, seq, ...]."""
    if short.is_complex():  # of which ONNX knows no choice
        return torch.view_as_complex(_choose(past, torch.view_as_real(long), torch.view_as_real(short)))
    return torch.where(past.reshape(*past.shape, *[1] * (long.dim() - 2)), long, short)
