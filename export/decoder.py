"""A model's step as an ONNX graph: `survey` watches the model run, `trace` writes down what it does."""

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from export.cache import Dialect, Layer
from export.errors import UnsupportedModel
from export.graph import widen_bfloat16
from export.library_messages import silence
from export.operators import TRANSLATIONS
from export.step import StepModule, Survey, in_dtype, prepare
from export.survey import probe_tokens, survey
from export.trace_progress import watching

__all__ = ["Layer", "Survey", "in_dtype", "prepare", "probe_tokens", "survey", "trace"]

INPUTS = ("input_ids", "position_ids", "kv_lengths", "kv_range", "rope_lengths", "logit_rows")
"""A step's inputs beside the slots."""

_LONGEST_REASON = 300
"""Characters of an exporter's error that are worth reading."""


@torch.no_grad()
def trace(
    model: PreTrainedModel,
    seen: Survey,
    dialect: Dialect = "onnxruntime",
    capacity: int | None = None,
    share: Callable[[float], None] = lambda share: None,
) -> Any:
    """The step of `model`, in its own dtype, as an ONNX IR model (weights stay the model's own tensors).

    Inputs: input_ids, position_ids [batch, seq] int64; kv_lengths [batch] int32; kv_range [longest] int64; rope_lengths
    [batch] int32; logit_rows [rows] int64; past.N.key, past.N.value [batch, kv_heads, capacity, dim]. Outputs: logits [rows,
    vocab] float32 and the same buffers as present.N.key, present.N.value. `capacity` fixes the slots' length, None leaves it
    to the runtime.
    `share` is told how much of the work is done, from 0 to 1.
    """
    batch, seq, longest, rows = 2, 3, 7, 5
    size = capacity or 16
    layers = seen.layers
    dtype = model.dtype
    lengths = torch.tensor([5, 7], dtype=torch.int32)
    args = (
        torch.ones(batch, seq, dtype=torch.int64),
        lengths[:, None].long() - seq + torch.arange(seq)[None],
        lengths,
        torch.arange(longest),
        lengths.clone(),
        torch.arange(rows),
        [torch.zeros(batch, layer.kv_heads, size, layer.key_dim, dtype=dtype) for layer in layers],
        [torch.zeros(batch, layer.kv_heads, size, layer.value_dim, dtype=dtype) for layer in layers],
    )
    kv_axes = [{0: "batch"} if capacity else {0: "batch", 2: "capacity"}] * len(layers)
    names = [f"{layer.index}.key" for layer in layers] + [f"{layer.index}.value" for layer in layers]
    module = StepModule(model, seen, dialect).eval()
    try:
        with silence(), watching(module, share):
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                dynamic_shapes=(
                    {0: "batch", 1: "seq"},
                    {0: "batch", 1: "seq"},
                    {0: "batch"},
                    {0: "longest"},
                    {0: "batch"},
                    {0: "rows"},
                    kv_axes,
                    kv_axes,
                ),
                opset_version=23,
                input_names=[*INPUTS, *(f"past.{n}" for n in names)],
                output_names=["logits", *(f"present.{n}" for n in names)],
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:  # torch.export hands on whatever the model's code raises under tracing
        raise UnsupportedModel(f"{type(model).__name__} cannot be traced to ONNX: {failure(error)}") from error
    assert program is not None
    if dtype == torch.float32:
        widen_bfloat16(program.model.graph)
    return program.model


def failure(error: BaseException) -> str:
    """What stopped the exporter, in a few words: the error at the bottom says it, those above say where it passed."""
    if isinstance(error, UnsupportedModel):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        return f"the exporter has no ONNX operator for {missing[1]}"
    if unknown := re.search(r"data-dependent expression (.+?) \(", text):
        return f"its code branches on values that are known only when it runs ({unknown[1]})"
    if "inconsistencies were found" in text:
        return f"torch.export cannot solve how its tensors' shapes depend on each other ({text.split(': ', 1)[-1]})"
    return f"{text[:_LONGEST_REASON]} ({type(error).__name__})"
