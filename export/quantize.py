"""Weight-only quantization of a traced graph: MatMulNBits for the projections, GatherBlockQuantized for the embedding.

MatMulNBits is fast on the CPU only with an integer zero point a block, which shifts every weight of the block by up to half
a step; on a model whose blocks have real zero points (GGUF's Q4_1) that alone costs 28% in perplexity. The shift is a
product of its own, so it is carried along in the same operator:

    x @ W = x @ ((code - integer_zero) * scale)  +  blocksum(x) @ shift

with blocksum(x) appended to x and the shift, in 4 bits, to W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import onnx_ir as ir

from export import grid
from export.graph import constant, supersede
from export.grid import BLOCK, Float32, Grid

ACCURACY_INT8 = 4
"""MatMulNBits' `accuracy_level` at which activations are quantized to int8 a block and products are summed in int32."""
_SMALLEST = 32
"""Matrices with a side below this stay as they are: no weight worth saving, and routers are among them."""
_ROUTER_PATH = {"Softmax", "Sigmoid", "Cast", "Reshape", "Add", "LogSoftmax", "Squeeze", "Unsqueeze", "Mul", "Relu"}


@dataclass
class Report:
    """What quantization did to a graph."""

    matrices: int = 0
    weights: int = 0
    """Numbers that are now quantized."""
    skipped: int = 0
    """Numbers in matrices that stay as they are: routers, experts, position tables."""
    blocks: int = 0
    carried: int = 0
    """Blocks that lay on a grid already and were carried over."""

    @property
    def carried_share(self) -> float:
        """`carried` of `blocks`."""
        return self.carried / max(1, self.blocks)

    def count(self, matrix: Grid) -> None:
        """Add one quantized matrix."""
        self.matrices += 1
        self.weights += len(matrix.codes) * matrix.columns
        self.blocks += matrix.scale.size
        self.carried += round(matrix.exact * matrix.scale.size)

    def add(self, other: "Report") -> None:
        """Add what another report counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def quantize(model: ir.Model, bits: int, vocab: int, share: Callable[[float], None] = lambda share: None) -> Report:
    """Quantize `model`'s projections to `bits` (4 or 8), its embedding and LM head to 8, in place.

    The embedding and a tied LM head come out as the same bytes, which `graph.write` stores once. Routers and the stacked
    weights of experts are left alone. `share` is told how much is done, from 0 to 1.
    """
    report = quantize_embeddings(model, vocab)
    rewriter = _Rewriter(model.graph, bits, vocab, report)
    nodes = list(model.graph)
    for number, node in enumerate(nodes):
        rewriter.product(node)
        share((number + 1) / len(nodes))
    return report


def quantize_embeddings(model: ir.Model, vocab: int) -> Report:
    """Quantize `model`'s embedding to 8 bits, in place; a tied LM head keeps the float weight."""
    report = Report()
    rewriter = _Rewriter(model.graph, 8, vocab, report)
    for node in list(model.graph):
        rewriter.embedding(node)
    model.opset_imports["com.microsoft"] = 1
    return report


