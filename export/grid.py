"""Block grids: 32 neighbouring weights as small integers, one scale and one zero point.

A weight is (code - zero) * scale. Where the weights of a block already lie on such a grid, because they were quantized
once (a GGUF's Q4_0, Q4_1 or Q8_0 block, say), the grid is found again and carried over as it is, whatever file format or
row permutation stood between. Otherwise the block's extremes span the grid.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 32
"""Weights that share a scale; GGUF's own block length, and one that MatMulNBits takes."""

EXACT = 2e-3
"""How far from an integer, in steps of the grid, a float32 weight may lie that was computed from 16-bit scales."""
ROUNDED = 0.1
"""The same for weights that were rounded to float16, by up to a 2048th of themselves. That 32 weights lie so near to a grid of
some other step is no matter of chance."""
_SAMPLE = 1000
"""Blocks that are looked at first: weights that were never quantized fit no grid, and the search ends there."""
_SHIFT_BITS = 4

Float32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """A matrix [rows, columns] in blocks along its columns, padded to whole blocks."""

    bits: int
    codes: Codes
    """[rows, blocks, BLOCK]"""
    scale: Float32
    """[rows, blocks]"""
    zero: Float32
    """[rows, blocks]: real, in units of codes."""
    columns: int
    exact: float
    """Share of blocks that lay on a grid already and are carried over as they were."""

    @property
    def integer_zero(self) -> Codes:
        """[rows, blocks]: the zero point as the fast kernels want it."""
        return np.clip(np.rint(self.zero), 0, 2**self.bits - 1).astype(np.uint8)

    @property
    def shift(self) -> Float32:
        """[rows, blocks]: what `integer_zero` leaves out of each weight of a block: (integer_zero - zero) * scale."""
        shift: Float32 = ((self.integer_zero - self.zero) * self.scale).astype(np.float32)
        return shift

    @property
    def weights(self) -> Float32:
        """[rows, columns]: the matrix that the grid stands for."""
        values = (self.codes - self.zero[..., None]) * self.scale[..., None]
        matrix: Float32 = values.reshape(len(values), -1)[:, : self.columns].astype(np.float32)
        return matrix


def four_bits(matrix: Float32, tolerance: float = EXACT) -> Grid:
    """16 levels a block, with a real zero point; `matrix` is [rows, columns]."""
    blocks = _blocks(matrix)
    low = blocks.min(-1)
    spread = blocks.max(-1) - low
    scale = _step(spread, 15)
    exact = _find_steps(blocks - low[..., None], spread, scale, range(15, 0, -1), tolerance)
    codes = np.clip(np.rint((blocks - low[..., None]) / scale[..., None]), 0, 15).astype(np.uint8)
    return Grid(4, codes, scale, (-low / scale).astype(np.float32), matrix.shape[1], exact)


def eight_bits(matrix: Float32, tolerance: float = EXACT) -> Grid:
    """255 levels a block around zero, as GGUF's Q8_0; `matrix` is [rows, columns]."""
    blocks = _blocks(matrix)
    peak = np.abs(blocks).max(-1)
    scale = _step(peak, 127)
    exact = _find_steps(blocks, peak, scale, range(127, 112, -1), tolerance)
    codes = (np.clip(np.rint(blocks / scale[..., None]), -127, 127) + 128).astype(np.uint8)
    return Grid(8, codes, scale, np.full_like(scale, 128), matrix.shape[1], exact)


def shift_codes(shift: Float32) -> tuple[Codes, Float32, Codes]:
    """`shift` [rows, blocks] as rows of a 4-bit matrix with an integer zero: codes, scale, zero, in blocks of BLOCK.

    Four bits are plenty: shifts are at most half a step, so this places a block's zero point to a thirtieth of a step.
    """
    blocks = _blocks(shift)
    levels = 2**_SHIFT_BITS - 1
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scale = _step(high - low, levels)
    zero = np.clip(np.rint(-low / scale), 0, levels).astype(np.uint8)
    codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, levels).astype(np.uint8)
    return codes, scale, zero


def pack(codes: Codes, bits: int) -> Codes:
    """Codes along the last axis packed into bytes, the first in the low bits; an odd count is padded with a zero."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Codes = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
    return packed


def _blocks(matrix: Float32) -> Float32:
    rows, columns = matrix.shape
    padded = np.pad(matrix.astype(np.float32, copy=False), ((0, 0), (0, -columns % BLOCK)))
    return padded.reshape(rows, -1, BLOCK)


def _step(spread: Float32, levels: int) -> Float32:
    """`spread` in `levels` steps; 1 where that would be zero, in blocks of equal weights or of the least subnormal ones."""
    step: Float32 = (spread / np.float32(levels)).astype(np.float32)
    step[step == 0] = 1
    return step


def _find_steps(offsets: Float32, spread: Float32, scale: Float32, levels: range, tolerance: float) -> float:
    """Where the offsets of a block are multiples of spread / level for one of `levels`, put that step into `scale`.

    Returns the share of blocks for which it was so; blocks of equal weights count as found.
    """
    flat, spreads, scales = offsets.reshape(-1, BLOCK), spread.reshape(-1), scale.reshape(-1)
    rest = np.flatnonzero(spreads / np.float32(levels[0]))
    sample = rest[:: len(rest) // _SAMPLE + 1]
    if any(_fits(flat[sample], spreads[sample] / np.float32(level), tolerance).any() for level in levels):
        for level in levels:
            step = spreads[rest] / np.float32(level)
            fits = _fits(flat[rest], step, tolerance)
            scales[rest[fits]] = step[fits]
            rest = rest[~fits]
    return 1 - len(rest) / len(spreads)


def _fits(offsets: Float32, step: Float32, tolerance: float) -> npt.NDArray[np.bool_]:
    """[blocks]: whether all of a block's offsets [blocks, BLOCK] are multiples of its step."""
    positions = offsets / step[:, None]
    fits: npt.NDArray[np.bool_] = (np.abs(positions - np.rint(positions)) < tolerance).all(-1)
    return fits
