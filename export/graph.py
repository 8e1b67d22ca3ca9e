"""Graph passes that every variant takes, and the way a graph is written to disk."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from export.cache import LATER_DOMAIN

WEIGHTS = "weights.bin"
MODEL = "model.onnx"
SAMPLER = "sampler.onnx"
ADORNED = "adorned.onnx"
"""The sampler that takes masks and adjustments, too."""
OPSET = 24
"""Graphs are traced at opset 23, where RMSNormalization and RotaryEmbedding stay whole, and then declared 24, which adds
TensorScatter and changes none of the operators that they hold."""

_INLINE_LIMIT = 1024
"""Bytes up to which an initializer stays in the graph's own file."""
_ALIGNMENT = 4096
"""Of weights in their file, so that they can be mapped by pages."""


def constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """The initializer `name` of `graph`: the one that is there already, else `array` under that name."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def supersede(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Have `value` stand, under its name, for the only output of `node`, which is removed."""
    old = node.outputs[0]
    name = old.name
    value.shape, value.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name


def merge_equal(model: ir.Model) -> None:
    """Merge equal subgraphs (each layer traces its own rotary table) and drop what nothing reads."""
    common.CommonSubexpressionEliminationPass(size_limit=64)(model)
    common.RemoveUnusedNodesPass()(model)


def tidy(model: ir.Model) -> None:
    """Merge what is equal, drop what nothing reads, and declare `OPSET`."""
    merge_equal(model)
    _drop_unused_inputs(model.graph)
    for node in model.graph.all_nodes():
        if node.domain == LATER_DOMAIN:
            node.domain = ""
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.opset_imports[""] = OPSET
    common.RemoveUnusedOpsetsPass()(model)


def widen_bfloat16(graph: ir.Graph) -> None:
    """Compute in float32 what a float32 model computes in bfloat16, and round it afterwards: the CPU's kernels have no such
    arithmetic. Falcon's ALiBi is such a product.
    """
    for node in [node for node in graph if node.op_type != "Cast"]:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                wide = _cast(value, ir.DataType.FLOAT, f"{node.name}.wide_{index}")
                graph.insert_before(node, wide)
                node.replace_input_with(index, wide.outputs[0])
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
                rounded = _cast(value, ir.DataType.BFLOAT16, f"{value.name}.rounded")
                for user, index in [use for use in value.uses() if use.node is not rounded]:
                    user.replace_input_with(index, rounded.outputs[0])
                graph.insert_after(node, rounded)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to}, name=name)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(to)
    return node


def _drop_unused_inputs(graph: ir.Graph) -> None:
    kept = [value for value in graph.inputs if value.uses() or value in graph.outputs]
    graph.inputs.clear()
    graph.inputs.extend(kept)


def step_bytes(model: ir.Model) -> int:
    """Bytes of weights that a step of one token reads: not tables of which it takes a row, nor what only more tokens need."""
    outputs = set(model.graph.outputs)
    choice = next((node for node in model.graph if node.op_type == "If" and outputs.intersection(node.outputs)), None)
    nodes = model.graph if choice is None else choice.attributes["else_branch"].as_graph()
    read = {
        value: value.const_value.nbytes
        for node in nodes
        if not node.op_type.startswith("Gather")
        for value in node.inputs
        if value is not None and value.is_initializer() and value.const_value is not None
    }
    return sum(read.values())


def write_whole(model: ir.Model, path: Path) -> None:
    """Write `model`, whose weights are small, into the one file `path`."""
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())


def write(model: ir.Model, folder: Path) -> None:
    """Write `model.onnx` and `weights.bin` into `folder`; weights of equal bytes are stored once, whatever their shapes."""
    offsets: dict[bytes, int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _INLINE_LIMIT:
                continue
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in offsets:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                offsets[digest] = file.tell()
                file.write(data)
            shape, name = ir.Shape(tensor.numpy().shape), value.name or ""
            value.const_value = ir.ExternalTensor(
                WEIGHTS, offsets[digest], len(data), tensor.dtype, shape=shape, name=name, base_dir=folder
            )
    write_whole(model, folder / MODEL)
