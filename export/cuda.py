"""What ONNX Runtime's CUDA provider wants of a graph, beyond what the CPU's takes."""

import onnx_ir as ir

from export import grid, quantize, sampler
from export.graph import constant, merge_equal, supersede

LONGEST = "kv_longest"
"""The input [] int32, in host memory, that holds the largest of `kv_lengths`."""


def finish(model: ir.Model, vocab: int, *, int4: bool) -> quantize.Report | None:
    """Turn a traced and fused step into the graph that is run on CUDA, in place; a report where it was quantized."""
    report = quantize_products(model, vocab) if int4 else None
    sampler.append_choice(model, vocab)
    prepare(model)
    return report


def prepare(model: ir.Model) -> None:
    """Leave nothing to the CPU, in place: each hand-over costs a wait, and a CUDA graph cannot be recorded across one.

    GroupQueryAttention reads the longest slot's length from host memory, so it comes as an input instead of being computed.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "ReduceMax" and node.inputs[0] is not None and node.inputs[0].name == "kv_lengths":
            longest = ir.Value(name=LONGEST, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
            graph.inputs.append(longest)
            ir.convenience.replace_all_uses_with(node.outputs[0], longest)
            graph.remove(node, safe=True)
        elif node.op_type == "RMSNormalization":
            node.op_type = "SimplifiedLayerNormalization"  # the same, under the name that has a CUDA kernel


def quantize_products(model: ir.Model, vocab: int) -> quantize.Report:
    """Give `model`'s products weights in 4 bits, in blocks with real zero points; the LM head in 8, in place.

    The kernels take a zero point of 4 bits in the activations' own type, so a GGUF's blocks are carried over as they are.
    """
    merge_equal(model)
    report = quantize.Report()
    for node in list(model.graph):
        weight = quantize.constant_weight(node)
        if weight is None:
            continue
        if quantize.stays(node, weight):
            report.skipped += weight.size
            continue
        bits = grid.eight_bits if weight.shape[0] >= vocab else grid.four_bits
        matrix = bits(weight, grid.ROUNDED)
        report.count(matrix)
        _replace(model.graph, node, matrix)
    model.opset_imports["com.microsoft"] = 1
    return report


def _replace(graph: ir.Graph, node: ir.Node, matrix: grid.Grid) -> None:
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None
    assert old.dtype is not None
    dtype = old.dtype.numpy()
    operands: list[ir.Value | None] = [
        x,
        constant(graph, f"{old.name}.codes", grid.pack(matrix.codes, matrix.bits)),
        constant(graph, f"{old.name}.scale", matrix.scale.astype(dtype)),
        constant(graph, f"{old.name}.zero", matrix.integer_zero if matrix.bits == 8 else matrix.zero.astype(dtype)),
    ]
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        operands += [None, node.inputs[2]]
    attributes = {"K": matrix.columns, "N": len(matrix.codes), "bits": matrix.bits, "block_size": grid.BLOCK}
    product = ir.node("MatMulNBits", operands, attributes, domain="com.microsoft", name=node.name)
    graph.insert_before(node, product)
    supersede(graph, node, product.outputs[0])
