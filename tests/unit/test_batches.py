"""export.batches on small graphs that ONNX Runtime runs: products for many rows beside those of the weights themselves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export import batches, graph, grid
from export.grid import Float32
from tests.unit.test_quantize import VOCAB, Sketch, normal, projection

WIDTH = 96
OUT = 80


def normed(sketch: Sketch, x: ir.Value, factor: Float32, kind: str, shape: Sequence[int | str]) -> ir.Value:
    """`x` as the operator `kind` normalizes it."""
    weight = sketch.weight("factor", factor)
    if kind == "RMSNormalization":
        return sketch.node(kind, [x, weight], "normed", shape, axis=-1)
    offset = sketch.weight("offset", normal(len(factor), seed=9))
    return sketch.node(kind, [x, weight, offset], "normed", shape, axis=-1)


def reference(x: Float32, kind: str, factor: Float32) -> Float32:
    """What `normed` computes."""
    if kind == "none":
        return x
    if kind == "LayerNormalization":
        x = x - x.mean(-1, keepdims=True)
    scaled: Float32 = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * factor
    return scaled + (normal(len(factor), seed=9) if kind == "LayerNormalization" else 0)


def wide(kind: str, form: str, biased: bool, weight: Float32, factor: Float32) -> Sketch:
    """A product for many rows of `x` [rows, WIDTH], as it is or after a norm."""
    sketch = Sketch()
    x = sketch.input("x", ["n", WIDTH])
    if kind != "none":
        x = normed(sketch, x, factor, kind, ["n", WIDTH])
    sketch.output(projection(sketch, x, weight, form, normal(OUT, seed=3, scale=5) if biased else None))
    batches.widen(sketch.model)
    graph.tidy(sketch.model)
    return sketch


@pytest.mark.parametrize("kind", ["none", "RMSNormalization", "LayerNormalization"])
@pytest.mark.parametrize(("form", "biased"), [("matmul", False), ("transposed", False), ("gemm", True), ("transB", True)])
def test_a_product_for_many_rows_is_that_of_its_weights(tmp_path: Path, kind: str, form: str, biased: bool) -> None:
    """Rows of any size, one of them far from the others and one with an outlier: each is rounded by itself."""
    x, weight, factor = normal(7, WIDTH, seed=1), normal(OUT, WIDTH, seed=2, scale=0.1), 1 + normal(WIDTH, seed=4, scale=0.3)
    x[1] *= 1000
    x[2] *= 0.001
    x[3, 5] = 300
    x[4] = 0
    sketch = wide(kind, form, biased, weight, factor)
    (got,) = sketch.run(tmp_path, x=x)

    codes, scale = batches.columns(weight)
    stood_for = (codes.astype(np.float32) * scale).T
    assert np.abs(stood_for - weight).max() <= np.abs(weight).max() / 127 / 2 * 1.001
    activations = reference(x, kind, factor)
    bias = normal(OUT, seed=3, scale=5) if biased else 0
    expected = activations @ stood_for.T + bias
    largest = np.sqrt(WIDTH) * (np.sqrt((activations**2).mean(-1, keepdims=True)) if kind == "none" else 4)
    step = largest / 63 / 126
    # Each activation is off by half a fine step at most, in random directions: five standard deviations of their sum.
    tolerance = 5 * step / np.sqrt(12) * np.linalg.norm(stood_for, axis=-1) + 1e-4 * np.abs(expected) + 1e-6
    assert (np.abs(got - expected) <= tolerance).all()
    moved = np.abs(got - np.roll(expected, 1, -1)) > tolerance
    assert moved[[0, 1, 3]].mean() > 0.9  # the tolerance is worth something: other weights fall out of it
    assert "MatMulIntegerToFloat" in sketch.operators
    assert not {"MatMul", "Gemm", "MatMulNBits"} & set(sketch.operators)
    assert ("SimplifiedLayerNormalization" in sketch.operators) == (kind == "none")


@pytest.mark.parametrize("kind", ["none", "RMSNormalization"])
def test_a_row_gets_the_same_bits_in_every_batch(tmp_path: Path, kind: str) -> None:
    x, weight = normal(33, WIDTH, seed=1), normal(OUT, WIDTH, seed=2, scale=0.1)
    x[20] *= 1e4
    sketch = wide(kind, "matmul", False, weight, np.ones(WIDTH, np.float32))
    graph.write(sketch.model, tmp_path)
    session = ort.InferenceSession(tmp_path / graph.MODEL)
    (together,) = session.run(None, {"x": x})
    for rows in (slice(0, 1), slice(3, 5), slice(5, 21), slice(1, 33)):
        (apart,) = session.run(None, {"x": x[rows]})
        assert np.array_equal(apart, together[rows])


def test_given_no_rows_then_none_come_out(tmp_path: Path) -> None:
    """A prefill chunk that is not the last wants no logits."""
    sketch = wide("none", "matmul", False, normal(OUT, WIDTH), np.ones(WIDTH, np.float32))
    (got,) = sketch.run(tmp_path, x=np.zeros((0, WIDTH), np.float32))
    assert got.shape == (0, OUT)


def step(table: Float32, weight: Float32) -> Sketch:
    """A model of one projection: `input_ids` [batch, seq] to `logits` of a tied head, with a state that passes through."""
    sketch = Sketch()
    ids = sketch.input("input_ids", ["b", "s"], ir.DataType.INT64)
    embedding = sketch.weight("embed", table)
    x = sketch.node("Gather", [embedding, ids], "rows", ["b", "s", table.shape[1]])
    turned = sketch.node("Transpose", [embedding], "turned", table.T.shape)
    y = sketch.node("MatMul", [x, sketch.weight("w", weight.T.copy())], "y", ["b", "s", len(weight)])
    sketch.output(sketch.node("MatMul", [y, turned], "logits", ["b", "s", len(table)]))
    return sketch


def test_one_token_and_many_take_their_own_products(tmp_path: Path) -> None:
    table, weight = normal(VOCAB, 64, seed=4), normal(64, 64, seed=5, scale=0.1, offset=0.05)
    sketch = step(table, weight)
    report = batches.quantize_both(sketch.model, 4, VOCAB)
    graph.tidy(sketch.model)
    assert sketch.operators == ["Size", "GreaterOrEqual", "If"]
    choice = next(node for node in sketch.graph if node.op_type == "If")
    one, many = ({node.op_type for node in choice.attributes[name].as_graph()} for name in ("else_branch", "then_branch"))
    assert "MatMulNBits" in one - many
    assert "MatMulIntegerToFloat" in many - one
    assert (report.matrices, report.weights) == (3, 2 * table.size + weight.size)

    ids = np.array([[3, 100, 3]], np.int64)
    graph.write(sketch.model, tmp_path)
    session = ort.InferenceSession(tmp_path / graph.MODEL)
    (three,) = session.run(None, {"input_ids": ids})
    singles = [session.run(None, {"input_ids": ids[:, at : at + 1]})[0] for at in range(3)]
    rows = grid.eight_bits(table).weights
    expected = rows[ids] @ weight.T @ rows.T
    assert np.array_equal(three[0, 0], three[0, 2])
    assert np.array_equal(singles[0], singles[2])
    assert not np.array_equal(three[:, :1], singles[0])  # other kernels round otherwise
    scale = np.abs(expected).max()
    assert np.abs(three - expected).max() < 0.02 * scale
    assert np.abs(np.concatenate(singles, 1) - expected).max() < 0.1 * scale


def test_what_cannot_be_quantized_is_left_without_a_choice() -> None:
    sketch = Sketch()
    ids = sketch.input("input_ids", ["b", "s"], ir.DataType.INT64)
    sketch.output(sketch.node("Cast", [ids], "logits", ["b", "s"], to=int(ir.DataType.FLOAT)))
    batches.quantize_both(sketch.model, 4, VOCAB)
    assert sketch.operators == ["Cast"]


def test_weights_of_the_embedding_are_written_once(tmp_path: Path) -> None:
    """Both branches read one embedding; each has the head's and the projection's bytes in its own form."""
    table, weight = normal(VOCAB, 64, seed=4), normal(64, 64, seed=5)
    sketch = step(table, weight)
    batches.quantize_both(sketch.model, 4, VOCAB)
    graph.tidy(sketch.model)
    graph.write(sketch.model, tmp_path)
    names: npt.NDArray[np.str_] = np.array(list(sketch.graph.initializers))
    assert sum(name.endswith(".codes") and not name.startswith("many.") for name in names.tolist()) == 3
    assert sum(name.startswith("many.") and name.endswith(".codes") for name in names.tolist()) == 2
    assert "embed" not in names
