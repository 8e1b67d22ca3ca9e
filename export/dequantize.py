"""Weight-only quantization as TensorRT takes it: `DequantizeLinear` of a constant before the product, which the builder fuses.

* int4: blocks of 32 along the inputs, without a zero point, for TensorRT knows none. A block's zero point is a shift of all its
  weights, hence a product of the sums of the activation's blocks, x @ W = x @ ((code - 8) * scale) + blocksum(x) @ shift, by
  which a GGUF's blocks are carried over as they are. The LM head gets int8.
* int8 and fp8 (e4m3): a scale for each output.
"""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export import grid, quantize
from export.graph import constant, merge_equal, supersede
from export.grid import BLOCK, Float32
from runtime.bundle import Precision

PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "fp8")
Array = npt.NDArray[np.generic]

_MIDDLE = 8
"""The code of 0 among the 16 of int4."""
_INT8_MOST = 127
_FP8_MOST = 448


def quantize_products(model: ir.Model, precision: Precision, vocab: int) -> quantize.Report:
    """Store the weights of `model`'s products in `precision`, one of `PRECISIONS`, in place; the activations stay as they are.

    The embedding keeps its type: a step reads a few of its rows.
    """
    merge_equal(model)
    report = quantize.Report()
    sums: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        weight = quantize.constant_weight(node)
        if weight is None:
            continue
        if quantize.stays(node, weight) or (precision == "int4" and weight.shape[1] % BLOCK):
            report.skipped += weight.size
        elif precision == "int4" and weight.shape[0] < vocab:
            matrix = grid.four_bits(weight, grid.ROUNDED)
            report.count(matrix)
            _in_blocks(model.graph, node, matrix, sums)
        else:
            report.matrices += 1
            report.weights += weight.size
            _in_columns(model.graph, node, weight, precision)
    return report


def _in_blocks(graph: ir.Graph, node: ir.Node, matrix: grid.Grid, sums: dict[ir.Value, ir.Value]) -> None:
    x, dtype, name = _operand(node), _type(node), node.outputs[0].name
    codes = matrix.codes.reshape(len(matrix.codes), -1).T.astype(np.int8) - _MIDDLE
    scale = matrix.scale.T.astype(dtype)
    weight = _dequantized(
        graph, node, np.ascontiguousarray(codes).astype(ml_dtypes.int4), scale, {"axis": 0, "block_size": BLOCK}
    )
    product = _insert(graph, node, "MatMul", [x, weight])
    shift = ((_MIDDLE - matrix.zero) * matrix.scale).T
    if np.abs(shift).max() > 0:
        if x not in sums:
            rank = len(x.shape or ())
            shape = np.array([0] * (rank - 1) + [matrix.columns // BLOCK, BLOCK])
            blocks = _insert(graph, node, "Reshape", [x, constant(graph, f"blocks_of_{matrix.columns}_{rank}", shape)])
            sums[x] = _insert(graph, node, "ReduceSum", [blocks, constant(graph, "last_axis", np.array([-1]))], {"keepdims": 0})
        shifted = _insert(graph, node, "MatMul", [sums[x], constant(graph, f"{name}.shift", shift.astype(dtype))])
        product = _insert(graph, node, "Add", [product, shifted])
    _replace(graph, node, product)


def _in_columns(graph: ir.Graph, node: ir.Node, weight: Float32, precision: Precision) -> None:
    """The product of `weight` [out, in] with a scale for each of `out`."""
    x, dtype = _operand(node), _type(node)
    most = _FP8_MOST if precision == "fp8" else _INT8_MOST
    scale = (np.abs(weight).max(1) / np.float32(most)).astype(dtype).astype(np.float32)
    scale[scale == 0] = 1
    steps = (weight / scale[:, None]).T
    if precision == "fp8":
        codes = np.clip(steps, -most, most).astype(ml_dtypes.float8_e4m3fn)
    else:
        codes = np.clip(np.rint(steps), -most, most).astype(np.int8)
    dense = _dequantized(graph, node, np.ascontiguousarray(codes), scale.astype(dtype), {"axis": 1})
    _replace(graph, node, _insert(graph, node, "MatMul", [x, dense]))


def _dequantized(
    graph: ir.Graph,
    node: ir.Node,
    codes: Array,
    scale: Array,
    attributes: dict[str, int],
) -> ir.Value:
    name = node.outputs[0].name
    return _insert(
        graph,
        node,
        "DequantizeLinear",
        [constant(graph, f"{name}.codes", codes), constant(graph, f"{name}.scale", scale)],
        attributes,
    )


def _operand(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return x


def _type(node: ir.Node) -> np.dtype[np.generic]:
    dtype = node.outputs[0].dtype
    assert dtype is not None
    return dtype.numpy()


def _insert(
    graph: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None
) -> ir.Value:
    made = ir.node(op_type, inputs, attributes)
    graph.insert_before(before, made)
    return made.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, product: ir.Value) -> None:
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        product = _insert(graph, node, "Add", [product, node.inputs[2]])
    supersede(graph, node, product)
