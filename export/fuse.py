"""Fewer and larger operators: at batch 1 a step of a small model is as much launching as computing.

Every rewrite is local, exact up to the order of float sums, and asks for nothing but its own pattern:

* rotary embeddings that are written out in halves become one operator (in 16 bits the exporter leaves them so);
* attention takes [batch, seq, heads * dim]: the detours through [batch, heads, seq, dim] around rotary embeddings go;
* a residual sum and the RMS norm that reads it become one operator;
* products of one activation with several weights (q, k and v; gate and up) become one product;
* the only entry of an axis is taken by reshaping, not by copying (the logits, mostly).
"""

import numpy as np
import onnx_ir as ir

from export.graph import constant, supersede

_HEADS_OUT = (0, 2, 1, 3)
"""The permutation between [batch, seq, heads, dim] and [batch, heads, seq, dim]; its own inverse."""
_ELEMENTWISE = {"Cast", "Cos", "Sin", "Mul"}
"""What stands between a table of angles and its cosines or sines."""


def fuse(model: ir.Model) -> None:
    """Rewrite `model` in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Add":
            _turn(graph, node)
    for node in list(graph):
        if node.op_type == "GroupQueryAttention":
            for index in range(3):
                _flatten_heads(graph, node, index)
    for node in list(graph):
        if node.op_type == "Reshape":
            _drop_round_trip(node)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _add_to_norm(graph, node)
        elif node.op_type == "Gather":
            _take_only_entry(graph, node)
    _merge_products(graph)
    model.opset_imports["com.microsoft"] = 1


def _turn(graph: ir.Graph, add: ir.Node) -> None:
    """x * cos + concat(-second half of x, first half of x) * sin -> RotaryEmbedding(x, cos, sin)."""
    plain, turned = (_producer(value, "Mul") for value in add.inputs)
    swapped = _producer(_first(turned), "Concat")
    if plain is None or turned is None or swapped is None or len(swapped.inputs) != 2:
        return
    x, negative, first = plain.inputs[0], _producer(swapped.inputs[0], "Neg"), _producer(swapped.inputs[1], "Slice")
    second = _producer(_first(negative), "Slice")
    if x is None or x.shape is None or len(x.shape) != 4 or first is None or second is None:
        return
    half = x.shape[3] // 2 if isinstance(x.shape[3], int) and x.shape[3] % 2 == 0 else 0
    if not half or any(part.inputs[0] is not x for part in (first, second)):
        return
    if _bounds(first) != (0, half, half) or _bounds(second) != (half, None, half):
        return
    cos, sin = (_half_table(graph, add, factor.inputs[1], half) for factor in (plain, turned))
    if cos is None or sin is None:
        return
    rotary = ir.node("RotaryEmbedding", [x, cos, sin], {"interleaved": 0})
    graph.insert_before(add, rotary)
    supersede(graph, add, rotary.outputs[0])


def _bounds(node: ir.Node) -> tuple[int, int | None, int] | None:
    """Start, end (None past the end) and length of a Slice of a last axis twice as long."""
    numbers = [None if value is None or value.const_value is None else value.const_value.numpy() for value in node.inputs[1:]]
    if len(numbers) < 3 or any(number is None or number.size != 1 for number in numbers):
        return None
    start, end, axis = (int(number.item()) for number in numbers[:3] if number is not None)
    size = node.inputs[0].shape[3] if node.inputs[0] is not None and node.inputs[0].shape is not None else None
    if axis not in (3, -1) or not isinstance(size, int):
        return None
    return start, None if end >= size else end, min(end, size) - start


def _half_table(graph: ir.Graph, before: ir.Node, factor: ir.Value | None, half: int) -> ir.Value | None:
    """The first half [batch, seq, half] of a table of cosines or sines [batch, 1, seq, 2 * half] whose halves are the same."""
    unsqueeze = _producer(factor, "Unsqueeze")
    table = _first(unsqueeze)
    if unsqueeze is None or table is None or unsqueeze.inputs[1] is None or unsqueeze.inputs[1].const_value is None:
        return None
    node = table.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if unsqueeze.inputs[1].const_value.numpy().tolist() != [1] or node is None or node.op_type != "Concat":
        return None
    if len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        return None
    known = next((user for user, _ in table.uses() if user.op_type == "Slice" and user.name == f"half_of_{table.name}"), None)
    if known is not None:
        return known.outputs[0]
    bounds = [constant(graph, f"half.{number}", np.array([number])) for number in (0, half, 2)]
    sliced = ir.node("Slice", [table, *bounds], name=f"half_of_{table.name}")
    graph.insert_after(unsqueeze, sliced)
    return sliced.outputs[0]


def _flatten_heads(graph: ir.Graph, attention: ir.Node, index: int) -> None:
    """Reshape(Transpose(Rotary(Transpose(z)))) -> Rotary(Reshape(z)), for an input of attention."""
    reshape = _producer(attention.inputs[index], "Reshape")
    transpose = _producer(_first(reshape), "Transpose")
    rotary = _producer(_first(transpose), "RotaryEmbedding")
    before = _producer(_first(rotary), "Transpose")
    if reshape is None or transpose is None or rotary is None or before is None:
        return
    if any(tuple(t.attributes["perm"].as_ints()) != _HEADS_OUT for t in (transpose, before)) or len(rotary.inputs) > 3:
        return
    heads = before.inputs[0]
    if heads is None or heads.shape is None or not isinstance(heads.shape[2], int):
        return
    flat = ir.node("Reshape", [heads, reshape.inputs[1]], {"allowzero": 1})
    _describe(flat.outputs[0], reshape.outputs[0])
    interleaved = rotary.attributes.get("interleaved")
    turned = ir.node(
        "RotaryEmbedding",
        [flat.outputs[0], *rotary.inputs[1:]],
        {"num_heads": heads.shape[2], "interleaved": 0 if interleaved is None else interleaved.as_int()},
    )
    dimensions = rotary.attributes.get("rotary_embedding_dim")
    if dimensions is not None:
        turned.attributes.add(dimensions)
    _describe(turned.outputs[0], reshape.outputs[0])
    graph.insert_before(attention, [flat, turned])
    attention.replace_input_with(index, turned.outputs[0])


def _drop_round_trip(node: ir.Node) -> None:
    """Reshape(Reshape(x)) with x's own shape -> x."""
    inner = _producer(node.inputs[0], "Reshape")
    if inner is None:
        return
    source, out = inner.inputs[0], node.outputs[0]
    if source is None or source.shape is None or out.shape is None or out.is_graph_output():
        return
    if all(_same(a, b) for a, b in zip(source.shape, out.shape, strict=False)) and len(source.shape) == len(out.shape):
        ir.convenience.replace_all_uses_with(out, source)


