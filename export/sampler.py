"""Sampling, compiled into the graph: from logits to one token a row, without a number leaving the device.

The order is transformers' and vLLM's: a mask, biases, penalties, temperature, top-k, top-p over what top-k left, min-p. A token
is then drawn by inverting the cumulative distribution at a number in [0, 1) that the caller gives, so the graph keeps no random
state and a row's draw depends on nothing but its own inputs. Log-probabilities are those of the logits as the model gave them.

On a CPU all of it is part of the model's graph, with branches around what a step does not need. A GPU replays recorded work,
which cannot branch: there the model's graph takes the most likely token (`append_choice`), and what draws another one is a
graph of its own (`sampling_graph`), which is run when a row wants it. It finds thresholds by dividing the range of
log-probabilities again and again, and sorts nothing.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from onnxscript import opset23, script
from onnxscript.values import Opset

from export.graph import constant, tidy
from runtime.engine import MOST_ALTERNATIVES

DOMAIN = "engineshed"
_domain = Opset(DOMAIN, 1)
op: Any = opset23  # typed, its overloads refuse what the graph's type inference takes

CANDIDATES = 256
"""Most likely tokens that are sorted first; only a row that needs more has its whole vocabulary sorted."""
BLOCK = 256
"""Tokens whose probability is summed at a time when the cumulative distribution is inverted, or whose maximum is found."""

FLOOR = -104.0
"""The logarithm below which a float32 weight is 0."""
WAYS, PASSES = 4, 15
"""A threshold's range is divided by `WAYS`, `PASSES` times: to 1e-7, a float32's own distance from the next one near 1."""

INPUTS = {
    "temperature": ir.DataType.FLOAT,
    "top_k": ir.DataType.INT64,
    "top_p": ir.DataType.FLOAT,
    "min_p": ir.DataType.FLOAT,
    "uniform": ir.DataType.FLOAT,
    "forced": ir.DataType.INT64,
}
"""The sampling tensors of the step contract, each [rows]."""
ADJUSTMENTS = {
    "adjust_ids": ir.DataType.INT64,
    "adjust_bias": ir.DataType.FLOAT,
    "adjust_scale": ir.DataType.FLOAT,
    "adjust_penalty": ir.DataType.FLOAT,
}
"""Those of `runtime.engine.Adjustments`, each [rows, k]."""
MASK = "mask"
"""The tensor that says which tokens may be chosen: uint8 [rows, bytes], token t where bit t % 8 of byte t // 8 is set."""
ALTERNATIVES = "alternatives"
"""How many most likely tokens are told: int64 [1]."""
MOST = 1e38
"""What adjusted logits are held within, so that only a masked one is infinite."""


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
def Invert(weights, uniform, vocab):  # type: ignore[no-untyped-def]
    """The index [rows] at which the cumulative sum of `weights` [rows, blocks, BLOCK] passes `uniform` of its total."""
    one = op.Constant(value_ints=[1])
    sums = op.CumSum(op.ReduceSum(weights, op.Constant(value_ints=[2]), keepdims=0), op.Constant(value_int=1))
    target = op.Mul(op.Unsqueeze(uniform, one), op.ReduceMax(sums, one, keepdims=1))
    block = op.ReduceSum(op.Cast(op.LessOrEqual(sums, target), to=7), one, keepdims=1)
    size = op.Constant(value_ints=[BLOCK])  # a shape would be asked of the host, which recorded work cannot do
    last_block = op.Div(op.Sub(vocab, one), size)
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
    size = op.Constant(value_ints=[BLOCK])
    return op.Squeeze(op.Add(op.Mul(block, size), inside), op.Constant(value_ints=[1]))


@script(_domain, default_opset=op)
def Choose(logits, forced, free):  # type: ignore[no-untyped-def]
    """The tokens [rows], `free` where `forced` is negative, and their log-probabilities [rows]."""
    one = op.Constant(value_ints=[1])
    tokens = op.Where(op.Less(forced, op.Constant(value_ints=[0])), free, forced)
    # LogSoftmax takes an eighth of the time of ReduceLogSumExp in ONNX Runtime's CPU provider.
    every = op.LogSoftmax(logits, axis=-1)
    logprobs = op.Squeeze(op.GatherElements(every, op.Unsqueeze(tokens, one), axis=1), one)
    return tokens, logprobs, every


