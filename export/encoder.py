"""A model for embeddings as an ONNX graph: tokens and lengths in, one embedding a text out.

There is no cache and no step: every text is computed whole. The mask is made from the lengths inside the graph, where pooling
and normalization stand as well, so that what a padded row holds behind its text reaches nothing.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from export.decoder import failure
from export.errors import UnsupportedModel
from export.library_messages import silence
from export.limits import UNKNOWN_LENGTH
from export.operators import TRANSLATIONS
from export.rotary import choose_by_row
from export.sentence import Sentence
from export.survey import PROBE_TOKENS, probe_tokens, watching_tables
from export.trace_progress import watching
from runtime.bundle import Encoder

_TOLERANCE = 1e-4
"""Between two embeddings, of the larger one's largest number, that are the same but for rounding."""


@dataclass(frozen=True)
class Survey:
    """What a few eager passes showed of a model."""

    takes_positions: bool
    """It gives the same when it is told the positions 0, 1, ..., which it otherwise counts itself."""
    max_length: int
    """Positions it has."""


@dataclass(frozen=True)
class _Texts:
    """The texts of a pass; see `rotary.Rows`."""

    lengths: torch.Tensor

    def longer_than(self, length: int) -> torch.Tensor:
        return (self.lengths > length)[:, None]


_texts: _Texts | None = None


def _current() -> _Texts | None:
    return _texts


@contextmanager
def _of_lengths(lengths: torch.Tensor) -> Iterator[None]:
    """While this lasts, position factors that depend on a text's length are chosen by these [batch]."""
    global _texts
    _texts = _Texts(lengths)
    try:
        yield
    finally:
        _texts = None


class EmbeddingModule(torch.nn.Module):
    """`model`, with what `sentence` says becomes of its hidden states."""

    def __init__(self, model: PreTrainedModel, sentence: Sentence, takes_positions: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.normalized = model, sentence.pooling, sentence.normalized
        self.dense = torch.nn.Sequential(*sentence.dense)
        self.takes_positions = takes_positions
        self.takes_cache = "use_cache" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings [batch, dimensions] float32 of texts [batch, seq] int64 of `lengths` [batch] int64, padded behind."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        inside = positions[None] < lengths[:, None]
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": inside.long()}
        if self.takes_positions:  # of every row, which RotaryEmbedding's tables must have
            inputs["position_ids"] = positions[None].expand(input_ids.shape)
        if self.takes_cache:
            inputs["use_cache"] = False
        with _of_lengths(lengths):
            hidden = self.model(**inputs).last_hidden_state.float()
        pooled = self.dense(self._pool(hidden, inside, lengths))
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalized else pooled

    def _pool(self, hidden: torch.Tensor, inside: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        match self.pooling:
            case "mean":
                # Not a product with the mask: nothing that stands behind a text may count, were it infinite.
                kept = torch.where(inside[..., None], hidden, 0.0)
                return kept.sum(1) / lengths[:, None].to(hidden.dtype)
            case "cls":
                return hidden[:, 0]
            case "last":
                last = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
                return hidden.gather(1, last)[:, 0]


@torch.no_grad()
def survey(model: PreTrainedModel, sentence: Sentence) -> Survey:
    """Run `model` on short texts. Raises UnsupportedModel where tokens alone do not do, or padding changes an embedding."""
    name = type(model).__name__
    table = model.get_input_embeddings().weight
    tokens = probe_tokens(int(table.shape[0]))  # type: ignore[index]
    lengths = torch.tensor([PROBE_TOKENS])
    tables: dict[str, int] = {}
    plain = EmbeddingModule(model, sentence, takes_positions=False)
    try:
        with watching_tables(model, tables):
            expected = plain(tokens, lengths)
    except Exception as error:  # transformers raises whatever the model's code does
        raise UnsupportedModel(f"{name} does not run on tokens alone: {error} ({type(error).__name__})") from error
    choose_by_row(model, _current)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if takes:
        takes = _same(EmbeddingModule(model, sentence, takes_positions=True)(tokens, lengths), expected)
    module = EmbeddingModule(model, sentence, takes)
    padded = torch.cat([tokens, tokens[:, :3]], dim=1)
    if not _same(module(padded, lengths), expected):
        raise UnsupportedModel(
            f"{name} gives a padded text another embedding than the text alone: it does not keep to its mask"
        )
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    positions = [int(parameters[weight].shape[0]) - offset for weight, offset in tables.items()]
    config = model.config.get_text_config()
    known = int(getattr(config, "max_position_embeddings", None) or UNKNOWN_LENGTH)
    return Survey(takes, min([known, *positions]))


@torch.no_grad()
def trace(
    model: PreTrainedModel, sentence: Sentence, seen: Survey, share: Callable[[float], None] = lambda share: None
) -> ir.Model:
    """`EmbeddingModule` in ONNX IR: input_ids [batch, seq], lengths [batch] int64 -> embeddings [batch, dimensions] float32.

    `share` is told how much of the work is done, from 0 to 1.
    """
    module = EmbeddingModule(model, sentence, seen.takes_positions).eval()
    try:
        with silence(), watching(module, share):
            program = torch.onnx.export(
                module,
                (torch.ones(2, 5, dtype=torch.int64), torch.tensor([3, 5])),
                dynamo=True,
                dynamic_shapes=({0: "batch", 1: "seq"}, {0: "batch"}),
                opset_version=23,
                input_names=["input_ids", "lengths"],
                output_names=["embeddings"],
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:  # torch.export hands on whatever the model's code raises under tracing
        raise UnsupportedModel(f"{type(model).__name__} cannot be traced to ONNX: {failure(error)}") from error
    assert program is not None
    traced: ir.Model = program.model
    return traced


def describe(model: PreTrainedModel, sentence: Sentence, traced: ir.Model) -> Encoder:
    """What the manifest says of the model whose graph is `traced`."""
    shape = traced.graph.outputs[0].shape
    assert shape is not None
    matrices = [
        value.const_value.shape[1]
        for node in traced.graph
        if node.op_type in ("MatMul", "Gemm")
        for value in node.inputs[1:2]
        if value is not None and value.const_value is not None and len(value.const_value.shape) == 2
    ]
    widths = [width for width in matrices if isinstance(width, int)]
    config = model.config.get_text_config()
    dimensions = int(shape[-1])  # type: ignore[arg-type]
    return Encoder(
        dimensions=dimensions,
        normalized=sentence.normalized,
        heads=int(getattr(config, "num_attention_heads", None) or 1),
        width=max([dimensions, *widths]),
    )


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() <= _TOLERANCE * right.abs().max())
