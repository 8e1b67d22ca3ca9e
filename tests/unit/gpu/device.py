"""A stand-in for the GPU: host memory, and a stream whose work is done when somebody waits for it and no sooner.

Whatever forgets to wait, or overwrites what is still to be copied, gets wrong numbers here. Memory comes filled with NaN, and
work outside of it is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.accelerator import ALIGNMENT, UInt8, check_room
from runtime.engine import DeviceLost, EngineError

Work = Callable[[], None]
Dims = tuple[int, ...]

STREAMS: dict[int, "HostDevice"] = {}
"""By the handle that libraries are given."""
POISON = 0xFF


@dataclass
class HostEvent:
    """A place in the queue of a `HostDevice`: so many pieces of work were asked for before it."""

    device: "HostDevice"
    place: int = 0

    def record(self) -> None:
        self.place = self.device.asked

    def wait(self) -> None:
        self.device.work_off(self.place)


@dataclass
class HostGraph:
    """Recorded work."""

    device: "HostDevice"
    work: list[Work]
    launches: int = 0

    def launch(self) -> None:
        self.launches += 1
        for piece in self.work:
            self.device.ask(piece)


@dataclass
class HostDevice:
    """A `runtime.cuda.Accelerator` on host memory."""

    limit: int = 1 << 28
    compute_capability: str = "8.9"
    taken: int = 0
    asked: int = 0
    """Pieces of work that were ever put on the stream."""
    graphs: list[HostGraph] = field(default_factory=list)
    fails: bool = False
    """The next piece of work fails, and with it the device."""
    closed: bool = False

    def __post_init__(self) -> None:
        self._queue: list[Work] = []
        self._recording: list[Work] | None = None
        self._device: dict[int, UInt8] = {}
        self._host: dict[int, UInt8] = {}
        self.stream = id(self)
        STREAMS[self.stream] = self

    # The protocol --------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return (1 << 30) - sum(array.nbytes for array in self._device.values())

    def allocate(self, size: int, purpose: str, advice: str = "start with fewer slots or a shorter context") -> int:
        check_room(self, size, purpose, advice)
        assert self._recording is None, "memory cannot be allocated while work is recorded"
        self.taken += size
        return self._keep(self._device, size, POISON)

    def account(self, size: int) -> None:
        self.taken += size

    def pinned(self, size: int) -> UInt8:
        return self._host[self._keep(self._host, size, 0)][:size]

    def clear(self, address: int, size: int) -> None:
        target = self.memory(address, size)
        self.ask(lambda: target.fill(0))

    def upload(self, target: int, source: UInt8) -> None:
        self._check_pinned(source)
        there = self.memory(target, source.nbytes)
        self.ask(lambda: np.copyto(there, source))

    def download(self, target: UInt8, source: int) -> None:
        self._check_pinned(target)
        there = self.memory(source, target.nbytes)
        self.ask(lambda: np.copyto(target, there))

    def copy(self, target: int, source: int, size: int) -> None:
        one, other = self.memory(target, size), self.memory(source, size)
        self.ask(lambda: np.copyto(one, other))

    def copy_rows(self, target: int, source: int, *, width: int, height: int, target_pitch: int, source_pitch: int) -> None:
        assert width <= min(target_pitch, source_pitch), "CUDA refuses rows that are wider than their pitch"
        for row in range(height):
            self.copy(target + row * target_pitch, source + row * source_pitch, width)

    def event(self) -> HostEvent:
        return HostEvent(self)

    def record(self, work: Work) -> HostGraph:
        assert self._recording is None
        self._recording = []
        try:
            work()
            self.graphs.append(HostGraph(self, self._recording))
        finally:
            self._recording = None
        return self.graphs[-1]

    def synchronize(self) -> None:
        if self._recording is not None:
            raise EngineError("waiting cannot be recorded")
        self.work_off(self.asked)

    def close(self) -> None:
        self.synchronize()
        del STREAMS[self.stream]
        self._device.clear()
        self._host.clear()
        self.closed = True

    # What the stand-ins of libraries use ---------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        """Work that is asked for now is recorded and not done."""
        return self._recording is not None

    def ask(self, work: Work) -> None:
        """Put `work` on the stream."""
        assert not self.closed
        if self._recording is not None:
            self._recording.append(work)
            return
        self._queue.append(work)
        self.asked += 1

    def work_off(self, place: int) -> None:
        """Do what was asked for up to `place`."""
        while self._queue and self.asked - len(self._queue) < place:
            work = self._queue.pop(0)
            if self.fails:
                raise DeviceLost("the GPU failed on a step: the stand-in was told to")
            work()

    def memory(self, address: int, size: int) -> UInt8:
        """`size` bytes of device memory at `address`."""
        for start, array in self._device.items():
            if start <= address and address + size <= start + array.nbytes:
                return array[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not the device's")

    def _check_pinned(self, array: UInt8) -> None:
        inside = any(
            start <= array.ctypes.data and array.ctypes.data + array.nbytes <= start + block.nbytes
            for start, block in self._host.items()
        )
        assert inside, "the GPU copies from and to pinned memory only"

    def _keep(self, kept: dict[int, UInt8], size: int, value: int) -> int:
        block = np.full(size + ALIGNMENT, value, np.uint8)
        array = block[-block.ctypes.data % ALIGNMENT :][: max(size, 1)]
        kept[array.ctypes.data] = array
        return int(array.ctypes.data)


_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def host_session(path: Path) -> ort.InferenceSession:
    """The graph at `path`, on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_bound(
    session: ort.InferenceSession,
    device: HostDevice,
    inputs: Mapping[str, tuple[Dims, int]],
    outputs: Mapping[str, tuple[Dims, int]],
) -> None:
    """Run `session` over tensors on `device`, each given by its dimensions and address."""
    types = {node.name: _TYPES[node.type] for node in (*session.get_inputs(), *session.get_outputs())}
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, (dims, address) in tensors.items():
            device.memory(address, int(np.prod(dims)) * np.dtype(types[name]).itemsize)
            bind(name, "cpu", 0, types[name], dims, address)
    session.run_with_iobinding(binding)