@script(_domain, default_opset=op)
def Adjust(logits, ids, bias, scale, penalty):  # type: ignore[no-untyped-def]
    """`logits` [rows, vocab] with those at `ids` [rows, k] changed by `runtime.engine.Adjustments`, and all within `MOST`."""
    biased = op.Add(op.GatherElements(logits, ids, axis=1), bias)
    positive = op.Greater(biased, op.Constant(value_floats=[0.0]))
    changed = op.Sub(op.Where(positive, op.Div(biased, scale), op.Mul(biased, scale)), penalty)
    most, least = op.Constant(value_float=MOST), op.Constant(value_float=-MOST)
    # In this order there is one copy of the logits: what Clip gives is scattered into where it stands.
    return op.ScatterElements(op.Clip(logits, least, most), ids, op.Clip(changed, least, most), axis=1)


@script(_domain, default_opset=op)
def Restrict(logits, mask, penalties, row_shape, vocab):  # type: ignore[no-untyped-def]
    """`logits` [rows, vocab] with the tokens that `mask` leaves out at negative infinity.

    A byte chooses the row of `penalties` [256, 8] to be added: that takes a fourteenth of the time that it takes ONNX Runtime's
    CPU provider to part the bits by BitwiseAnd and to choose by Where.
    """
    added = op.Reshape(op.Gather(penalties, op.Cast(op.Cast(mask, to=1), to=6)), row_shape)
    one = op.Constant(value_ints=[1])
    return op.Add(logits, op.Slice(added, op.Constant(value_ints=[0]), vocab, one))


@script(_domain, default_opset=op)
def Likeliest(logits, every, count):  # type: ignore[no-untyped-def]
    """The `count` [1] most likely tokens, likeliest first, and their log-probabilities out of `every`: both [rows, count]."""
    _largest, tokens = op.TopK(logits, count, axis=-1)  # both named: TensorRT takes no two tensors called "_"
    return tokens, op.GatherElements(every, tokens, axis=1)


@script(_domain, default_opset=op)
def Valid(logits, kept, hot, drawn, best):  # type: ignore[no-untyped-def]
    """The tokens [rows], `drawn` where that is `hot` and can have been meant, `best` elsewhere.

    Rounding can carry the index past the last kept token, and an exponential's least result need not be 0, so that a token at
    negative infinity has a weight; the most likely one is always kept.
    """
    one = op.Constant(value_ints=[1])
    place = op.Unsqueeze(drawn, one)
    weighs = op.Greater(op.GatherElements(kept, place, axis=1), op.Constant(value_floats=[0.0]))
    allowed = op.Greater(op.GatherElements(logits, place, axis=1), op.Constant(value_floats=[float("-inf")]))
    return op.Where(op.And(hot, op.Squeeze(op.And(weighs, allowed), one)), drawn, best)


@script(_domain, default_opset=op)
def Weigh(logits, temperature):  # type: ignore[no-untyped-def]
    """Weights [rows, vocab] at `temperature`, of the most likely token 1, and their logarithms down to `FLOOR`."""
    one = op.Constant(value_ints=[1])
    hot = op.Greater(temperature, op.Constant(value_floats=[0.0]))
    divisor = op.Unsqueeze(op.Where(hot, temperature, op.Constant(value_floats=[1.0])), one)
    scaled = op.Div(logits, divisor)
    logarithms = op.Sub(scaled, op.ReduceMax(scaled, one, keepdims=1))
    return op.Exp(logarithms), op.Max(logarithms, op.Constant(value_floats=[FLOOR]))


@script(_domain, default_opset=op)
def Narrow(logarithms, amounts, wanted, low, width, fractions):  # type: ignore[no-untyped-def]
    """The part of [low, low + width) in which the largest cut lies above which `amounts` sum up to `wanted` [rows, 1].

    `low` [rows, 1] and `width` [1] say where the cut is known to lie, `fractions` [ways - 1] where the range is divided.
    """
    cuts = op.Add(low, op.Mul(fractions, width))
    above = op.GreaterOrEqual(
        op.Unsqueeze(logarithms, op.Constant(value_ints=[1])), op.Unsqueeze(cuts, op.Constant(value_ints=[2]))
    )
    kept = op.Where(above, op.Unsqueeze(amounts, op.Constant(value_ints=[1])), op.Constant(value_floats=[0.0]))
    sums = op.ReduceSum(kept, op.Constant(value_ints=[2]), keepdims=0)
    enough = op.Cast(op.GreaterOrEqual(sums, wanted), to=1)
    part = op.Gather(fractions, op.Constant(value_ints=[0]))
    narrow = op.Mul(width, part)
    return op.Add(low, op.Mul(op.ReduceSum(enough, op.Constant(value_ints=[1]), keepdims=1), narrow)), narrow


