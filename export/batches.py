"""A quantized step for one token and another one for many, in one graph, which takes the one that its tokens are for.

One token's products read each weight once and wait for memory: `quantize` packs them tightly. Many tokens' products compute:
there ONNX Runtime's block kernels take as long as float32, and its plain int8 kernel a fifth of that. That kernel wants one
scale a column of weights and one for all activations, and the latter, at 8 bits, costs the default model 4% in perplexity. So

* weights get 8 bits and a scale a column;
* activations are written as coarse + fine, each in 7 bits with a fixed step. Fixed, because a row's numbers must not depend on
  the rows beside it; and it can be fixed, because what leaves a norm has a known largest size: |x| / rms(x) <= sqrt(width).
  Activations that come from elsewhere are divided by their own rms first, and their products multiplied by it;
* the coarse and the fine half are rows of one product, so the weights are in memory once.

Seven bits, because 127 * 127 * 2 fits 16 bits, in which processors without VNNI sum pairs of products. Sums of integers are
exact, so a row comes out the same, bit for bit, in every batch.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export import quantize
from export.graph import constant, merge_equal, supersede
from export.grid import Float32

Int8 = npt.NDArray[np.int8]

MANY = 2
"""Tokens in a step from which on the products for many serve it."""
_LEVELS = 63
"""Largest code of an activation's half, counted from its zero."""
_ZERO = 64
_FINE = 2 * _LEVELS
"""Steps of the fine half in a step of the coarse one."""
_WEIGHT_LEVELS = 127
_TINY = 1e-12
_NORMS = {"RMSNormalization": 1, "LayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}
"""Operators whose first output is normalized over its last axis, and which input is the factor that follows."""
_SAME_NUMBERS = {"Reshape", "Gather", "Unsqueeze", "Squeeze", "Identity"}


_SEARCH = 0.8
"""Of the time that quantizing takes: finding the grids that weights lie on."""


def quantize_both(
    model: ir.Model, bits: int, vocab: int, share: Callable[[float], None] = lambda share: None
) -> quantize.Report:
    """`quantize.quantize` `model` for steps of one token, and give it products in int8 for steps of more, in place.

    `share` is told how much is done, from 0 to 1.
    """
    merge_equal(model)
    embeddings = quantize.quantize_embeddings(model, vocab)
    many = model.clone()
    report = quantize.quantize(model, bits, vocab, lambda done: share(_SEARCH * done))
    if report.matrices:
        widen(many, lambda done: share(_SEARCH + (1 - _SEARCH) * done))
        _branch(model, many)
    report.add(embeddings)
    return report


def widen(model: ir.Model, share: Callable[[float], None] = lambda share: None) -> None:
    """Turn `model`'s products with constant weights into int8 ones for many rows, in place."""
    products: dict[ir.Value | None, list[tuple[ir.Node, Float32]]] = {}
    for node in list(model.graph):
        weight = quantize.constant_weight(node)
        if weight is not None and not quantize.stays(node, weight):
            products.setdefault(node.inputs[0], []).append((node, weight))
    for number, readers in enumerate(products.values()):
        _Halves(model.graph, *readers[0]).serve(readers)
        share((number + 1) / len(products))
    model.opset_imports["com.microsoft"] = 1


class _Halves:
    """An activation as rows of coarse codes followed by rows of fine ones, and the products that read them."""

    def __init__(self, graph: ir.Graph, before: ir.Node, weight: Float32) -> None:
        """The activation that `before` multiplies with `weight` [out, in]."""
        self.graph, self.before = graph, before
        x, width = before.inputs[0], weight.shape[1]
        assert x is not None
        bound = _bound(x, width)
        self.rms: ir.Value | None = None
        if bound is None:
            ones = self._constant(f"ones_{width}", np.ones(width, np.float32))
            attributes = {"axis": -1, "epsilon": _TINY, "stash_type": 1}
            x, self.rms = self._insert("SimplifiedLayerNormalization", [x, ones], attributes, outputs=2)
            bound = math.sqrt(width)
        self.zero = self._constant("halves_zero", np.array(_ZERO, np.uint8))
        step, self.step = self._step(bound / _LEVELS), self._step(bound / _LEVELS / _FINE)
        (coarse,) = self._insert("QuantizeLinear", [x, step, self.zero])
        (back,) = self._insert("DequantizeLinear", [coarse, step, self.zero])
        (rest,) = self._insert("Sub", [x, back])
        (fine,) = self._insert("QuantizeLinear", [rest, self.step, self.zero])
        (self.codes,) = self._insert("Concat", [coarse, fine], {"axis": 0})

    def serve(self, readers: list[tuple[ir.Node, Float32]]) -> None:
        """Replace the products `readers`, each with its weight [out, in]."""
        fine = self._constant("halves_fine", np.array(_FINE, np.float32))
        for node, weight in readers:
            self.before = node
            name = node.outputs[0].name
            codes, scale = columns(weight)
            weights = self._constant(f"{name}.codes", codes), self._constant(f"{name}.scale", scale)
            operands = [self.codes, weights[0], self.step, weights[1], self.zero]
            (both,) = self._insert("MatMulIntegerToFloat", operands, domain="com.microsoft")
            coarse, rest = self._insert("Split", [both], {"axis": 0, "num_outputs": 2}, outputs=2)
            (coarse,) = self._insert("Mul", [coarse, fine])
            (product,) = self._insert("Add", [coarse, rest])
            if self.rms is not None:
                (product,) = self._insert("Div", [product, self.rms])
            if node.op_type == "Gemm" and len(node.inputs) > 2:
                (product,) = self._insert("Add", [product, node.inputs[2]])
            supersede(self.graph, node, product)

    def _step(self, size: float) -> ir.Value:
        return self._constant(f"step_{size}", np.array(size, np.float32))

    def _constant(self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        return constant(self.graph, f"many.{name}", array)

    def _insert(
        self,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        attributes: dict[str, int | float] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> tuple[ir.Value, ...]:
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.before, node)
        return tuple(node.outputs)


def columns(weight: Float32) -> tuple[Int8, Float32]:
    """`weight` [out, in] as codes [in, out] and a scale for each of `out`."""
    scale = (np.abs(weight).max(1) / np.float32(_WEIGHT_LEVELS)).astype(np.float32)
    scale[scale == 0] = 1
    return np.ascontiguousarray(np.rint(weight / scale[:, None]).astype(np.int8).T), scale


def _bound(x: ir.Value, width: int) -> float | None:
    """The largest number that `x` [..., width] can hold, where a norm made it; None elsewhere."""
    node = x.producer()
    while node is not None and node.op_type in _SAME_NUMBERS and node.inputs[0] is not None:
        x = node.inputs[0]
        node = x.producer()
    if node is None or node.op_type not in _NORMS or x is not node.outputs[0]:
        return None
    first = _NORMS[node.op_type]
    factors = [value for value in node.inputs[first : first + 2] if value is not None]
    if node.op_type != "LayerNormalization":
        factors = factors[:1]
    largest = [_largest(value, width) for value in factors]
    if any(number is None for number in largest):
        return None
    factor, *offset = (number for number in largest if number is not None)
    return math.sqrt(width) * factor + sum(offset) or None


def _largest(value: ir.Value, width: int) -> float | None:
    if value.const_value is None or tuple(value.const_value.shape) != (width,):
        return None
    return float(np.abs(value.const_value.numpy()).max())


def _branch(one: ir.Model, many: ir.Model) -> None:
    """`one` takes its own nodes for a step of fewer than `MANY` tokens, and those of its clone `many` otherwise."""
    graph, other = one.graph, many.graph
    for name, value in list(other.initializers.items()):
        assert value.const_value is not None
        ir.convenience.replace_all_uses_with(value, constant(graph, name, value.const_value.numpy()))
    for mine, theirs in zip(graph.inputs, other.inputs, strict=True):
        ir.convenience.replace_all_uses_with(theirs, mine)
    names = [value.name for value in graph.outputs]
    branches = {"then_branch": _subgraph(other, "many"), "else_branch": _subgraph(graph, "one")}
    tokens = next(value for value in graph.inputs if value.name == "input_ids")
    size = ir.node("Size", [tokens])
    enough = ir.node("GreaterOrEqual", [size.outputs[0], constant(graph, "many.tokens", np.array(MANY))])
    choice = ir.node(
        "If", enough.outputs, {name: ir.AttrGraph(name, branch) for name, branch in branches.items()}, num_outputs=len(names)
    )
    graph.extend([size, enough, choice])
    for output, value, like in zip(names, choice.outputs, branches["else_branch"].outputs, strict=True):
        value.name, value.shape, value.type = output, like.shape, like.type
    graph.outputs.extend(choice.outputs)


def _subgraph(graph: ir.Graph, prefix: str) -> ir.Graph:
    """The nodes of `graph`, taken out of it, as a branch; names are made its own, since branches share one scope above them."""
    outputs, nodes = list(graph.outputs), list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for node in nodes:
        for value in node.outputs:
            if value.name:
                value.name = f"{prefix}.{value.name}"
    return ir.Graph([], outputs, nodes=nodes, opset_imports=dict(graph.opset_imports), name=prefix)