def _add_to_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """RMSNormalization(a + b) -> SkipSimplifiedLayerNormalization(a, b), which gives the sum, too."""
    total, gamma = norm.inputs[0], norm.inputs[1]
    add = _producer(total, "Add")
    axis = norm.attributes.get("axis")
    if add is None or total is None or gamma is None or len(gamma.shape or ()) != 1 or total.is_graph_output():
        return
    if axis is not None and axis.as_int() not in (-1, 2):
        return
    if not total.dtype == gamma.dtype == norm.outputs[0].dtype:  # a factor in float32 over 16-bit sums
        return
    left, right = add.inputs
    shapes = [value.shape for value in (left, right, total) if value is not None]
    if any(shape is None or len(shape) != 3 for shape in shapes):
        return
    if not all(_same(a, b) for shape in shapes[:2] for a, b in zip(shape or (), shapes[2] or (), strict=True)):
        return
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [left, right, gamma],
        {"epsilon": epsilon},
        domain="com.microsoft",
        num_outputs=4,
    )
    normed, _mean, _deviation, summed = fused.outputs
    _mean.name = _deviation.name = ""
    graph.insert_before(add, fused)
    for new, old in ((normed, norm.outputs[0]), (summed, total)):
        name = old.name
        _describe(new, old)
        ir.convenience.replace_all_uses_with(old, new)
        old.name, new.name = f"{name}.unfused", name
    graph.remove(norm, safe=True)
    graph.remove(add, safe=True)


def _take_only_entry(graph: ir.Graph, node: ir.Node) -> None:
    """Gather(x, 0) along an axis of length 1 -> Squeeze(x)."""
    data, index = node.inputs
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if data is None or data.shape is None or index is None or index.const_value is None:
        return
    if data.shape[axis] != 1 or index.const_value.numpy().shape or index.const_value.numpy() != 0:
        return
    taken = ir.node("Squeeze", [data, constant(graph, f"only_entry_{axis}", np.array([axis]))])
    graph.insert_before(node, taken)
    supersede(graph, node, taken.outputs[0])


def _merge_products(graph: ir.Graph) -> None:
    """MatMuls of one activation with constant weights -> one MatMul and a Split."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and _matrix(node.inputs[1]) is not None:
            readers.setdefault(node.inputs[0], []).append(node)
    for x, nodes in readers.items():
        if len(nodes) > 1:
            _merge(graph, x, nodes)


def _merge(graph: ir.Graph, x: ir.Value, nodes: list[ir.Node]) -> None:
    weights = [tensor.numpy() for node in nodes if (tensor := _matrix(node.inputs[1])) is not None]
    joined = np.concatenate(weights, axis=1)
    name = f"{nodes[0].outputs[0].name}.joined"
    weight = constant(graph, f"{name}.weight", joined)
    sizes = constant(graph, f"{name}.sizes", np.array([w.shape[1] for w in weights]))
    product = ir.node("MatMul", [x, weight])
    product.outputs[0].name = name
    if nodes[0].outputs[0].shape is not None:
        product.outputs[0].shape = ir.Shape([*nodes[0].outputs[0].shape.dims[:-1], joined.shape[1]])
        product.outputs[0].type = nodes[0].outputs[0].type
    split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
    graph.insert_before(nodes[0], [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        _describe(part, node.outputs[0])
        part.name = node.outputs[0].name
        ir.convenience.replace_all_uses_with(node.outputs[0], part, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _first(node: ir.Node | None) -> ir.Value | None:
    return node.inputs[0] if node is not None else None


def _matrix(value: ir.Value | None) -> ir.TensorProtocol | None:
    if value is None or value.producer() is not None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value.const_value


def _same(left: object, right: object) -> bool:
    """Two dimensions are the same number or the same symbol."""
    return left == right and str(left) != "None"


def _describe(value: ir.Value, like: ir.Value) -> None:
    value.shape, value.type = like.shape, like.type