@script(_domain, default_opset=op)
def Least(logarithms, weights, cut):  # type: ignore[no-untyped-def]
    """The smallest of `weights` [rows, 1] whose logarithm is not below `cut`."""
    above = op.GreaterOrEqual(logarithms, cut)
    return op.ReduceMin(op.Where(above, weights, op.Constant(value_floats=[1.0])), op.Constant(value_ints=[1]), keepdims=1)


@script(_domain, default_opset=op)
def Kept(weights, least, top_p):  # type: ignore[no-untyped-def]
    """What top-p wants [rows, 1] of the weights that are not below `least`."""
    above = op.GreaterOrEqual(weights, least)
    total = op.ReduceSum(op.Where(above, weights, op.Constant(value_floats=[0.0])), op.Constant(value_ints=[1]), keepdims=1)
    return op.Mul(op.Unsqueeze(top_p, op.Constant(value_ints=[1])), total)


@script(_domain, default_opset=op)
def Draw(  # type: ignore[no-untyped-def]
    logits, weights, least, top_p_least, top_k, top_p, min_p, uniform, temperature, best, vocab, blocks_shape, padding
):
    """The token [rows] at `uniform` of the weights that top-k (`least`), top-p and min-p keep; `best` at temperature 0."""
    one, nothing = op.Constant(value_ints=[1]), op.Constant(value_floats=[0.0])
    limited = op.Greater(op.Unsqueeze(top_k, one), op.Constant(value_ints=[0]))
    whole = op.GreaterOrEqual(op.Unsqueeze(top_p, one), op.Constant(value_floats=[1.0]))
    cut = op.Max(op.Where(limited, least, nothing), op.Where(whole, nothing, top_p_least), op.Unsqueeze(min_p, one))
    kept = op.Where(op.GreaterOrEqual(weights, cut), weights, nothing)
    drawn = op.Min(Invert(op.Reshape(op.Pad(kept, padding), blocks_shape), uniform, vocab), op.Sub(vocab, one))
    return Valid(logits, kept, op.Greater(temperature, nothing), drawn, best)


@script(_domain, default_opset=op)
def Free(  # type: ignore[no-untyped-def]
    logits, temperature, top_k, top_p, min_p, uniform, candidates, vocab, blocks_shape, padding
):
    """Tokens [rows] out of `logits` [rows, vocab], with branches around what no row needs."""
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
        drawn = Invert(op.Reshape(op.Pad(kept, padding), blocks_shape), uniform, vocab)
        drawn = op.Min(drawn, op.Sub(vocab, one))
        free = Valid(logits, kept, hot, drawn, best)
    else:
        free = op.Identity(best)
    return free


@script(_domain, default_opset=op)
def Sample(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    forced,
    mask,
    ids,
    bias,
    scale,
    penalty,
    count,
    penalties,
    row_shape,
    candidates,
    vocab,
    blocks_shape,
    padding,
):
    """Token ids [rows] and log-probabilities [rows] from logits [rows, vocab]; the same of the likeliest, each [rows, k]."""
    if op.Greater(op.Size(mask), op.Constant(value_int=0)):
        left = Restrict(Adjust(logits, ids, bias, scale, penalty), mask, penalties, row_shape, vocab)
        free = Free(left, temperature, top_k, top_p, min_p, uniform, candidates, vocab, blocks_shape, padding)
    else:
        free = Free(logits, temperature, top_k, top_p, min_p, uniform, candidates, vocab, blocks_shape, padding)
    tokens, logprobs, every = Choose(logits, forced, free)
    top_tokens, top_logprobs = Likeliest(logits, every, count)
    return tokens, logprobs, top_tokens, top_logprobs


_FUNCTIONS = (
    Threshold,
    Invert,
    Largest,
    Choose,
    Adjust,
    Restrict,
    Likeliest,
    Valid,
    Free,
    Sample,
    Weigh,
    Narrow,
    Least,
    Kept,
    Draw,
)


