"""A real GPU as an `Accelerator`, through cuda-core and cuda-bindings; nothing else imports these."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np

from runtime.accelerator import Event, Graph, UInt8, check_room
from runtime.engine import DeviceLost, EngineError


class Cuda:
    """The first GPU that CUDA shows this process, as an `Accelerator`."""

    def __init__(self, limit: int | None = None) -> None:
        """Open it. `limit` bytes is what may be taken of its memory, None all that is free now. Raises EngineError."""
        try:
            self._core: Any = import_module("cuda.core")
            self._runtime: Any = import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise EngineError(
                f"the packages that speak to a GPU cannot be imported ({error}); install the extra that the variant needs: "
                "pip install 'engineshed[cuda]', 'engineshed[tensorrt]' or 'engineshed[tensorrt-rtx]'"
            ) from error
        self._device_memory: list[int] = []
        self._host_memory: list[int] = []
        try:
            device = self._core.Device(0)
            device.set_current()
            self._stream = device.create_stream()
            self._events = device.create_event
            self.compute_capability = "{}.{}".format(*device.compute_capability)
        except Exception as error:  # cuda-core's own, and those of the loader that looks for the driver's library
            raise EngineError(
                f"no GPU can be used: {str(error).rstrip('.')}; `engineshed devices` shows what there is, and what it lacks"
            ) from error
        self.stream = int(self._stream.handle)
        self.taken = 0
        self.limit = self.free if limit is None else limit

    @property
    def free(self) -> int:
        """See `Accelerator.free`."""
        free, _total = self._ask("cudaMemGetInfo")
        return int(free)

    @property
    def driver_version(self) -> str:
        """The newest CUDA that the driver supports, as `13.0`."""
        return _version(*self._ask("cudaDriverGetVersion"))

    @property
    def runtime_version(self) -> str:
        """The CUDA that cuda-bindings was made for, as `13.0`."""
        return _version(*self._ask("cudaRuntimeGetVersion"))

    def allocate(self, size: int, purpose: str, advice: str = "start with fewer slots or a shorter context") -> int:
        """See `Accelerator.allocate`."""
        check_room(self, size, purpose, advice)
        error, address = self._runtime.cudaMalloc(max(size, 1))
        if error == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise EngineError(
                f"{purpose} needs {size >> 20} MiB of the GPU's memory, of which {self.free >> 20} MiB are free; {advice}, "
                "or end what else runs on it"
            )
        self._check(error, "allocate memory")
        self._device_memory.append(int(address))
        self.taken += size
        return int(address)

    def account(self, size: int) -> None:
        """See `Accelerator.account`."""
        self.taken += size

    def pinned(self, size: int) -> UInt8:
        """See `Accelerator.pinned`."""
        (address,) = self._ask("cudaMallocHost", max(size, 1))
        self._host_memory.append(int(address))
        array: UInt8 = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))
        array[:] = 0
        return array

    def clear(self, address: int, size: int) -> None:
        """See `Accelerator.clear`."""
        self._ask("cudaMemsetAsync", address, 0, size, self._stream.handle)

    def upload(self, target: int, source: UInt8) -> None:
        """See `Accelerator.upload`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._ask("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self._stream.handle)

    def download(self, target: UInt8, source: int) -> None:
        """See `Accelerator.download`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._ask("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self._stream.handle)

    def copy(self, target: int, source: int, size: int) -> None:
        """See `Accelerator.copy`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._ask("cudaMemcpyAsync", target, source, size, kind, self._stream.handle)

    def copy_rows(self, target: int, source: int, *, width: int, height: int, target_pitch: int, source_pitch: int) -> None:
        """See `Accelerator.copy_rows`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        pitches = (target, target_pitch, source, source_pitch)
        self._ask("cudaMemcpy2DAsync", *pitches, width, height, kind, self._stream.handle)

    def event(self) -> Event:
        """See `Accelerator.event`."""
        return _Event(self._stream, self._events())

    def record(self, work: Callable[[], None]) -> Graph:
        """See `Accelerator.record`."""
        builder = self._stream.create_graph_builder()
        # Another thread's work, as that of a library which compiles in the background, does not disturb the recording.
        builder.begin_building(mode="thread_local")
        try:
            work()
        except BaseException:
            with suppress(Exception):  # what `work` raised is the reason
                builder.end_building()
            raise
        try:
            graph = builder.end_building().complete()
        except Exception as error:  # cuda-core's own class is not public
            raise EngineError(f"CUDA cannot record the step: {error}") from error
        return _Graph(self._stream, graph)

    def synchronize(self) -> None:
        """See `Accelerator.synchronize`."""
        self._ask("cudaStreamSynchronize", self._stream.handle)

    def close(self) -> None:
        """See `Accelerator.close`."""
        with suppress(EngineError):  # after a failure of the GPU nothing works any more, and the process's end frees all
            self.synchronize()
        for address in self._device_memory:
            self._runtime.cudaFree(address)
        for address in self._host_memory:
            self._runtime.cudaFreeHost(address)
        self._device_memory.clear()
        self._host_memory.clear()
        self.taken = 0

    def _ask(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        error, *results = getattr(self._runtime, function)(*arguments)
        self._check(error, function)
        return tuple(results)

    def _check(self, error: Any, asked: str) -> None:
        if error == self._runtime.cudaError_t.cudaSuccess:
            return
        _, text = self._runtime.cudaGetErrorString(error)
        raise DeviceLost(f"the GPU failed on {asked}: {text.decode()} ({error.name}); start the engine again")


class _Event:
    def __init__(self, stream: Any, event: Any) -> None:
        self._stream, self._event = stream, event

    def record(self) -> None:
        try:
            self._stream.record(self._event)
        except Exception as error:  # cuda-core's own class is not public
            raise DeviceLost(f"the GPU failed on a step: {error}; start the engine again") from error

    def wait(self) -> None:
        try:
            self._event.sync()
        except Exception as error:  # cuda-core's own class is not public
            raise DeviceLost(f"the GPU failed on a step: {error}; start the engine again") from error


class _Graph:
    def __init__(self, stream: Any, graph: Any) -> None:
        self._stream, self._graph = stream, graph

    def launch(self) -> None:
        try:
            self._graph.launch(self._stream)
        except Exception as error:  # cuda-core's own class is not public
            raise DeviceLost(f"the GPU failed to begin a step: {error}; start the engine again") from error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
