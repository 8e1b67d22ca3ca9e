"""export.grid: weights that were quantized once come back exactly; others come back within half a step."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from export import grid
from export.grid import BLOCK, Float32, Grid

Q4_0, Q4_1, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
KINDS = [Q4_0, Q4_1, Q8_0]
ROUNDING = 1e-6
"""Of the block's largest weight: float32's own rounding in (code - zero) * scale."""


def quantized(kind: GGMLQuantizationType, matrix: Float32) -> Float32:
    """`matrix` as a GGUF holds it, read back."""
    back: Float32 = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
    return back


def found(kind: GGMLQuantizationType, matrix: Float32) -> Grid:
    """The grid with the bits that `kind` has."""
    return grid.eight_bits(matrix) if kind == Q8_0 else grid.four_bits(matrix)


def normal(rows: int = 24, columns: int = 256, scale: float = 0.05, seed: int = 0) -> Float32:
    drawn: Float32 = (np.random.default_rng(seed).standard_normal((rows, columns)) * scale).astype(np.float32)
    return drawn


def peaks(matrix: Float32) -> Float32:
    """The largest magnitude of each weight's block, at every weight."""
    rows, columns = matrix.shape
    padded = np.pad(np.abs(matrix), ((0, 0), (0, -columns % BLOCK)))
    each: Float32 = padded.reshape(rows, -1, BLOCK).max(-1).repeat(BLOCK, axis=1)[:, :columns]
    return each


def assert_carried(kind: GGMLQuantizationType, matrix: Float32) -> None:
    """Every block of `matrix` is found to lie on a grid, and the grid stands for the same weights."""
    carried = found(kind, matrix)
    assert carried.exact == 1.0
    assert (np.abs(carried.weights - matrix) <= ROUNDING * peaks(matrix)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_given_gguf_weights_when_their_grid_is_sought_then_they_come_back_exactly(
    kind: GGMLQuantizationType, seed: int
) -> None:
    assert_carried(kind, quantized(kind, normal(rows=96, columns=512, seed=seed)))


@pytest.mark.parametrize("kind", KINDS)
def test_given_permuted_rows_when_their_grid_is_sought_then_the_codes_are_permuted_with_them(
    kind: GGMLQuantizationType,
) -> None:
    matrix = quantized(kind, normal())
    order = np.random.default_rng(1).permutation(len(matrix))
    assert_carried(kind, matrix[order])
    assert np.array_equal(found(kind, matrix[order]).codes, found(kind, matrix).codes[order])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 50.0, 1e3])
def test_given_any_scale_that_a_gguf_can_hold_when_sought_then_the_grid_is_found(
    kind: GGMLQuantizationType, scale: float
) -> None:
    assert_carried(kind, quantized(kind, normal(scale=scale)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75, 1e-30, -3e4])