def append_sampler(model: ir.Model, vocab: int) -> None:
    """Replace the output `logits` [rows, vocab] of `model` by `tokens` int64 and `logprobs` float32, both [rows].

    Adds the inputs of `INPUTS`, `ADJUSTMENTS`, `MASK` and `ALTERNATIVES`, and the outputs `top_tokens` int64 and `top_logprobs`
    float32, both [rows, alternatives]. A mask of no rows is none, and nothing is adjusted without one; one of one row holds for
    all. The log-probabilities are those of the unscaled distribution, as OpenAI's API gives them.
    """
    graph = model.graph
    logits = graph.outputs[0]
    wanted = ir.Value(name=ALTERNATIVES, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    inputs = [*_inputs(INPUTS), *_adorning(vocab), wanted]
    graph.inputs.extend(inputs)
    candidates = constant(graph, "sampler.candidates", np.array([min(CANDIDATES, vocab)]))
    arguments = [logits, *inputs, *_bytes(graph, vocab), candidates, _vocab(graph, vocab), *_blocks(graph, vocab)]
    tokens, logprobs, *tops = _call(graph, "Sample", arguments, 4)
    graph.outputs[0:1] = [*_described(tokens, logprobs), *_described_tops(*tops)]
    _inline(model)


def append_choice(model: ir.Model, vocab: int) -> None:
    """Put the outputs `tokens` int64 and `logprobs` float32, both [rows], before `model`'s output `logits` [rows, vocab].

    Adds the input `forced` of `INPUTS`; where it is negative the most likely token is taken. No row has a temperature here.
    """
    graph = model.graph
    logits = graph.outputs[0]
    logits.name = "logits"
    (forced,) = _inputs({"forced": INPUTS["forced"]})
    graph.inputs.append(forced)
    (best,) = _call(graph, "Largest", [logits, *_blocks(graph, vocab)], 1)
    tokens, logprobs, _every = _call(graph, "Choose", [logits, forced, best], 3)
    graph.outputs[0:0] = _described(tokens, logprobs)
    _inline(model)


def sampling_graph(vocab: int, *, adorned: bool = False) -> ir.Model:
    """From `logits` [rows, vocab] float32 and `INPUTS` to `tokens` and `logprobs`, without a branch and without sorting.

    One that is `adorned` takes `MASK` and `ADJUSTMENTS`, too, and gives the `MOST_ALTERNATIVES` likeliest tokens of each row.
    """
    logits = ir.Value(name="logits", shape=ir.Shape(["rows", vocab]), type=ir.TensorType(ir.DataType.FLOAT))
    inputs = _inputs(INPUTS)
    temperature, top_k, top_p, min_p, uniform, forced = inputs
    graph = ir.Graph([logits, *inputs], [], nodes=[], opset_imports={"": op.version}, name="sampling")
    model = ir.Model(graph, ir_version=10)
    given = logits
    if adorned:
        mask, *adjustments = _adorning(vocab)
        graph.inputs.extend([mask, *adjustments])
        (adjusted,) = _call(graph, "Adjust", [logits, *adjustments], 1)
        (logits,) = _call(graph, "Restrict", [adjusted, mask, *_bytes(graph, vocab), _vocab(graph, vocab)], 1)
    weights, logarithms = _call(graph, "Weigh", [logits, temperature], 2)
    (ones,) = _insert(
        graph, "ConstantOfShape", [_insert(graph, "Shape", [logits])[0]], {"value": ir.tensor(np.ones(1, np.float32))}
    )
    (wanted,) = _insert(graph, "Cast", [_column(graph, top_k)], {"to": ir.DataType.FLOAT})
    (least,) = _call(graph, "Least", [logarithms, weights, _cut(graph, logarithms, ones, wanted)], 1)
    (limited,) = _insert(graph, "Greater", [_column(graph, top_k), constant(graph, "sampler.nothing", np.array([0]))])
    (floor,) = _insert(graph, "Where", [limited, least, constant(graph, "sampler.zero", np.zeros(1, np.float32))])
    (mass,) = _call(graph, "Kept", [weights, floor, top_p], 1)
    (top_p_least,) = _call(graph, "Least", [logarithms, weights, _cut(graph, logarithms, weights, mass)], 1)
    (best,) = _call(graph, "Largest", [logits, *_blocks(graph, vocab)], 1)
    settings = [top_k, top_p, min_p, uniform, temperature]
    arguments = [logits, weights, least, top_p_least, *settings, best, _vocab(graph, vocab), *_blocks(graph, vocab)]
    (free,) = _call(graph, "Draw", arguments, 1)
    tokens, logprobs, every = _call(graph, "Choose", [given, forced, free], 3)
    graph.outputs.extend(_described(tokens, logprobs))
    if adorned:
        count = constant(graph, "sampler.alternatives", np.array([min(MOST_ALTERNATIVES, vocab)]))
        graph.outputs.extend(_described_tops(*_call(graph, "Likeliest", [given, every, count], 2)))
    _inline(model)
    tidy(model)
    return model


def _cut(graph: ir.Graph, logarithms: ir.Value, amounts: ir.Value, wanted: ir.Value) -> ir.Value:
    """The largest cut [rows, 1] such that the `amounts` whose logarithm is not below it sum up to `wanted` [rows, 1]."""
    (zeros,) = _insert(graph, "Mul", [wanted, constant(graph, "sampler.zero", np.zeros(1, np.float32))])
    (low,) = _insert(graph, "Add", [zeros, constant(graph, "sampler.floor", np.array([FLOOR], np.float32))])
    width = constant(graph, "sampler.width", np.array([-FLOOR * (1 + 2.0**-10)], np.float32))
    fractions = constant(graph, "sampler.fractions", (np.arange(1, WAYS) / WAYS).astype(np.float32))
    for _ in range(PASSES):
        low, width = _call(graph, "Narrow", [logarithms, amounts, wanted, low, width, fractions], 2)
    return low


def _inputs(kinds: dict[str, ir.DataType]) -> list[ir.Value]:
    return [ir.Value(name=name, shape=ir.Shape(["rows"]), type=ir.TensorType(dtype)) for name, dtype in kinds.items()]


def _adorning(vocab: int) -> list[ir.Value]:
    """The inputs `MASK` and `ADJUSTMENTS`."""
    kinds: dict[str, tuple[ir.DataType, list[str | int]]] = {MASK: (ir.DataType.UINT8, ["mask_rows", 4 * -(-vocab // 32)])}
    kinds |= {name: (dtype, ["rows", "adjusted"]) for name, dtype in ADJUSTMENTS.items()}
    return [ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype)) for name, (dtype, dims) in kinds.items()]


def _bytes(graph: ir.Graph, vocab: int) -> list[ir.Value]:
    """What is added to eight tokens' logits, for each byte that says which are allowed; and the shape of a mask's rows."""
    allowed = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(bool)
    return [
        constant(graph, "sampler.penalties", np.where(allowed, np.float32(0), np.float32(-np.inf))),
        constant(graph, "sampler.mask_row", np.array([-1, 32 * -(-vocab // 32)])),
    ]


def _vocab(graph: ir.Graph, vocab: int) -> ir.Value:
    return constant(graph, "sampler.vocab", np.array([vocab]))


def _blocks(graph: ir.Graph, vocab: int) -> list[ir.Value]:
    """The shape of `vocab` numbers a row in whole blocks, and the padding that makes them whole."""
    blocks = -(-vocab // BLOCK)
    return [
        constant(graph, "sampler.blocks", np.array([-1, blocks, BLOCK])),
        constant(graph, "sampler.padding", np.array([0, 0, 0, blocks * BLOCK - vocab])),
    ]


def _column(graph: ir.Graph, row: ir.Value) -> ir.Value:
    return _insert(graph, "Unsqueeze", [row, constant(graph, "sampler.one", np.array([1]))])[0]


def _insert(graph: ir.Graph, op_type: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None) -> list[ir.Value]:
    node = ir.node(op_type, inputs, attributes)
    graph.append(node)
    return list(node.outputs)


def _call(graph: ir.Graph, function: str, inputs: list[ir.Value], outputs: int) -> list[ir.Value]:
    node = ir.Node(DOMAIN, function, inputs, num_outputs=outputs)
    graph.append(node)
    return list(node.outputs)


def _described(tokens: ir.Value, logprobs: ir.Value) -> list[ir.Value]:
    rows = ir.Shape(["rows"])
    tokens.name, tokens.shape, tokens.type = "tokens", rows, ir.TensorType(ir.DataType.INT64)
    logprobs.name, logprobs.shape, logprobs.type = "logprobs", rows, ir.TensorType(ir.DataType.FLOAT)
    return [tokens, logprobs]


def _described_tops(tokens: ir.Value, logprobs: ir.Value) -> list[ir.Value]:
    dims = ir.Shape(["rows", ALTERNATIVES])
    tokens.name, tokens.shape, tokens.type = "top_tokens", dims, ir.TensorType(ir.DataType.INT64)
    logprobs.name, logprobs.shape, logprobs.type = "top_logprobs", dims, ir.TensorType(ir.DataType.FLOAT)
    return [tokens, logprobs]


def _inline(model: ir.Model) -> None:
    """Put the bodies of this module's functions in the places of their calls."""
    for function in _FUNCTIONS:
        loaded = ir.serde.deserialize_function(function.to_function_proto())
        model.functions[loaded.identifier()] = loaded
    model.opset_imports[DOMAIN] = 1
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
