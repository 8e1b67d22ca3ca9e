"""A model's forward pass as one step: new tokens in, logits of chosen rows and updated KV slots out."""

import copy
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from export.attention import NAME, current, speaking_to
from export.cache import Dialect, Layer, SlotCache, Step
from export.errors import ExportError, UnsupportedModel
from export.rotary import choose_by_row


@dataclass
class Survey:
    """What one eager pass showed of a model."""

    layers: list[Layer]
    tables: dict[str, int] = field(default_factory=dict)
    """Position tables by the name of their weight: embeddings that were indexed by position plus this offset."""
    length_boundaries: tuple[int, ...] = ()
    """Row lengths past which every position is computed in another way, ascending."""
    one_row: bool = False
    """The model sees the batch as one row; see `SlotCache`."""
    max_length: int = 0
    """Positions that the model has: its configuration's number, and no more than its position tables hold."""
    checked_length: int = 0
    """Tokens of the longest row whose steps were compared with the model's own pass."""
    named_beyond: int | None = None
    """A length of the configuration that could not be compared; `max_length` ends before it unless more was asked for."""
    padding: int | None = None
    """The token that the model takes for padding wherever it stands, and does not count in the positions that follow it."""


class StepModule(torch.nn.Module):
    """`model` as the step contract wants it; see docs/design.md for the contract's inputs and outputs."""

    def __init__(self, model: PreTrainedModel, survey: Survey, dialect: Dialect = "onnxruntime") -> None:
        super().__init__()
        self.dialect = dialect
        self.model = model
        self.survey = survey
        parameters = inspect.signature(model.forward).parameters
        self.accepts_positions = "position_ids" in parameters
        self.accepts_mask = "attention_mask" in parameters
        self.output_embeddings = _output_embeddings(model)
        self.position_takers = [] if self.accepts_positions else _position_takers(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        kv_lengths: torch.Tensor,
        kv_range: torch.Tensor,
        rope_lengths: torch.Tensor,
        logit_rows: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The step as it is traced: (logits [rows, vocab] float32, every layer's keys, every layer's values)."""
        layers = self.survey.layers
        cache = SlotCache(
            Step(position_ids, kv_lengths, kv_range, rope_lengths),
            {layer.index: key for layer, key in zip(layers, keys, strict=True)},
            {layer.index: value for layer, value in zip(layers, values, strict=True)},
            {layer.index: layer for layer in layers},
            self.dialect,
            self.survey.one_row,
        )
        with _RealIndexing():
            logits = self.run(input_ids, cache, logit_rows)
        return (
            logits,
            *(cache.keys[layer.index] for layer in layers),
            *(cache.values[layer.index] for layer in layers),
        )

    def run(self, input_ids: torch.Tensor, cache: SlotCache, logit_rows: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] float32 of the hidden states at `logit_rows`, which index the flattened [batch * seq]."""
        step = cache.step
        position_ids = cache.as_model(step.position_ids)
        inputs: dict[str, Any] = {"input_ids": cache.as_model(input_ids), "past_key_values": cache, "use_cache": True}
        if self.accepts_positions:
            inputs["position_ids"] = position_ids
        if self.accepts_mask:
            inputs["attention_mask"] = (step.kv_range[None] < step.kv_lengths[:, None]).long()

        def pick_rows(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = args[0]
            return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, logit_rows)[None], *args[1:])

        def give_positions(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"position_ids": position_ids}

        handles = [self.output_embeddings.register_forward_pre_hook(pick_rows)]
        handles += [taker.register_forward_pre_hook(give_positions, with_kwargs=True) for taker in self.position_takers]
        try:
            with speaking_to(cache), _positions_from(position_ids, self._tables()):
                output = self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def logits(self, input_ids: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """`run` for all of `input_ids`; raises UnsupportedModel whatever the model stumbles over."""
        try:
            return self.run(input_ids, cache, torch.arange(input_ids.numel()))
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"{type(self.model).__name__} does not run on a cache of keys and values in slots: {in_words(error)}"
            ) from error

    def _tables(self) -> dict[int, int]:
        # By identity, and looked up in each run: the exporter puts other tensors in the weights' places.
        return {id(operator.attrgetter(name)(self.model)): offset for name, offset in self.survey.tables.items()}


def in_words(error: Exception) -> str:
    """The beginning of what `error` says, on one line, and its type."""
    return f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of `model` with its weights in `dtype`, as transformers loads one; the same model where they are.

    What is no weight keeps its type: rotary frequencies, rounded to 16 bits, would turn a thousandth position by a wrong angle.
    Raises ExportError for weights that are too large for `dtype`.
    """
    if model.dtype == dtype:
        return model
    _check_range(model, dtype)
    made = copy.deepcopy(model)
    weights = made.state_dict(keep_vars=True).values()
    for tensor in (*made.parameters(), *weights):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return made


def _check_range(model: PreTrainedModel, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and weight.numel() and (largest := float(weight.abs().max())) > limit:
            raise ExportError(
                f"the weights of {type(model).__name__} do not fit into {str(dtype).removeprefix('torch.')}: {name} reaches "
                f"{largest:,.0f}, which ends at {limit:,.0f}; give --precision bf16, or a target for the CPU"
            )


class _RealIndexing(TorchFunctionMode):
    """New axes of complex tensors made on their real view; ONNX has no complex tensors and the exporter no such rule."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.unsqueeze, torch.Tensor.__getitem__) and torch.is_complex(args[0]):
            real, where = torch.view_as_real(args[0]), args[1]
            if func is torch.Tensor.unsqueeze and where < 0:
                where -= 1  # counted from the end, which the real view has one axis behind
            return torch.view_as_complex(func(real, where).contiguous())
        return func(*args, **(kwargs or {}))


def _output_embeddings(model: PreTrainedModel) -> torch.nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise UnsupportedModel(f"{type(model).__name__} has no output embeddings, so it gives no next-token logits")
    return head


def _position_takers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The parts of `model` that take `position_ids` where `model` itself does not pass any on."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    takers = [part for part in parts if "position_ids" in inspect.signature(part.forward).parameters]
    return [taker for taker in takers if not any(taker in other.modules() for other in takers if other is not taker)]


@contextmanager
def _positions_from(position_ids: torch.Tensor, tables: dict[int, int]) -> Iterator[None]:
    """Index position tables by each row's own positions, also in models that count them from the cache's length."""
    if not tables:
        yield
        return
    original = torch.nn.functional.embedding

    def embedding(input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        offset = tables.get(id(weight))
        return original(input if offset is None else position_ids + offset, weight, *args, **kwargs)

    torch.nn.functional.embedding = embedding
    try:
        yield
    finally:
        torch.nn.functional.embedding = original


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Point `model` at the engine's attention, at experts that can be traced, and at position factors that each row chooses by
    its own length; returns the same model, in eval mode.
    """
    model.eval()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = NAME
    choose_by_row(model, current)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return model


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, `model` attends as transformers wrote it, even after it was prepared for tracing."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    saved = [
        (config, config._attn_implementation_internal) for config in configs if hasattr(config, "_attn_implementation_internal")
    ]
    try:
        for config, _ in saved:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in reversed(saved):
            config._attn_implementation_internal = implementation
