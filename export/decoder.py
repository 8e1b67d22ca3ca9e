"""A model's forward pass as one step: new tokens in, logits of chosen rows and updated KV slots out."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from export.attention import NAME, Layer, SlotCache, Step, speaking_to
from export.errors import UnsupportedModel

PROBE_TOKENS = 11
"""Length of the survey's prompt: longer than any convolution kernel, prime so that no reshape fits by accident."""


@dataclass
class Survey:
    """What one eager pass showed of a model."""

    layers: list[Layer]
    tables: dict[int, int] = field(default_factory=dict)
    """Position tables by `id(weight)`: embeddings that were indexed by position plus this offset."""


class StepModule(torch.nn.Module):
    """`model` as the step contract wants it; see docs/bundle.md for the contract's inputs and outputs."""

    def __init__(self, model: PreTrainedModel, survey: Survey) -> None:
        super().__init__()
        self.model = model
        self.survey = survey
        parameters = inspect.signature(model.forward).parameters
        self.accepts_positions = "position_ids" in parameters
        self.accepts_mask = "attention_mask" in parameters
        self.output_embeddings = _output_embeddings(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        kv_lengths: torch.Tensor,
        kv_range: torch.Tensor,
        logit_rows: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        layers = self.survey.layers
        cache = SlotCache(
            Step(position_ids, kv_lengths, kv_range),
            {layer.index: key for layer, key in zip(layers, keys, strict=True)},
            {layer.index: value for layer, value in zip(layers, values, strict=True)},
            {layer.index: layer for layer in layers},
        )
        logits = self.run(input_ids, cache, logit_rows)
        return (
            logits,
            *(cache.keys[layer.index] for layer in layers),
            *(cache.values[layer.index] for layer in layers),
        )

    def run(self, input_ids: torch.Tensor, cache: SlotCache, logit_rows: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] float32 of the hidden states at `logit_rows`, which index the flattened [batch * seq]."""
        step = cache.step
        inputs: dict[str, Any] = {"input_ids": input_ids, "past_key_values": cache, "use_cache": True}
        if self.accepts_positions:
            inputs["position_ids"] = step.position_ids
        if self.accepts_mask:
            inputs["attention_mask"] = (step.kv_range[None] < step.kv_lengths[:, None]).long()

        def pick_rows(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = args[0]
            return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, logit_rows)[None], *args[1:])

        handle = self.output_embeddings.register_forward_pre_hook(pick_rows)
        try:
            with speaking_to(cache), _positions_from(step.position_ids, self.survey.tables):
                output = self.model(**inputs)
        finally:
            handle.remove()
        return output.logits[0].float()


def _output_embeddings(model: PreTrainedModel) -> torch.nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise UnsupportedModel(f"{type(model).__name__} has no output embeddings, so it gives no next-token logits")
    return head


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


@contextmanager
def _watching_tables(length: int, tables: dict[int, int]) -> Iterator[None]:
    original = torch.nn.functional.embedding
    positions = torch.arange(length)

    def embedding(input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        flat = input.reshape(-1)
        if flat.shape[0] == length and bool((flat - flat[0] == positions).all()):
            tables[id(weight)] = int(flat[0])
        return original(input, weight, *args, **kwargs)

    torch.nn.functional.embedding = embedding
    try:
        yield
    finally:
        torch.nn.functional.embedding = original


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Point `model` at the engine's attention and at experts that can be traced; returns the same model, in eval mode."""
    model.eval()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = NAME
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return model


def probe_tokens(vocab: int, length: int = PROBE_TOKENS) -> torch.Tensor:
    """A prompt [1, length] int64 that no position table would be indexed by: its steps are not all one."""
    return (torch.arange(length) ** 2 * 7 + 3)[None] % vocab


@torch.no_grad()
def survey(model: PreTrainedModel) -> Survey:
    """Run `model` once on a short prompt and note every layer's KV geometry, window and position tables.

    Raises UnsupportedModel when the model does not keep to the step contract: no KV cache, a recurrent state, or other
    logits than its own plain forward pass gives.
    """
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    tokens = probe_tokens(vocab)
    length = tokens.shape[1]
    tables: dict[int, int] = {}
    implementation = model.config._attn_implementation
    with _watching_tables(length, tables):
        expected = model(input_ids=tokens, use_cache=False).logits[0].float()
    prepare(model)
    positions = torch.arange(length)
    cache = SlotCache(Step(positions[None], torch.tensor([length], dtype=torch.int32), positions))
    got = StepModule(model, Survey([], tables)).run(tokens, cache, positions)
    if not cache.keys:
        raise UnsupportedModel(f"{type(model).__name__} wrote no keys and values to its cache, so it cannot decode in steps")
    difference = float((got - expected).abs().max() / (expected.abs().max() + 1e-6))
    if difference > 1e-3:
        raise UnsupportedModel(
            f"{type(model).__name__} gives other logits through a cache than without one (by {difference:.1e} of the "
            f"largest, attention {implementation!r}); it does something with its cache that the step contract lacks"
        )
    layers = [
        Layer(i, key.shape[1], key.shape[3], cache.values[i].shape[3], cache.windows.get(i))
        for i, key in sorted(cache.keys.items())
    ]
    return Survey(layers, tables)


@torch.no_grad()
def trace(model: PreTrainedModel, seen: Survey) -> Any:
    """The step of `model` as an ONNX IR model (weights stay the model's own tensors).

    Inputs: input_ids, position_ids [batch, seq] int64; kv_lengths [batch] int32; kv_range [longest] int64; logit_rows
    [rows] int64; past.N.key, past.N.value [batch, kv_heads, capacity, dim]. Outputs: logits [rows, vocab] float32 and the
    same buffers as present.N.key, present.N.value.
    """
    batch, seq, longest, rows, capacity = 2, 3, 7, 5, 16
    layers = seen.layers
    dtype = model.dtype
    lengths = torch.tensor([5, 7], dtype=torch.int32)
    args = (
        torch.ones(batch, seq, dtype=torch.int64),
        lengths[:, None].long() - seq + torch.arange(seq)[None],
        lengths,
        torch.arange(longest),
        torch.arange(rows),
        [torch.zeros(batch, layer.kv_heads, capacity, layer.key_dim, dtype=dtype) for layer in layers],
        [torch.zeros(batch, layer.kv_heads, capacity, layer.value_dim, dtype=dtype) for layer in layers],
    )
    kv_axes = [{0: "batch", 2: "capacity"}] * len(layers)
    names = [f"{layer.index}.key" for layer in layers] + [f"{layer.index}.value" for layer in layers]
    program = torch.onnx.export(
        StepModule(model, seen),
        args,
        dynamo=True,
        dynamic_shapes=(
            {0: "batch", 1: "seq"}, {0: "batch", 1: "seq"}, {0: "batch"}, {0: "longest"}, {0: "rows"}, kv_axes, kv_axes
        ),
        opset_version=23,
        input_names=["input_ids", "position_ids", "kv_lengths", "kv_range", "logit_rows", *(f"past.{n}" for n in names)],
        output_names=["logits", *(f"present.{n}" for n in names)],
        verbose=False,
    )
    assert program is not None
    return program.model
