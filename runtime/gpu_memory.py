"""What a GPU engine keeps on the device: the KV slots, and the tensors that a step brings and takes.

Every tensor stands at one address as long as the engine lives, so that addresses are bound once and recorded work stays valid.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.accelerator import ALIGNMENT, Accelerator, UInt8
from runtime.engine import MOST_ALTERNATIVES, MOST_NAMED, Adjustments, Int32

if TYPE_CHECKING:
    from runtime.bundle import Layer  # which needs msgspec; this module does not

Array = npt.NDArray[Any]

KV_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
SAMPLING: dict[str, type[np.generic]] = {
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "uniform": np.float32,
    "top_k": np.int64,
    "forced": np.int64,
}
"""The sampling tensors of the step contract, each [rows]."""
ADJUSTMENTS: dict[str, type[np.generic]] = {
    "adjust_ids": np.int64,
    "adjust_bias": np.float32,
    "adjust_scale": np.float32,
    "adjust_penalty": np.float32,
}
"""Those of `runtime.engine.Adjustments`, each [rows, adjusted]."""
TOPS: dict[str, type[np.generic]] = {"top_tokens": np.int64, "top_logprobs": np.float32}
"""What is told of alternatives, each [rows, alternatives]."""
_UNREAD = {"top_p": 1, "forced": -1}
"""What a sampling tensor holds in rows that nobody reads, where it is not 0."""
_LANES = 2
"""Steps that are on their way to or from the device at the same time, at most: the one waited for, and the one ahead."""


def most_adjusted(context: int) -> int:
    """Tokens of a row whose logits a request can change in slots of `context` tokens: those there, and those that it names."""
    return context + MOST_NAMED


@dataclass(frozen=True)
class Shape:
    """The shapes of one step's tensors; steps of the same shape differ only in what the tensors hold."""

    first_slot: int
    batch: int
    seq: int
    rows: int
    """Logit rows."""
    longest: int
    """Length of `kv_range`: at least the longest slot's tokens once these are written."""
    adjusted: int = 0
    """Adjusted logits of a row; 0 where nothing is adjusted, masked or told, as in every step of a model itself."""
    recorded: bool = False
    """The step is decoded again and again in this shape, so its work is worth recording."""


def drawing(step: Shape, adjusted: int = 0) -> Shape:
    """The shape of what draws the tokens of `step`, in which only its rows matter."""
    return Shape(0, step.rows, 1, step.rows, 0, adjusted, step.recorded)


class Block:
    """Named arrays in one piece of memory, so that one copy moves them all."""

    def __init__(self, pieces: Mapping[str, tuple[type[np.generic], int]]) -> None:
        """`pieces`: for each name its type and the most numbers it has."""
        self.offsets: dict[str, int] = {}
        self._dtypes = {name: np.dtype(dtype) for name, (dtype, _) in pieces.items()}
        self.size = 0
        for name, (dtype, length) in pieces.items():
            self.offsets[name] = self.size
            self.size += _aligned(np.dtype(dtype).itemsize * length)

    def view(self, memory: UInt8, name: str, count: int) -> Array:
        """The first `count` numbers of the array `name` in `memory` [size]."""
        start, dtype = self.offsets[name], self._dtypes[name]
        return memory[start : start + count * dtype.itemsize].view(dtype)


class Lane:
    """Pinned memory for one step's inputs and outputs, which must not be touched before the step is over."""

    def __init__(self, cuda: Accelerator, inputs: Block, outputs: Block, adornments: Block, tops: Block) -> None:
        self.inputs, self.outputs = cuda.pinned(inputs.size), cuda.pinned(outputs.size)
        self.adornments, self.tops = cuda.pinned(adornments.size), cuda.pinned(tops.size)
        self.done = cuda.event()


