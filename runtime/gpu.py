"""The engine on a GPU, whichever library computes: what is sent, what comes back, and one step begun ahead of its turn.

A step's inputs go up in one copy and its tokens come down in another; what lies between stays on the device. Decode steps
come in few shapes, so their work is recorded once and launched as a whole from then on.
"""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from runtime.accelerator import Accelerator, Graph
from runtime.engine import Adjustments, Batch, DeviceLost, Draw, EngineError, Float32, Int64
from runtime.gpu_memory import SAMPLING, TOPS, Array, Lane, Memory, Shape, drawing

log = logging.getLogger(__name__)

MANY_COST = 0.25
ROW_COST = 0.01
"""Not measured yet. A step with several rows is launched piece by piece where one with one row is launched as a whole; what a
further row adds while memory is the bound is next to nothing."""
BYTE_COST = 0.03
"""Not measured yet: what reading a byte takes, against a CPU (see runtime/ort.py)."""
LEAST_ADJUSTED = 16
"""Adjusted logits of a row up to which their number is not told apart: each number that is costs a recording."""
LEAST_RANGE = 256
"""Length of `kv_range` up to which it is not told apart: each length that is costs a recording."""


class Backend(Protocol):
    """A compiled model with its sampler, its tensors bound to a `Memory`."""

    inputs: frozenset[str]
    """Names of the tensors that the model takes."""
    pads: bool
    """A batch may have rows that nobody reads: they cost little, and write to their slots' unused rows only."""
    recordable: bool
    """What `run` and `sample` ask of the stream can be recorded, right after they ran in the same shape."""

    def check(self, shape: Shape) -> None:
        """Raise EngineError where the model does not take `shape`; the message names the limit and what to do."""
        ...

    def run(self, shape: Shape, longest: int) -> None:
        """Put the model's step on the stream. `longest`: the most tokens that stand in a slot once it is done."""
        ...

    def sample(self, shape: Shape) -> None:
        """Put the drawing of other tokens on the stream, from the logits that `run` left: a shape of `drawing`.

        With `shape.adjusted` the mask and the adjustments count, and alternatives are told.
        """
        ...

    def close(self) -> None:
        """Give back what the library holds; nothing is on the stream any more."""
        ...


@dataclass
class _Flight:
    """A step that was put on the stream and whose tokens have not been handed out."""

    lane: Lane
    rows: int
    batch: Batch
    """For a step that was begun ahead: what must be asked for so that this is it; its `input_ids` mean nothing."""


