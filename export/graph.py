"""Graph passes that every variant takes, and the way a graph is written to disk."""

import hashlib
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from export.cache import LATER_DOMAIN

WEIGHTS = "weights.bin"
MODEL = "model.onnx"
OPSET = 24
"""Graphs are traced at opset 23, where RMSNormalization and RotaryEmbedding stay whole, and then declared 24, which adds
TensorScatter and changes none of the operators that they hold."""

_INLINE_LIMIT = 1024
"""Bytes up to which an initializer stays in the graph's own file."""
_ALIGNMENT = 4096
"""Of weights in their file, so that they can be mapped by pages."""


def tidy(model: ir.Model) -> None:
    """Merge equal subgraphs (each layer traces its own rotary table), drop what nothing reads, and declare `OPSET`."""
    common.CommonSubexpressionEliminationPass(size_limit=64)(model)
    common.RemoveUnusedNodesPass()(model)
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


def _drop_unused_inputs(graph: ir.Graph) -> None:
    kept = [value for value in graph.inputs if value.uses() or value in graph.outputs]
    graph.inputs.clear()
    graph.inputs.extend(kept)


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
    (folder / MODEL).write_bytes(ir.serde.serialize_model(model).SerializeToString())
