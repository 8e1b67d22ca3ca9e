"""Sampling, compiled into the graph: from logits to one token a row, without a number leaving the device.

The order is transformers' and vLLM's: temperature, top-k, top-p over what top-k left, min-p. A token is then drawn by
inverting the cumulative distribution at a number in [0, 1) that the caller gives, so the graph keeps no random state and a
row's draw depends on nothing but its own inputs.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from onnxscript import opset23, script
from onnxscript.values import Opset

from export.graph import constant

DOMAIN = "engineshed"
_domain = Opset(DOMAIN, 1)
op: Any = opset23  # typed, its overloads refuse what the graph's type inference takes

CANDIDATES = 256
"""Most likely tokens that are sorted first; only a row that needs more has its whole vocabulary sorted."""
BLOCK = 256
"""Tokens whose probability is summed at a time when the cumulative distribution is inverted, or whose maximum is found."""

INPUTS = {
    "temperature": ir.DataType.FLOAT,
    "top_k": ir.DataType.INT64,
    "top_p": ir.DataType.FLOAT,
    "min_p": ir.DataType.FLOAT,
    "uniform": ir.DataType.FLOAT,
    "forced": ir.DataType.INT64,
}
"""The sampling tensors of the step contract, each [rows]."""


@script(_domain, default_opset=op)
def Threshold(weights, top_k, top_p, candidates):  # type: ignore[no-untyped-def]
    """The smallest weight [rows, 1] that top-k and top-p keep, out of the `candidates` largest; and whether those sufficed."""
    values, _ = op.TopK(weights, candidates, axis=-1)
    cumulative = op.CumSum(values, op.Constant(value_int=1))
    total = op.ReduceSum(weights, op.Constant(value_ints=[-1]), keepdims=1)
    one = op.Constant(value_ints=[1])
    k = op.Unsqueeze(top_k, one)
    limited = op.Greater(k, op.Constant(value_ints=[0]))
    last = op.Max(op.Sub(op.Min(k, candidates), one), op.Constant(value_ints=[0]))
    mass = op.Where(limited, op.GatherElements(cumulative, last, axis=1), total)
    target = op.Mul(op.Unsqueeze(top_p, one), mass)
    before = op.Sub(cumulative, values)
    reached = op.ReduceSum(op.Cast(op.Less(before, target), to=7), one, keepdims=1)
    kept = op.Max(op.Where(limited, op.Min(reached, k), reached), one)
    threshold = op.GatherElements(values, op.Sub(kept, one), axis=1)
    whole = op.GreaterOrEqual(op.Unsqueeze(top_p, one), op.Constant(value_floats=[1.0]))
    all_kept = op.And(whole, op.Not(limited))
    found = op.GreaterOrEqual(op.ReduceMax(cumulative, one, keepdims=1), target)
    fits = op.Or(op.And(limited, op.LessOrEqual(k, candidates)), op.And(op.Not(limited), found))
    return op.Where(all_kept, op.Constant(value_floats=[0.0]), threshold), op.Or(all_kept, fits)


@script(_domain, default_opset=op)
def Invert(weights, uniform):  # type: ignore[no-untyped-def]
    """The index [rows] at which the cumulative sum of `weights` [rows, blocks, block] passes `uniform` of its total."""
    one = op.Constant(value_ints=[1])
    sums = op.CumSum(op.ReduceSum(weights, op.Constant(value_ints=[2]), keepdims=0), op.Constant(value_int=1))
    target = op.Mul(op.Unsqueeze(uniform, one), op.ReduceMax(sums, one, keepdims=1))
    block = op.ReduceSum(op.Cast(op.LessOrEqual(sums, target), to=7), one, keepdims=1)
    last_block = op.Sub(op.Shape(weights, start=1, end=2), one)
    block = op.Min(block, last_block)
    previous = op.Max(op.Sub(block, one), op.Constant(value_ints=[0]))
    before = op.Where(
        op.Greater(block, op.Constant(value_ints=[0])),
        op.GatherElements(sums, previous, axis=1),
        op.Constant(value_floats=[0.0]),
    )
    inside = op.GatherND(weights, block, batch_dims=1)
    passed = op.LessOrEqual(op.Add(op.CumSum(inside, op.Constant(value_int=1)), before), target)
    offset = op.ReduceSum(op.Cast(passed, to=7), one, keepdims=1)
    size = op.Shape(weights, start=2, end=3)
    offset = op.Min(offset, op.Sub(size, one))
    return op.Squeeze(op.Add(op.Mul(block, size), offset), one)


@script(_domain, default_opset=op)
def Largest(logits, blocks_shape, padding):  # type: ignore[no-untyped-def]
    """The index [rows] of the first of the largest `logits` [rows, vocab].

    ArgMax compares number by number. Finding the block with the largest number by ReduceMax, which is vectorized, and looking
    inside that block only takes a fifth of its time over 49152 numbers.
    """
    least = op.Constant(value_float=float("-inf"))
    blocks = op.Reshape(op.Pad(logits, padding, least), blocks_shape)
    block = op.ArgMax(op.ReduceMax(blocks, op.Constant(value_ints=[2]), keepdims=0), axis=-1, keepdims=1)
    inside = op.ArgMax(op.GatherND(blocks, block, batch_dims=1), axis=-1, keepdims=1)
    size = op.Shape(blocks, start=2, end=3)
    return op.Squeeze(op.Add(op.Mul(block, size), inside), op.Constant(value_ints=[1]))


@script(_domain, default_opset=op)
def Sample(  # type: ignore[no-untyped-def]
    logits, temperature, top_k, top_p, min_p, uniform, forced, candidates, vocab, blocks_shape, padding
):
    """Token ids [rows] and their log-probabilities [rows] from logits [rows, vocab]."""
    one = op.Constant(value_ints=[1])
    best = Largest(logits, blocks_shape, padding)
    hot = op.Greater(temperature, op.Constant(value_floats=[0.0]))
    # A leading zero keeps the maximum defined in a step that wants no tokens.
    hottest = op.ReduceMax(op.Concat(op.Constant(value_floats=[0.0]), temperature, axis=0), keepdims=0)
    if op.Greater(hottest, op.Constant(value_float=0.0)):
        divisor = op.Unsqueeze(op.Where(hot, temperature, op.Constant(value_floats=[1.0])), one)
        scaled = op.Div(logits, divisor)
        weights = op.Exp(op.Sub(scaled, op.ReduceMax(scaled, one, keepdims=1)))  # of the most likely token: 1
        threshold, enough = Threshold(weights, top_k, top_p, candidates)
        needed = op.Or(enough, op.Not(op.Unsqueeze(hot, one)))
        if op.Equal(op.ReduceMin(op.Cast(needed, to=7), keepdims=0), op.Constant(value_int=1)):
            cut = op.Identity(threshold)
        else:
            cut, _enough = Threshold(weights, top_k, top_p, vocab)
        least = op.Max(cut, op.Unsqueeze(min_p, one))
        kept = op.Where(op.GreaterOrEqual(weights, least), weights, op.Constant(value_floats=[0.0]))
        drawn = Invert(op.Reshape(op.Pad(kept, padding), blocks_shape), uniform)
        drawn = op.Min(drawn, op.Sub(vocab, one))
        # Rounding can carry the index past the last kept token; the most likely one is always kept.
        weight = op.Squeeze(op.GatherElements(kept, op.Unsqueeze(drawn, one), axis=1), one)
        valid = op.And(hot, op.Greater(weight, op.Constant(value_floats=[0.0])))
        free = op.Where(valid, drawn, best)
    else:
        free = op.Identity(best)
    tokens = op.Where(op.Less(forced, op.Constant(value_ints=[0])), free, forced)
    # LogSoftmax takes an eighth of the time of ReduceLogSumExp in ONNX Runtime's CPU provider.
    logprobs = op.Squeeze(op.GatherElements(op.LogSoftmax(logits, axis=-1), op.Unsqueeze(tokens, one), axis=1), one)
    return tokens, logprobs


def append_sampler(model: ir.Model, vocab: int) -> None:
    """Replace the output `logits` [rows, vocab] of `model` by `tokens` int64 and `logprobs` float32, both [rows].

    Adds the inputs of `INPUTS`. The log-probability is that of the unscaled distribution, as OpenAI's API gives it.
    """
    graph = model.graph
    logits = graph.outputs[0]
    rows = ir.Shape(["rows"])
    inputs = [ir.Value(name=name, shape=rows, type=ir.TensorType(dtype)) for name, dtype in INPUTS.items()]
    graph.inputs.extend(inputs)
    blocks = -(-vocab // BLOCK)
    constants = [
        constant(graph, "sampler.candidates", np.array([min(CANDIDATES, vocab)])),
        constant(graph, "sampler.vocab", np.array([vocab])),
        constant(graph, "sampler.blocks", np.array([-1, blocks, BLOCK])),
        constant(graph, "sampler.padding", np.array([0, 0, 0, blocks * BLOCK - vocab])),
    ]
    node = ir.Node(DOMAIN, "Sample", [logits, *inputs, *constants], num_outputs=2, name="sampler")
    tokens, logprobs = node.outputs
    tokens.name, tokens.shape, tokens.type = "tokens", rows, ir.TensorType(ir.DataType.INT64)
    logprobs.name, logprobs.shape, logprobs.type = "logprobs", rows, ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs[0:1] = [tokens, logprobs]
    for function in (Threshold, Invert, Largest, Sample):
        proto = function.to_function_proto()
        loaded = ir.serde.deserialize_function(proto)
        model.functions[loaded.identifier()] = loaded
    model.opset_imports[DOMAIN] = 1
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
