"""Fusing: what is left of a traced model, and that it computes the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export import decoder, fuse, graph, source
from export.recipe import ModelReference

FLOAT = ir.TensorType(ir.DataType.FLOAT)


@pytest.fixture(scope="module")
def traced(tiny_model: Path) -> ir.Model:
    model = source.load(source.fetch(ModelReference(path=str(tiny_model)), tiny_model))
    model_ir: ir.Model = decoder.trace(model, decoder.survey(model))
    graph.tidy(model_ir)
    return model_ir


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_a_llama_layer_keeps_one_product_for_qkv_and_one_for_gate_and_up(traced: ir.Model) -> None:
    """Two layers: each had seven products, two sums, two norms and a detour of four operators an attention input."""
    fused = traced.clone()
    fuse.fuse(fused)
    graph.tidy(fused)
    left = operators(fused)
    assert left["MatMul"] == 2 * 4 + 1
    assert left["Split"] == 2 * 2
    assert left["SkipSimplifiedLayerNormalization"] == 2 * 2
    assert left["RMSNormalization"] == 1
    assert left["Add"] == 0
    assert operators(traced)["Transpose"] >= 8
    assert left["Transpose"] == 1  # of the tied LM head, which ONNX Runtime folds


def test_the_fused_model_computes_the_same(traced: ir.Model, tmp_path: Path) -> None:
    fused = traced.clone()
    fuse.fuse(fused)
    graph.tidy(fused)
    outputs = []
    for name, model in (("plain", traced.clone()), ("fused", fused)):
        (tmp_path / name).mkdir()
        graph.write(model, tmp_path / name)
        session = ort.InferenceSession(tmp_path / name / graph.MODEL)
        feeds: dict[str, object] = {
            "input_ids": np.array([[5, 9, 200]]),
            "position_ids": np.array([[0, 1, 2]]),
            "kv_lengths": np.array([3], np.int32),
            "logit_rows": np.array([0, 2]),
        }
        for node in session.get_inputs():
            if node.name.startswith("past."):
                feeds[node.name] = np.zeros((1, node.shape[1], 8, node.shape[3]), np.float32)
        outputs.append(session.run(None, feeds))
    for plain, other in zip(*outputs, strict=True):
        assert np.abs(plain).max() > 0
        np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-5)


def rms_graph(shape_of_other: list[int | str]) -> ir.Model:
    """RMSNorm(x + y) with y of another shape, both sum and norm read by others."""
    x = ir.Value(name="x", shape=ir.Shape(["b", "s", 8]), type=FLOAT)
    y = ir.Value(name="y", shape=ir.Shape(shape_of_other), type=FLOAT)
    gamma = ir.Value(name="gamma", const_value=ir.tensor(np.full(8, 2, np.float32)), shape=ir.Shape([8]), type=FLOAT)
    add = ir.node("Add", [x, y])
    add.outputs[0].shape, add.outputs[0].type = ir.Shape(["b", "s", 8]), FLOAT
    norm = ir.node("RMSNormalization", [add.outputs[0], gamma], {"axis": -1, "epsilon": 1e-6})
    norm.outputs[0].shape, norm.outputs[0].type = ir.Shape(["b", "s", 8]), FLOAT
    last = ir.node("Mul", [norm.outputs[0], add.outputs[0]])
    last.outputs[0].name = "out"
    last.outputs[0].shape, last.outputs[0].type = ir.Shape(["b", "s", 8]), FLOAT
    made = ir.Graph(
        [x, y],
        last.outputs,
        nodes=[add, norm, last],
        initializers=[gamma],
        opset_imports={"": 23, "com.microsoft": 1},
        name="g",
    )
    return ir.Model(made, ir_version=11)


@pytest.mark.parametrize(("shape", "fuses"), [(["b", "s", 8], True), ([8], False), (["b", 1, 8], False)])
def test_a_sum_is_fused_only_where_nothing_is_broadcast(tmp_path: Path, shape: list[int | str], fuses: bool) -> None:
    chance = np.random.default_rng(0)
    x = chance.normal(size=(2, 3, 8)).astype(np.float32)
    y = chance.normal(size=[{"b": 2, "s": 3, "1": 1, "8": 8}[str(n)] for n in shape]).astype(np.float32)
    results = []
    for fused in (False, True):
        model = rms_graph(shape)
        if fused:
            fuse.fuse(model)
            assert (operators(model)["SkipSimplifiedLayerNormalization"] == 1) == fuses
        ir.save(model, tmp_path / "m.onnx")
        results.append(ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x, "y": y})[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)
