"""export.quantize on small graphs that ONNX Runtime runs: what the quantized graph gives beside the weights it stands for."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export import graph, grid
from export.grid import Float32, Grid
from export.quantize import quantize

VOCAB = 512
WIDTH = 96
OUT = 80
Shape = Sequence[int | str | ir.SymbolicDim]


class Sketch:
    """A graph under construction: inputs, weights and nodes by name."""

    def __init__(self) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": graph.OPSET}, name="sketch")
        self.model = ir.Model(self.graph, ir_version=11)

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def weight(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Shape = (),
        count: int = 1,
        **attributes: int,
    ) -> ir.Value:
        made = ir.node(op_type, inputs, attributes, num_outputs=count)
        self.graph.append(made)
        output = made.outputs[0]
        output.name, output.shape, output.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        for number, other in enumerate(made.outputs[1:], 1):
            other.name, other.type = f"{name}.{number}", ir.TensorType(ir.DataType.INT64)
        return output

    def output(self, *values: ir.Value) -> None:
        self.graph.outputs.extend(values)

    @property
    def operators(self) -> list[str]:
        return [node.op_type for node in self.graph]

    def run(self, folder: Path, **feeds: npt.NDArray[np.generic]) -> list[Float32]:
        """What ONNX Runtime gives for the graph as `graph.write` writes it."""
        graph.write(self.model, folder)
        session = ort.InferenceSession(folder / graph.MODEL, providers=["CPUExecutionProvider"])
        outputs: list[Float32] = session.run(None, feeds)
        return outputs


def normal(*shape: int, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Float32:
    drawn: Float32 = (np.random.default_rng(seed).standard_normal(shape) * scale + offset).astype(np.float32)
    return drawn


def assert_product(got: Float32, x: Float32, weights: Float32, expected: Float32) -> None:
    """`got` is `expected`, which is `x @ weights.T` and perhaps a bias, but for activations in int8 and shifts in 4 bits.

    Activations are rounded a block at a time to steps of peak / 127: each by at most half a step, in random directions, so
    the error of a product is about a step / sqrt(12) for each weight; five times that is allowed.
    """
    steps = np.abs(x).max(-1, keepdims=True) / 127
    tolerance = 5 * steps / np.sqrt(12) * np.sqrt((weights**2).sum(-1))
    # Block sums are activations too, and larger ones.
    tolerance = tolerance + 0.01 * np.linalg.norm(x, axis=-1, keepdims=True) * np.abs(weights).max()
    assert got.shape == expected.shape
    assert (np.abs(got - expected) <= tolerance).all()
    # The tolerance is worth something: other weights fall out of it.
    assert (np.abs(got - np.roll(expected, 1, -1)) > tolerance).mean() > 0.5


def grid_of(matrix: Float32, bits: int) -> Grid:
    return grid.four_bits(matrix) if bits == 4 else grid.eight_bits(matrix)


def projection(sketch: Sketch, x: ir.Value, weight: Float32, kind: str, bias: Float32 | None = None) -> ir.Value:
    """`x @ weight.T`, `weight` [out, in], as exporters write it."""
    shape = [*list(x.shape or ())[:-1], len(weight)]
    if kind == "matmul":
        return sketch.node("MatMul", [x, sketch.weight("w", weight.T.copy())], "y", shape)
    if kind == "transposed":
        turned = sketch.node("Transpose", [sketch.weight("w", weight)], "wt", weight.T.shape)
        return sketch.node("MatMul", [x, turned], "y", shape)
    constants = [] if bias is None else [sketch.weight("b", bias)]
    if kind == "gemm":  # GPT-2's Conv1D: [in, out] and a bias
        return sketch.node("Gemm", [x, sketch.weight("w", weight.T.copy()), *constants], "y", shape)
    return sketch.node("Gemm", [x, sketch.weight("w", weight), *constants], "y", shape, transB=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [96, 80, 33])
@pytest.mark.parametrize(("kind", "biased"), [("matmul", 0), ("transposed", 0), ("gemm", 1), ("transB", 1), ("transB", 0)])
def test_given_a_projection_when_quantized_then_it_gives_the_product_with_its_grid(
    tmp_path: Path, kind: str, biased: int, width: int, bits: int
) -> None:
    x, weight = normal(7, width, seed=1), normal(OUT, width, seed=2, scale=0.1, offset=0.03)
    bias = normal(OUT, seed=3, scale=5) if biased else None
    sketch = Sketch()
    sketch.output(projection(sketch, sketch.input("x", ["n", width]), weight, kind, bias))
    report = quantize(sketch.model, bits, VOCAB)
    graph.tidy(sketch.model)
    (got,) = sketch.run(tmp_path, x=x)
    stood_for = grid_of(weight, bits).weights
    assert_product(got, x, stood_for, x @ stood_for.T + (0 if bias is None else bias))
    assert "MatMulNBits" in sketch.operators
    assert not {"MatMul", "Gemm", "Transpose"} & set(sketch.operators)
    assert (report.matrices, report.weights, report.blocks) == (1, weight.size, OUT * -(-width // 32))


def test_given_four_bits_when_zero_points_are_real_then_the_shift_keeps_them(tmp_path: Path) -> None:
    """What an integer zero point alone would lose shows in a constant input, where its error does not average out."""
    weight = normal(OUT, 64, seed=2, scale=0.02, offset=0.013)
    sketch = Sketch()
    sketch.output(projection(sketch, sketch.input("x", ["n", 64]), weight, "matmul"))
    quantize(sketch.model, 4, VOCAB)
    (got,) = sketch.run(tmp_path, x=np.ones((1, 64), np.float32))
    made = grid.four_bits(weight)
    rounded = made.weights + made.shift.repeat(32, axis=1)
    error = np.abs(got[0] - made.weights.sum(-1))
    assert error.max() < 0.3 * np.abs(rounded.sum(-1) - made.weights.sum(-1)).max()


@pytest.mark.parametrize("leading", [(2, 3), (1,)])
def test_given_inputs_of_other_ranks_when_quantized_then_leading_axes_stay(tmp_path: Path, leading: tuple[int, ...]) -> None:
    x, weight = normal(*leading, WIDTH, seed=1), normal(OUT, WIDTH, seed=2, offset=0.2)
    sketch = Sketch()
    axes = [f"axis{number}" for number in range(len(leading))]
    sketch.output(projection(sketch, sketch.input("x", [*axes, WIDTH]), weight, "matmul"))
    quantize(sketch.model, 4, VOCAB)
    (got,) = sketch.run(tmp_path, x=x)
    stood_for = grid.four_bits(weight).weights
    assert_product(got, x, stood_for, x @ stood_for.T)


def test_given_no_rows_when_a_quantized_projection_runs_then_none_come_out(tmp_path: Path) -> None:
    """A prefill chunk that is not the last wants no logits."""
    sketch = Sketch()
    sketch.output(projection(sketch, sketch.input("x", ["n", WIDTH]), normal(OUT, WIDTH, offset=0.2), "matmul"))
    quantize(sketch.model, 4, VOCAB)
    (got,) = sketch.run(tmp_path, x=np.zeros((0, WIDTH), np.float32))
    assert got.shape == (0, OUT)


def tied(sketch: Sketch, table: Float32) -> None:
    """An embedding and an LM head of one weight: `ids` to `rows`, `x` to `logits`."""
    weight = sketch.weight("embed", table)
    ids = sketch.input("ids", ["n"], ir.DataType.INT64)
    x = sketch.input("x", ["n", table.shape[1]])
    turned = sketch.node("Transpose", [weight], "turned", table.T.shape)
    sketch.output(
        sketch.node("Gather", [weight, ids], "rows", ["n", table.shape[1]]),
        sketch.node("MatMul", [x, turned], "logits", ["n", len(table)]),
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_given_a_tied_embedding_when_quantized_then_rows_are_exact_and_the_head_uses_the_same_numbers(
    tmp_path: Path, bits: int
) -> None:
    table, x = normal(VOCAB, 64, seed=4), normal(5, 64, seed=5)
    sketch = Sketch()
    tied(sketch, table)
    quantize(sketch.model, bits, VOCAB)
    ids = np.array([0, 3, 3, VOCAB - 1, 100], np.int64)
    rows, logits = sketch.run(tmp_path, ids=ids, x=x)
    stood_for = grid.eight_bits(table).weights
    assert np.array_equal(rows, stood_for[ids])
    assert_product(logits, x, stood_for, x @ stood_for.T)


def test_given_a_tied_embedding_when_written_then_its_bytes_are_there_once_and_both_point_at_them(tmp_path: Path) -> None:
    sketch = Sketch()
    tied(sketch, normal(VOCAB, 64))
    quantize(sketch.model, 4, VOCAB)
    graph.tidy(sketch.model)
    graph.write(sketch.model, tmp_path)
    gather = next(node for node in sketch.graph if node.op_type == "GatherBlockQuantized")
    head = next(node for node in sketch.graph if node.op_type == "MatMulNBits")
    places = [(external(gather.inputs[0]), external(gather.inputs[2])), (external(head.inputs[1]), external(head.inputs[2]))]
    assert places[0] == places[1]
    codes, scales = VOCAB * 64, VOCAB * 64 // 32 * 4
    aligned = -(-codes // 4096) * 4096
    assert codes + scales <= (tmp_path / graph.WEIGHTS).stat().st_size <= aligned + scales


def external(value: ir.Value | None) -> tuple[int | None, int | None]:
    """Where a weight lies in the weights' file, and its bytes."""
    assert value is not None
    assert isinstance(value.const_value, ir.ExternalTensor)
    return value.const_value.offset, value.const_value.length