class GpuEngine:
    """A `runtime.engine.Engine` over a `Backend`. Raises DeviceLost when the GPU needs another process."""

    runs_ahead = True
    many_cost, row_cost = MANY_COST, ROW_COST

    def __init__(
        self,
        cuda: Accelerator,
        memory: Memory,
        backend: Backend,
        *,
        chunk: int,
        step_bytes: int,
        length_boundaries: tuple[int, ...] = (),
    ) -> None:
        """Own `cuda`, whose memory `close` gives back. `step_bytes` of weights are read by a step of one token."""
        self.length_boundaries = length_boundaries
        self.slots, self.context, self.vocab_size, self.chunk = memory.slots, memory.context, memory.vocab_size, chunk
        self.rows, self.step_cost = memory.rows, BYTE_COST * step_bytes
        self._cuda, self._memory, self._backend = cuda, memory, backend
        self._graphs: dict[tuple[Shape, bool], Graph | None] = {}
        """Recorded steps by shape, and whether they only draw; None where the work could not be recorded."""
        self._ahead: _Flight | None = None
        self._handed: Int64 = np.zeros(0, np.int64)
        """The tokens that the last step gave, which are the input of the one ahead."""
        self._tops: tuple[Int64, Float32] = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        """See `runtime.engine.Engine.step`. Raises EngineError."""
        begun, self._ahead = self._ahead, None
        flight = begun if begun is not None and self._is_it(begun, batch) else self._begin(batch)
        if ahead is not None:
            self._ahead = self._begin_ahead(batch, ahead)
        return self._land(flight)

    def alternatives(self) -> tuple[Int64, Float32]:
        """See `runtime.engine.Engine.alternatives`."""
        return self._tops

    def copy(self, source: int, target: int, length: int) -> None:
        """See `runtime.engine.Engine.copy`."""
        self._ahead = None
        self._memory.copy(source, target, length)

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """See `runtime.engine.Engine.exchange`."""
        self._ahead = None
        self._memory.exchange(first, second)

    def close(self) -> None:
        """Give all memory back, and the GPU with it."""
        self._ahead = None
        with suppress(DeviceLost):  # whatever was going on is of no use any more
            self._cuda.synchronize()
        self._graphs.clear()
        self._backend.close()
        self._cuda.close()

    # One step ------------------------------------------------------------------------------------------------------

    def _begin(self, batch: Batch, continuing: bool = False) -> _Flight:
        """Put a step on the stream; where it is `continuing`, its input is what the step before it gives."""
        self._check(batch)
        shape = self._shape(batch)
        self._backend.check(shape)
        draw = batch.draw
        adorned = draw.adorned and len(batch.logit_rows) > 0
        drawn = adorned or bool(np.any(draw.temperature > 0))
        lane = self._memory.lane()
        self._memory.fill(lane, _arrays(batch, drawn), shape)
        self._memory.send(lane, continuing=len(batch.kv_lengths) if continuing else 0)
        self._run(shape, int(batch.kv_lengths.max()))
        if adorned:
            mask = draw.mask() if callable(draw.mask) else draw.mask  # found while the device computes
            adjusted = self._adjusted(draw)
            self._memory.adorn(lane, mask, draw.adjustments, drawing(shape, adjusted))
            self._sample(drawing(shape, adjusted))
        elif drawn:
            self._sample(drawing(shape))
        self._memory.fetch(lane, tops=draw.alternatives > 0)
        return _Flight(lane, len(batch.logit_rows), batch)

    def _adjusted(self, draw: Draw) -> int:
        """How many logits of a row are taken to be adjusted: one of few numbers, each of which costs a recording."""
        count = 0 if draw.adjustments is None else draw.adjustments.ids.shape[1]
        return _bucket(max(count, 1), self._memory.most_adjusted, LEAST_ADJUSTED)

    def _run(self, shape: Shape, longest: int) -> None:
        self._do(shape, False, lambda: self._backend.run(shape, longest))

    def _sample(self, shape: Shape) -> None:
        self._do(shape, True, lambda: self._backend.sample(shape))

    def _do(self, shape: Shape, draws: bool, work: Callable[[], None]) -> None:
        """Launch what was recorded of `work` in this shape; where nothing was, do it, and record it if that is worth it."""
        key = shape, draws
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch()
            return
        work()
        if shape.recorded and key not in self._graphs:
            self._graphs[key] = self._record(shape, work)

    def _record(self, shape: Shape, work: Callable[[], None]) -> Graph | None:
        if not self._backend.recordable:
            return None
        try:
            return self._cuda.record(work)
        except DeviceLost:
            raise
        except EngineError as error:  # the work itself has just been done without
            log.warning("steps of %s are launched piece by piece, which is slower: %s", shape, error)
            return None

    def _land(self, flight: _Flight) -> tuple[Int64, Float32]:
        flight.lane.done.wait()
        outputs = self._memory.outputs
        tokens: Int64 = outputs.view(flight.lane.outputs, "tokens", flight.rows).copy()
        logprobs: Float32 = outputs.view(flight.lane.outputs, "logprobs", flight.rows).copy()
        self._handed = tokens.copy()
        if flight.batch.draw.alternatives:
            self._tops = self._told(flight)
        return tokens, logprobs

    def _told(self, flight: _Flight) -> tuple[Int64, Float32]:
        shape, wanted = (flight.rows, self._memory.alternatives), flight.batch.draw.alternatives
        views = [self._memory.tops.view(flight.lane.tops, name, math.prod(shape)).reshape(shape) for name in TOPS]
        tokens, logprobs = (view[:, :wanted].copy() for view in views)
        return tokens, logprobs

    def _shape(self, batch: Batch) -> Shape:
        count, seq = batch.input_ids.shape
        rows, longest = len(batch.logit_rows), 0
        if "kv_range" in self._backend.inputs:
            longest = _bucket(int(batch.kv_lengths.max()), self._memory.capacity, LEAST_RANGE)
        if seq > 1 or batch.first_slot or rows > count:
            return Shape(batch.first_slot, count, seq, max(rows, 1), longest)
        size = _bucket(count, self.slots) if self._backend.pads else count
        return Shape(0, size, 1, size, longest, recorded=True)

    def _check(self, batch: Batch) -> None:
        count, seq = batch.input_ids.shape
        if batch.first_slot + count > self.slots:
            raise EngineError(f"a step over slots up to {batch.first_slot + count} is more than the {self.slots} there are")
        if seq > self.chunk or (seq > 1 and count > 1):
            raise EngineError(
                f"a step of {count} x {seq} tokens is more than this engine takes: {self.chunk} tokens of one slot, or one "
                "token each of several; split it"
            )
        if len(batch.logit_rows) > self._memory.rows:
            raise EngineError(
                f"a step with {len(batch.logit_rows)} logit rows is more than the {self._memory.rows} there is room for"
            )
        adjustments = batch.draw.adjustments
        if adjustments is not None and adjustments.ids.shape[1] > self._memory.most_adjusted:
            raise EngineError(
                f"a step that changes {adjustments.ids.shape[1]} logits of a row is more than the "
                f"{self._memory.most_adjusted} there is room for"
            )
        if int(batch.kv_lengths.max()) > self.context:
            raise EngineError(f"{int(batch.kv_lengths.max())} tokens are more than the {self.context} that a slot holds")

    # One step ahead ------------------------------------------------------------------------------------------------

    def _begin_ahead(self, batch: Batch, draw: Draw) -> _Flight | None:
        """Begin the step that is likely to follow `batch`; None where it cannot be told now."""
        count, seq = batch.input_ids.shape
        follows = seq == 1 and np.array_equal(batch.logit_rows, np.arange(count)) and len(draw.forced) == count
        if draw.mask is not None:  # which depends on the token
            return None
        if not follows or int(batch.kv_lengths.max()) >= self.context:
            return None
        unknown = np.zeros((count, 1), np.int64)
        try:
            return self._begin(
                Batch(batch.first_slot, unknown, batch.kv_lengths + np.int32(1), batch.logit_rows.copy(), draw), continuing=True
            )
        except DeviceLost:
            raise
        except EngineError as error:  # this step's tokens are well; whoever asks for the next one is told
            log.warning("no step ahead: %s", error)
            return None

    def _is_it(self, begun: _Flight, batch: Batch) -> bool:
        """The step that was `begun` ahead is the one that is asked for now."""
        guess = begun.batch
        return (
            guess.first_slot == batch.first_slot
            and batch.input_ids.shape == guess.input_ids.shape
            and np.array_equal(batch.input_ids[:, 0], self._handed)
            and np.array_equal(guess.kv_lengths, batch.kv_lengths)
            and np.array_equal(guess.logit_rows, batch.logit_rows)
            and _same_draw(guess.draw, batch.draw)
        )


def _arrays(batch: Batch, sampled: bool) -> dict[str, Array]:
    seq = batch.input_ids.shape[1]
    arrays: dict[str, Array] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.kv_lengths.astype(np.int64)[:, None] - seq + np.arange(seq),
        "kv_lengths": batch.kv_lengths,
        "rope_lengths": batch.kv_lengths if batch.rope_lengths is None else batch.rope_lengths,
        "logit_rows": batch.logit_rows,
    }
    for name in SAMPLING if sampled else ("forced",):
        arrays[name] = getattr(batch.draw, name)
    return arrays


def _same_draw(one: Draw, other: Draw) -> bool:
    if one is other:
        return True
    if one.alternatives != other.alternatives or one.mask is not None or other.mask is not None:
        return False
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in SAMPLING) and _same_adjustments(
        one.adjustments, other.adjustments
    )


def _same_adjustments(one: Adjustments | None, other: Adjustments | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Adjustments))


def _bucket(value: int, most: int, least: int = 1) -> int:
    """The first power of two from `value` on, within bounds."""
    return min(most, max(least, 1 << (value - 1).bit_length()))