def test_given_constant_blocks_when_quantized_then_they_stay_that_constant(kind: GGMLQuantizationType, value: float) -> None:
    assert_carried(kind, np.full((3, 2 * BLOCK), value, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_given_constant_and_zero_blocks_among_others_when_sought_then_all_are_found(kind: GGMLQuantizationType) -> None:
    matrix = normal()
    matrix[:, :BLOCK] = 0
    matrix[::2, BLOCK : 2 * BLOCK] = 0.5
    assert_carried(kind, quantized(kind, matrix))


@pytest.mark.parametrize("levels", [2, 3, 5, 11])
@pytest.mark.parametrize("offset", [0.0, 0.37, -4.1])
@pytest.mark.parametrize("step", [0.03125, 0.0123])  # the other one is rounded
def test_given_blocks_that_use_few_levels_of_a_q4_1_grid_when_sought_then_they_come_back(
    levels: int, offset: float, step: float
) -> None:
    codes = np.random.default_rng(levels).integers(0, levels, (16, 4 * BLOCK))
    assert_carried(Q4_1, (codes * np.float32(step) + np.float32(offset)).astype(np.float32))


def test_given_random_codes_and_sixteen_bit_scales_when_sought_then_they_come_back() -> None:
    """Blocks as no quantizer makes them: codes that leave out the ends of the range."""
    draw = np.random.default_rng(5)
    low = draw.integers(0, 8, (200, 4, 1))
    codes = low + draw.integers(0, 8, (200, 4, BLOCK))
    scale = draw.lognormal(-4, 1, (200, 4, 1)).astype(np.float16).astype(np.float32)
    minimum = draw.normal(0, 0.1, (200, 4, 1)).astype(np.float16).astype(np.float32)
    assert_carried(Q4_1, (codes * scale + minimum).reshape(200, -1).astype(np.float32))


def test_given_weights_that_were_never_quantized_when_sought_then_no_grid_is_claimed() -> None:
    assert grid.four_bits(normal()).exact == 0.0
    assert grid.eight_bits(normal()).exact == 0.0


def test_given_a_matrix_that_is_quantized_in_part_when_sought_then_that_part_is_carried() -> None:
    matrix = normal(rows=40)
    matrix[:10] = quantized(Q4_1, matrix[:10])
    carried = grid.four_bits(matrix)
    assert carried.exact == pytest.approx(0.25)
    assert (np.abs(carried.weights - matrix)[:10] <= ROUNDING * peaks(matrix)[:10]).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    columns=st.integers(1, 100),
    exponent=st.integers(-30, 30),
    offset=st.floats(-3, 3, width=32),
)
@settings(max_examples=150, deadline=None)
def test_given_any_weights_when_quantized_then_the_error_is_at_most_half_a_step(
    seed: int, rows: int, columns: int, exponent: int, offset: float
) -> None:
    matrix = ((normal(rows, columns, 1.0, seed) + np.float32(offset)) * np.float32(2.0**exponent)).astype(np.float32)
    for made in (grid.four_bits(matrix), grid.eight_bits(matrix)):
        assert made.weights.shape == matrix.shape
        half = made.scale.repeat(BLOCK, axis=1)[:, :columns] / 2
        assert (np.abs(made.weights - matrix) <= half * (1 + 1e-4) + ROUNDING * peaks(matrix)).all()


@pytest.mark.parametrize("columns", [1, 31, 33, 80])
def test_given_a_last_block_that_is_not_whole_when_quantized_then_its_padding_stands_for_zero(columns: int) -> None:
    for made in (grid.four_bits(normal(columns=columns) + np.float32(5)), grid.eight_bits(normal(columns=columns))):
        assert made.codes.shape == (24, -(-columns // BLOCK), BLOCK)
        assert made.weights.shape == (24, columns)
        values = ((made.codes - made.zero[..., None]) * made.scale[..., None]).reshape(24, -1)
        assert np.abs(values[:, columns:]).max(initial=0) <= made.scale.max() / 2


@pytest.mark.parametrize("value", [1e38, 1e-37, 1e-41, 1e-44])
def test_given_weights_at_the_ends_of_float32_when_quantized_then_nothing_overflows(value: float) -> None:
    matrix = np.full((1, BLOCK), value, np.float32)
    matrix[0, ::2] *= -1
    for made in (grid.four_bits(matrix), grid.eight_bits(matrix)):
        assert np.isfinite(made.weights).all()
        assert np.isfinite(made.shift).all()
        assert np.abs(made.weights - matrix).max() <= max(value / 7, 1e-44)


@given(
    seed=st.integers(0, 2**32 - 1), columns=st.sampled_from([32, 64, 96, 1000, 1056]), spread=st.sampled_from([0.0, 0.01, 0.3])
)
@settings(max_examples=60, deadline=None)
def test_given_a_zero_point_that_was_rounded_when_shifted_then_it_is_back_to_a_thirtieth_of_a_step(
    seed: int, columns: int, spread: float
) -> None:
    matrix = normal(8, columns, 0.05, seed) + np.float32(0.02)
    matrix *= np.exp(np.random.default_rng(seed).normal(0, spread, matrix.shape[0]))[:, None].astype(np.float32)
    made = grid.four_bits(matrix)
    codes, scale, zero = grid.shift_codes(made.shift)
    assert codes.shape == (8, -(-made.scale.shape[1] // BLOCK), BLOCK)
    shift = ((codes - zero[..., None].astype(np.float32)) * scale[..., None]).reshape(8, -1)[:, : made.scale.shape[1]]
    whole = made.integer_zero.astype(np.float32)
    rebuilt = (made.codes - whole[..., None]) * made.scale[..., None] + shift[..., None]
    error = np.abs(rebuilt.reshape(8, -1)[:, :columns] - made.weights)
    # A row of 32 shifts shares one scale, which the largest step among them sets: at most a step wide, in 15 levels.
    group = made.scale.max(-1, keepdims=True)
    assert (error <= group / 28).all()
    # Without the shift it would be half a step.
    assert np.abs(made.shift).max() > group.max() / 10


@pytest.mark.parametrize("kind", [Q4_0, Q8_0])
def test_given_weights_around_zero_when_their_zero_point_is_rounded_then_nothing_is_left_to_shift(
    kind: GGMLQuantizationType,
) -> None:
    """What makes a symmetric matrix need no block sums."""
    made = found(kind, quantized(kind, normal()))
    assert np.abs(made.shift).max() <= 1e-3 * made.scale.max()


def test_given_blocks_far_from_zero_when_the_zero_point_is_clipped_then_the_shift_makes_up_for_it() -> None:
    made = grid.four_bits(normal() + np.float32(9))
    assert made.integer_zero.max() == 0
    whole = made.integer_zero.astype(np.float32)
    rebuilt = (made.codes - whole[..., None]) * made.scale[..., None] + made.shift[..., None]
    assert np.abs(rebuilt.reshape(24, -1) - made.weights).max() < 1e-5


def test_given_four_bit_codes_when_packed_then_the_first_of_two_is_in_the_low_bits() -> None:
    packed = grid.pack(np.array([[1, 2, 15, 0, 7, 8]], np.uint8), 4)
    assert packed.tolist() == [[0x21, 0x0F, 0x87]]


def test_given_an_odd_count_of_four_bit_codes_when_packed_then_a_zero_is_added() -> None:
    assert grid.pack(np.array([[1, 2, 3], [4, 5, 6]], np.uint8), 4).tolist() == [[0x21, 0x03], [0x54, 0x06]]


def test_given_eight_bit_codes_when_packed_then_they_are_bytes_already() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    assert np.array_equal(grid.pack(codes, 8), codes)