def test_given_an_untied_head_when_quantized_to_four_bits_then_it_gets_eight(tmp_path: Path) -> None:
    sketch = Sketch()
    sketch.output(projection(sketch, sketch.input("x", ["n", 64]), normal(VOCAB, 64), "matmul"))
    quantize(sketch.model, 4, VOCAB)
    (head,) = (node for node in sketch.graph if node.op_type == "MatMulNBits")
    assert head.attributes["bits"].as_int() == 8


def test_given_an_embedding_whose_width_is_no_whole_blocks_when_quantized_then_it_stays_float(tmp_path: Path) -> None:
    table = normal(VOCAB, 80)
    sketch = Sketch()
    weight, ids = sketch.weight("embed", table), sketch.input("ids", ["n"], ir.DataType.INT64)
    sketch.output(sketch.node("Gather", [weight, ids], "rows", ["n", 80]))
    report = quantize(sketch.model, 4, VOCAB)
    (rows,) = sketch.run(tmp_path, ids=np.array([5, 7]))
    assert np.array_equal(rows, table[[5, 7]])
    assert (report.matrices, report.skipped) == (0, table.size)


def test_given_a_position_table_when_quantized_then_it_stays_float(tmp_path: Path) -> None:
    """It is indexed like an embedding, but shorter than the vocabulary; its columns are read, too, in some models."""
    table = normal(VOCAB // 2, 64)
    sketch = Sketch()
    weight, ids = sketch.weight("positions", table), sketch.input("ids", ["n"], ir.DataType.INT64)
    sketch.output(sketch.node("Gather", [weight, ids], "rows", ["n", 64]))
    quantize(sketch.model, 4, VOCAB)
    assert sketch.operators == ["Gather"]


@pytest.mark.parametrize("between", [(), ("Softmax",), ("Sigmoid", "Relu"), ("Softmax", "Sigmoid", "Relu", "Relu")])
def test_given_a_router_when_quantized_then_it_is_left_alone(tmp_path: Path, between: tuple[str, ...]) -> None:
    experts, x = normal(64, WIDTH), normal(9, WIDTH, seed=1)
    original, rewritten = (routed(experts, between) for _ in range(2))
    report = quantize(rewritten.model, 4, VOCAB)
    assert rewritten.operators == original.operators
    assert (report.matrices, report.skipped) == (0, experts.size)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for before, after in zip(original.run(tmp_path / "a", x=x), rewritten.run(tmp_path / "b", x=x), strict=True):
        assert np.array_equal(before, after)


def routed(experts: Float32, between: Sequence[str]) -> Sketch:
    """A product with `experts` that runs through `between` into a TopK."""
    sketch = Sketch()
    value = projection(sketch, sketch.input("x", ["n", WIDTH]), experts, "matmul")
    for number, op_type in enumerate(between):
        value = sketch.node(op_type, [value], f"between{number}", ["n", len(experts)])
    sketch.output(sketch.node("TopK", [value, sketch.weight("k", np.array([4]))], "best", ["n", 4], count=2))
    return sketch


@pytest.mark.parametrize("shape", [(16, WIDTH), (OUT, 16)])
def test_given_a_matrix_with_a_short_side_when_quantized_then_it_is_left_alone(shape: tuple[int, int]) -> None:
    sketch = Sketch()
    sketch.output(projection(sketch, sketch.input("x", ["n", shape[1]]), normal(*shape), "matmul"))
    quantize(sketch.model, 4, VOCAB)
    assert sketch.operators == ["MatMul"]


def scaled_gemm(sketch: Sketch, x: ir.Value) -> ir.Value:
    node = ir.node("Gemm", [x, sketch.weight("w", normal(WIDTH, OUT))], {"alpha": 0.5})
    sketch.graph.append(node)
    return node.outputs[0]


def product_of_inputs(sketch: Sketch, x: ir.Value) -> ir.Value:
    return sketch.node("MatMul", [x, sketch.input("other", [WIDTH, OUT])], "y", ["n", OUT])


def stacked_experts(sketch: Sketch, x: ir.Value) -> ir.Value:
    return sketch.node("MatMul", [x, sketch.weight("w", normal(3, WIDTH, OUT))], "y", [3, "n", OUT])


@pytest.mark.parametrize("build", [scaled_gemm, product_of_inputs, stacked_experts])
def test_given_a_product_that_is_no_plain_projection_when_quantized_then_it_is_left_alone(
    build: Callable[[Sketch, ir.Value], ir.Value],
) -> None:
    sketch = Sketch()
    sketch.output(build(sketch, sketch.input("x", ["n", WIDTH])))
    before = sketch.operators
    quantize(sketch.model, 4, VOCAB)
    assert sketch.operators == before


@pytest.mark.parametrize("width", [WIDTH, 80])
def test_given_three_projections_of_one_input_when_quantized_then_its_block_sums_are_made_once(
    tmp_path: Path, width: int
) -> None:
    sketch = Sketch()
    x = sketch.input("x", ["n", width])
    weights = {name: normal(OUT, width, seed=seed, offset=0.2) for seed, name in enumerate("qkv")}
    for name, weight in weights.items():
        sketch.output(sketch.node("MatMul", [x, sketch.weight(f"w{name}", weight.T.copy())], name, ["n", OUT]))
    quantize(sketch.model, 4, VOCAB)
    assert [sketch.operators.count(name) for name in ("Concat", "ReduceSum", "MatMulNBits")] == [1, 1, 3]
    given = normal(6, width, seed=9)
    for got, weight in zip(sketch.run(tmp_path, x=given), weights.values(), strict=True):
        stood_for = grid.four_bits(weight).weights
        assert_product(got, given, stood_for, given @ stood_for.T)


def test_given_a_chain_of_projections_when_quantized_then_each_reads_the_one_before(tmp_path: Path) -> None:
    first, second = normal(OUT, WIDTH, seed=1, offset=0.1), normal(64, OUT, seed=2, offset=0.1)
    sketch = Sketch()
    middle = sketch.node("MatMul", [sketch.input("x", ["n", WIDTH]), sketch.weight("w1", first.T.copy())], "h", ["n", OUT])
    end = sketch.node("MatMul", [middle, sketch.weight("w2", second.T.copy())], "y", ["n", 64])
    sketch.output(middle, end)
    quantize(sketch.model, 4, VOCAB)
    assert [value.name for value in sketch.graph.outputs] == ["h", "y"]
    x = normal(4, WIDTH, seed=3)
    h, y = sketch.run(tmp_path, x=x)
    for got, given, weight in ((h, x, first), (y, h, second)):
        stood_for = grid.four_bits(weight).weights
        assert_product(got, given, stood_for, given @ stood_for.T)


def test_given_weights_of_equal_bytes_when_written_then_they_are_stored_once_whatever_their_shape(tmp_path: Path) -> None:
    table = normal(64, 32)
    sketch = Sketch()
    x = sketch.input("x", ["n", 64])
    sketch.output(
        sketch.node("MatMul", [x, sketch.weight("a", table)], "y", ["n", 32]),
        sketch.node("MatMul", [x, sketch.weight("b", table.reshape(64, 2, 16)[:, 0])], "z", ["n", 16]),
        sketch.node("MatMul", [x, sketch.weight("c", table.copy())], "again", ["n", 32]),
        sketch.node("Reshape", [sketch.weight("d", table.reshape(32, 64)), sketch.weight("flat", np.array([-1]))], "f", ["m"]),
    )
    given = normal(3, 64, seed=1)
    y, z, again, flat = sketch.run(tmp_path, x=given)
    assert (tmp_path / graph.WEIGHTS).stat().st_size == 8192 + 64 * 16 * 4
    assert np.allclose(y, given @ table, atol=1e-4)
    assert np.array_equal(y, again)
    assert np.allclose(z, given @ table[:, :16], atol=1e-4)
    assert np.array_equal(flat, table.ravel())