class _Rewriter:
    def __init__(self, graph: ir.Graph, bits: int, vocab: int, report: Report) -> None:
        self.graph, self.bits, self.vocab, self.report = graph, bits, vocab, report
        self._extended: dict[ir.Value, ir.Value] = {}

    def embedding(self, node: ir.Node) -> None:
        if node.op_type == "Gather" and self._is_embedding(node):
            self._gather(node)

    def product(self, node: ir.Node) -> None:
        weight = constant_weight(node)
        if weight is None:
            return
        if stays(node, weight):
            self.report.skipped += weight.size
            return
        bits = 8 if weight.shape[0] >= self.vocab else self.bits
        matrix = grid.eight_bits(weight) if bits == 8 else grid.four_bits(weight)
        self.report.count(matrix)
        self._matmul(node, matrix)

    # Reading the graph ---------------------------------------------------------------------------------------------

    def _is_embedding(self, node: ir.Node) -> bool:
        table = node.inputs[0]
        if table is None or table.const_value is None or len(table.const_value.shape) != 2:
            return False
        rows, columns = table.const_value.numpy().shape
        axis = node.attributes.get("axis")
        return rows >= self.vocab and columns >= _SMALLEST and (axis is None or axis.as_int() == 0)

    # Rewriting it --------------------------------------------------------------------------------------------------

    def _matmul(self, node: ir.Node, matrix: Grid) -> None:
        x = node.inputs[0]
        assert x is not None
        codes, scale, zero = matrix.codes, matrix.scale, matrix.integer_zero
        inner = codes.shape[1] * BLOCK
        if np.abs(matrix.shift).max() > 0:
            x = self._with_block_sums(node, x, matrix.columns)
            shift_codes, shift_scale, shift_zero = grid.shift_codes(matrix.shift)
            codes = np.concatenate([codes, shift_codes], axis=1)
            scale = np.concatenate([scale, shift_scale], axis=1)
            zero = np.concatenate([zero, shift_zero], axis=1)
            inner += matrix.scale.shape[1]
        else:
            inner = matrix.columns
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        inputs: list[ir.Value | None] = [x, *self._constants(node, matrix.bits, codes, scale, zero)]
        if bias is not None:
            inputs += [None, bias]
        attributes = {
            "K": inner,
            "N": len(codes),
            "bits": matrix.bits,
            "block_size": BLOCK,
            "accuracy_level": ACCURACY_INT8,
        }
        self._replace(node, "MatMulNBits", inputs, attributes)

    def _gather(self, node: ir.Node) -> None:
        table = node.inputs[0]
        assert table is not None
        assert table.const_value is not None
        weight = np.ascontiguousarray(table.const_value.numpy(), dtype=np.float32)
        if weight.shape[1] % BLOCK:
            self.report.skipped += weight.size
            return
        matrix = grid.eight_bits(weight)
        self.report.count(matrix)
        codes, scale, zero = self._constants(node, 8, matrix.codes, matrix.scale, matrix.integer_zero)
        flat = codes.const_value
        assert flat is not None
        codes.const_value = ir.tensor(flat.numpy().reshape(weight.shape), name=codes.name)
        codes.shape = ir.Shape(weight.shape)
        attributes = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        self._replace(node, "GatherBlockQuantized", [codes, node.inputs[1], scale, zero], attributes)

    def _with_block_sums(self, node: ir.Node, x: ir.Value, columns: int) -> ir.Value:
        """`x` [..., columns] with the sums of its blocks appended; made once for all the products that read `x`."""
        if x in self._extended:
            return self._extended[x]
        count = -(-columns // BLOCK)
        if columns % BLOCK:
            amount = constant(self.graph, f"pad_to_{BLOCK}_{columns}", np.array([0, count * BLOCK - columns]))
            axis = constant(self.graph, "last_axis", np.array([-1]))
            x_whole = self._insert(node, "Pad", [x, amount, None, axis], {})
        else:
            x_whole = x
        shape = constant(self.graph, f"blocks_of_{columns}_{_rank(x)}", np.array([0] * (_rank(x) - 1) + [count, BLOCK]))
        blocks = self._insert(node, "Reshape", [x_whole, shape], {})
        sums = self._insert(node, "ReduceSum", [blocks, constant(self.graph, "last_axis", np.array([-1]))], {"keepdims": 0})
        self._extended[x] = self._insert(node, "Concat", [x_whole, sums], {"axis": -1})
        return self._extended[x]

    def _constants(
        self, node: ir.Node, bits: int, codes: grid.Codes, scale: Float32, zero: grid.Codes
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        name = node.outputs[0].name
        packed, zeros = grid.pack(codes, bits), grid.pack(zero, bits)
        return (
            constant(self.graph, f"{name}.codes", packed),
            constant(self.graph, f"{name}.scale", scale),
            constant(self.graph, f"{name}.zero", zeros),
        )

    def _insert(self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _replace(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]) -> None:
        new = ir.node(op_type, inputs, attributes, domain="com.microsoft", name=node.name)
        self.graph.insert_before(node, new)
        supersede(self.graph, node, new.outputs[0])


def constant_weight(node: ir.Node) -> Float32 | None:
    """The constant right-hand side of a MatMul or Gemm as [out, in] float32; None where it has none or another form."""
    if node.op_type not in {"MatMul", "Gemm"}:
        return None
    value = node.inputs[1]
    if value is None:
        return None
    transposed = node.op_type == "Gemm" and _flag(node, "transB")
    if node.op_type == "Gemm" and (_flag(node, "transA") or _factor(node, "alpha") != 1 or _factor(node, "beta") != 1):
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and len(value.shape or ()) == 2:
        value, transposed = producer.inputs[0], not transposed
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    array = value.const_value.numpy()
    return np.ascontiguousarray(array if transposed else array.T, dtype=np.float32)


def stays(node: ir.Node, weight: Float32) -> bool:
    """The product of `weight` [out, in] is not worth quantizing, or chooses experts."""
    return min(weight.shape) < _SMALLEST or _routes(node)


def _routes(node: ir.Node) -> bool:
    """The product chooses experts: its result runs, through elementwise operators, into a TopK."""
    frontier = [node.outputs[0]]
    for _ in range(5):
        users = [user for value in frontier for user, _ in value.uses()]
        if any(user.op_type == "TopK" for user in users):
            return True
        frontier = [user.outputs[0] for user in users if user.op_type in _ROUTER_PATH]
    return False


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise ValueError(f"value {value.name!r} has no shape")
    return len(value.shape)


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and attribute.as_int() != 0


def _factor(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else attribute.as_float()