class Memory:
    """All tensors of an engine on `cuda` with `slots` KV slots of `capacity` rows, for steps of limited size.

    `context` rows of a slot hold tokens; the one after them is written to where a batch has more rows than there are tokens.
    """

    def __init__(
        self,
        cuda: Accelerator,
        layers: "Iterable[Layer]",
        kv_dtype: str,
        *,
        slots: int,
        context: int,
        capacity: int,
        tokens: int,
        rows: int,
        vocab_size: int,
    ) -> None:
        """`tokens` of a step (batch * seq) and logit `rows`, at most. Raises EngineError where the slots do not fit."""
        self.cuda, self.slots, self.context, self.capacity = cuda, slots, context, capacity
        self.rows, self.vocab_size = rows, vocab_size
        self._kv: dict[str, _Buffer] = {}
        size = 0
        for layer in layers:
            for part, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
                buffer = _Buffer(size, layer.kv_heads, dim, dim * KV_ITEMSIZE[kv_dtype], capacity)
                self._kv[f"{layer.index}.{part}"] = buffer
                size += _aligned(slots * buffer.stride)
        per_token = sum(buffer.heads * buffer.row for buffer in self._kv.values())
        self._kv_address = cuda.allocate(size, f"{slots} slots of {capacity} tokens of {per_token} bytes")
        # Rows that were never written are read under a mask, which hides any number but infinities and NaN.
        cuda.clear(self._kv_address, size)
        self._spare = cuda.allocate(
            max((buffer.heads * buffer.row * capacity for buffer in self._kv.values()), default=0), "exchanging slots"
        )
        self.inputs = Block(
            {
                "input_ids": (np.int64, tokens),
                "position_ids": (np.int64, tokens),
                "kv_lengths": (np.int32, slots),
                "rope_lengths": (np.int32, slots),
                "logit_rows": (np.int64, rows),
                **{name: (dtype, rows) for name, dtype in SAMPLING.items()},
            }
        )
        self.outputs = Block({"tokens": (np.int64, rows), "logprobs": (np.float32, rows)})
        self._input_address = cuda.allocate(self.inputs.size, "a step's inputs")
        self._output_address = cuda.allocate(self.outputs.size, "a step's tokens")
        self._logits_address = cuda.allocate(rows * vocab_size * 4, f"logits of {rows} rows over {vocab_size} tokens")
        self.most_adjusted, self.alternatives = most_adjusted(context), min(MOST_ALTERNATIVES, vocab_size)
        self._mask_words = -(-vocab_size // 32)
        self.adornments = Block(
            {
                "mask": (np.int32, rows * self._mask_words),
                **{name: (dtype, rows * self.most_adjusted) for name, dtype in ADJUSTMENTS.items()},
            }
        )
        self.tops = Block({name: (dtype, rows * self.alternatives) for name, dtype in TOPS.items()})
        self._adornments_address = cuda.allocate(self.adornments.size, f"masks and adjustments of {rows} rows")
        self._tops_address = cuda.allocate(self.tops.size, "a step's alternatives")
        self._lanes = [Lane(cuda, self.inputs, self.outputs, self.adornments, self.tops) for _ in range(_LANES)]
        self._next_lane = 0
        self._kv_range_address = self._count_up(capacity)

    # Tensors -------------------------------------------------------------------------------------------------------

    @property
    def kv_names(self) -> list[str]:
        """As `0.key`: what follows `past.` and `present.` in the graph's names."""
        return list(self._kv)

    def address(self, name: str, first_slot: int) -> int:
        """Where the graph's tensor `name` stands; KV tensors begin at `first_slot`."""
        kind, _, kv_name = name.partition(".")
        if kind in ("past", "present"):
            buffer = self._kv[kv_name]
            return self._kv_address + buffer.offset + first_slot * buffer.stride
        if name in self.inputs.offsets:
            return self._input_address + self.inputs.offsets[name]
        if name in self.outputs.offsets:
            return self._output_address + self.outputs.offsets[name]
        if name in self.adornments.offsets:
            return self._adornments_address + self.adornments.offsets[name]
        if name in self.tops.offsets:
            return self._tops_address + self.tops.offsets[name]
        return {"logits": self._logits_address, "kv_range": self._kv_range_address}[name]

    def dims(self, name: str, shape: Shape) -> tuple[int, ...]:
        """The dimensions of the graph's tensor `name` in a step of `shape`."""
        kind, _, kv_name = name.partition(".")
        if kind in ("past", "present"):
            buffer = self._kv[kv_name]
            return shape.batch, buffer.heads, self.capacity, buffer.dim
        if name in ("input_ids", "position_ids"):
            return shape.batch, shape.seq
        if name == "logits":
            return shape.rows, self.vocab_size
        if name == "mask":
            return shape.rows, 4 * self._mask_words
        if name in ADJUSTMENTS:
            return shape.rows, shape.adjusted
        if name in TOPS:
            return shape.rows, self.alternatives
        if name in ("kv_lengths", "rope_lengths"):
            return (shape.batch,)
        return (shape.longest if name == "kv_range" else shape.rows,)

    # A step's way --------------------------------------------------------------------------------------------------

    def lane(self) -> Lane:
        """The lane for the next step; waits where its last step is not over yet."""
        lane = self._lanes[self._next_lane]
        self._next_lane = (self._next_lane + 1) % _LANES
        lane.done.wait()
        return lane

    def fill(self, lane: Lane, arrays: Mapping[str, Array], shape: Shape) -> None:
        """Put a step's inputs into `lane`; what they lack to `shape` is filled with what harms nobody.

        A row of the batch beyond theirs writes to the row of its slot that never holds a token.
        """
        for name, array in arrays.items():
            count = math.prod(self.dims(name, shape))
            view = self.inputs.view(lane.inputs, name, count)
            view[: array.size] = array.reshape(-1)
            if array.size < count:
                lengths = dict.fromkeys(("kv_lengths", "rope_lengths"), self.context + 1)
                rest = {"position_ids": self.context, **lengths, **_UNREAD}
                view[array.size :] = rest.get(name, 0)

    def send(self, lane: Lane, continuing: int = 0) -> None:
        """Upload a lane's inputs; the first `continuing` input tokens are the last step's tokens, which never left."""
        self.cuda.upload(self._input_address, lane.inputs)
        if continuing:
            self.cuda.copy(self.address("input_ids", 0), self.address("tokens", 0), 8 * continuing)

    def adorn(self, lane: Lane, mask: Int32 | None, adjustments: Adjustments | None, shape: Shape) -> None:
        """Upload a mask and adjustments; rows that lack them allow all tokens and change none."""
        words = self.adornments.view(lane.adornments, "mask", shape.rows * self._mask_words).reshape(shape.rows, -1)
        words[:] = -1
        if mask is not None:
            words[: len(mask)] = mask
        self._upload("mask", lane, words)
        for name in ADJUSTMENTS:
            there = self.adornments.view(lane.adornments, name, shape.rows * shape.adjusted).reshape(shape.rows, -1)
            there[:] = 1 if name == "adjust_scale" else 0
            given = None if adjustments is None else getattr(adjustments, name.removeprefix("adjust_"))
            if given is not None and given.size:
                there[: len(given), : given.shape[1]] = given
                there[: len(given), given.shape[1] :] = given[:, :1]
            self._upload(name, lane, there)

    def _upload(self, name: str, lane: Lane, array: Array) -> None:
        start = self.adornments.offsets[name]
        self.cuda.upload(self._adornments_address + start, lane.adornments[start : start + array.nbytes])

    def fetch(self, lane: Lane, *, tops: bool = False) -> None:
        """Download what the step gives, `tops` or not, into `lane`, which holds it once `lane.done` has been waited for."""
        self.cuda.download(lane.outputs, self._output_address)
        if tops:
            self.cuda.download(lane.tops, self._tops_address)
        lane.done.record()

    # Slots ---------------------------------------------------------------------------------------------------------

    def copy(self, source: int, target: int, length: int) -> None:
        """See `runtime.engine.Engine.copy`."""
        for buffer in self._kv.values():
            self._move(buffer, self._slot(buffer, target), self._slot(buffer, source), length)

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """See `runtime.engine.Engine.exchange`."""
        (one, length), (other, other_length) = first, second
        for buffer in self._kv.values():
            self._move(buffer, self._spare, self._slot(buffer, other), other_length)
            self._move(buffer, self._slot(buffer, other), self._slot(buffer, one), length)
            self._move(buffer, self._slot(buffer, one), self._spare, other_length)

    def _slot(self, buffer: "_Buffer", slot: int) -> int:
        return self._kv_address + buffer.offset + slot * buffer.stride

    def _move(self, buffer: "_Buffer", target: int, source: int, length: int) -> None:
        """The first `length` rows of each head."""
        if length and target != source:
            pitch = self.capacity * buffer.row
            width = length * buffer.row
            self.cuda.copy_rows(target, source, width=width, height=buffer.heads, target_pitch=pitch, source_pitch=pitch)

    def _count_up(self, length: int) -> int:
        numbers = self.cuda.pinned(8 * length)
        numbers.view(np.int64)[:] = np.arange(length)
        address = self.cuda.allocate(numbers.nbytes, "positions")
        self.cuda.upload(address, numbers)
        return address


@dataclass(frozen=True)
class _Buffer:
    """A layer's keys or values: [slots, heads, capacity, dim]."""

    offset: int
    """Bytes from where the KV memory begins."""
    heads: int
    dim: int
    row: int
    """Bytes of a token's numbers in one head."""
    capacity: int

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        return self.heads * self.capacity * self.row


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
