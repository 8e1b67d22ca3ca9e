"""Decode steps against the clock: the process's, and the GPU's own."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from runtime.accelerator import Event, UInt8
from runtime.cuda import Cuda
from runtime.engine import Batch, Draw, Engine, Int64

_torch: Any = torch.cuda  # in parts without types

_SLEEP = 20_000_000
"""Clock ticks of the GPU, some 10 ms: longer than putting a step on the stream takes."""
_CHECKED = 8
"""Steps whose time on the GPU is taken."""


class WatchedCuda(Cuda):
    """A GPU that notes how long the process waits for it, and at which time by its own clock a step ends."""

    def __init__(self, limit: int | None = None) -> None:
        """See `runtime.cuda.Cuda`; torch must have begun with the GPU."""
        super().__init__(limit)
        self.waited = 0.0
        """Seconds, to be set back by who reads it."""
        self.mark: Any = None
        """An event of torch's that is recorded behind the next tokens that are fetched."""
        self.torch_stream: Any = _torch.ExternalStream(self.stream)

    def event(self) -> Event:
        """See `runtime.cuda.Accelerator.event`."""
        return _WatchedEvent(self, super().event())

    def download(self, target: UInt8, source: int) -> None:
        """See `runtime.cuda.Accelerator.download`."""
        super().download(target, source)
        if self.mark is not None:
            self.mark.record(self.torch_stream)


class _WatchedEvent:
    def __init__(self, cuda: WatchedCuda, event: Event) -> None:
        self._cuda, self._event = cuda, event

    def record(self) -> None:
        self._event.record()

    def wait(self) -> None:
        begun = time.perf_counter()
        self._event.wait()
        self._cuda.waited += time.perf_counter() - begun


@dataclass(frozen=True)
class Timed:
    """Seconds a step."""

    step: float
    host: float
    """Of which the process did not wait for the GPU."""


def decode(engine: Engine, cuda: WatchedCuda, tokens: Int64, start: int, steps: int, *, ahead: bool) -> Timed:
    """Decode `steps` greedy steps of the rows whose last tokens are `tokens` [batch], in slots that hold `start` tokens."""
    rows, draw = np.arange(len(tokens), dtype=np.int64), Draw.greedy(len(tokens))
    cuda.synchronize()
    cuda.waited = 0.0
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        lengths = np.full(len(tokens), start + step, np.int32)
        following = draw if ahead and step < steps else None  # so that no work is left behind for what is timed next
        tokens, _ = engine.step(Batch(0, tokens[:, None], lengths, rows, draw), following)
    taken = time.perf_counter() - begun
    return Timed(taken / steps, (taken - cuda.waited) / steps)


def gpu_seconds(engine: Engine, cuda: WatchedCuda, tokens: Int64, start: int) -> list[float]:
    """What the GPU computes on a step of these rows, by its own clock.

    The GPU is kept busy until the whole step is on its stream. From there to the step's end it waits for nobody.
    """
    rows, draw = np.arange(len(tokens), dtype=np.int64), Draw.greedy(len(tokens))
    lengths = np.full(len(tokens), start + 1, np.int32)
    found = []
    for _ in range(_CHECKED):
        begin, cuda.mark = _torch.Event(enable_timing=True), _torch.Event(enable_timing=True)
        with torch.cuda.stream(cuda.torch_stream):
            _torch._sleep(_SLEEP)
        begin.record(cuda.torch_stream)
        engine.step(Batch(0, tokens[:, None], lengths, rows, draw))
        cuda.mark.synchronize()
        found.append(begin.elapsed_time(cuda.mark) / 1e3)
    cuda.mark = None
    return found


def prefill(engine: Engine, slot: int, prompt: Int64) -> int:
    """The first token after `prompt`, which is computed in chunks of the engine's own size."""
    tokens: Int64 = np.zeros(0, np.int64)
    for begin in range(0, len(prompt), engine.chunk):
        part = prompt[begin : begin + engine.chunk]
        end = begin + len(part)
        rows = np.array([len(part) - 1] if end == len(prompt) else [], np.int64)
        tokens, _ = engine.step(Batch(slot, part[None], np.array([end], np.int32), rows, Draw.greedy(len(rows))))
    return int(tokens[0])
