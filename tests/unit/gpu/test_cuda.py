"""The real device layer over a stand-in of cuda-core and cuda-bindings, whose real names test_bindings.py checks."""

import ctypes
import enum
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.cuda import Cuda
from runtime.engine import DeviceLost, EngineError

MIB = 1 << 20


class Error(enum.Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700


class Runtime:
    """`cuda.bindings.runtime`, on a GPU of 100 MiB of which 80 are free."""

    cudaError_t = Error
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)

    def __init__(self) -> None:
        self.free, self.error = 80 * MIB, Error.cudaSuccess
        self.given: dict[int, int] = {}
        self.calls: list[tuple[Any, ...]] = []
        self._kept: list[Any] = []

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self.free, 100 * MIB

    def cudaDriverGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 13010

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        if size > self.free:
            return Error.cudaErrorMemoryAllocation, None
        self.free -= size
        address = 4096 * (len(self.given) + 1)
        self.given[address] = size
        return Error.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[Error]:
        self.free += self.given.pop(address)
        return (Error.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[Error, int]:
        self._kept.append(ctypes.create_string_buffer(b"\x11" * size, size))
        return Error.cudaSuccess, ctypes.addressof(self._kept[-1])

    def cudaFreeHost(self, address: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, *arguments: Any) -> tuple[Error]:
        self.calls.append(arguments)
        return (self.error,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Error]:
        return (self.error,)

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, error.name.encode()


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    stand_in = Runtime()
    stream = SimpleNamespace(handle=77)
    device = SimpleNamespace(
        set_current=lambda: None, create_stream=lambda: stream, create_event=lambda: None, compute_capability=(12, 0)
    )
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=lambda index: device))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", stand_in)
    return stand_in


def test_it_tells_what_it_is(runtime: Runtime) -> None:
    cuda = Cuda()
    assert (cuda.stream, cuda.compute_capability, cuda.driver_version, cuda.limit) == (77, "12.0", "13.1", 80 * MIB)


def test_missing_packages_name_the_extras(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(EngineError, match=r"engineshed\[cuda\]"):
        Cuda()


def test_more_than_the_limit_is_refused_before_the_driver_is_asked(runtime: Runtime) -> None:
    cuda = Cuda(limit=50 * MIB)
    cuda.allocate(20 * MIB, "weights")
    cuda.account(5 * MIB)
    expected = (
        "slots needs 26 MiB; of the 50 MiB of GPU memory that this engine may take, 25 MiB are taken, so 25 MiB are left; "
        "start with fewer slots or a shorter context"
    )
    with pytest.raises(EngineError, match=expected):
        cuda.allocate(26 * MIB, "slots")
    assert len(runtime.given) == 1


def test_a_gpu_that_others_fill_is_told_from_the_limit(runtime: Runtime) -> None:
    cuda = Cuda(limit=100 * MIB)
    with pytest.raises(EngineError, match=r"slots needs 90 MiB .* of which 80 MiB are free; .* end what else runs on it"):
        cuda.allocate(90 * MIB, "slots")


def test_pinned_memory_is_zeroed_and_copied_from_where_it_lies(runtime: Runtime) -> None:
    cuda = Cuda()
    array = cuda.pinned(16)
    assert not array.any()
    cuda.upload(4096, array[4:8])
    assert runtime.calls == [(4096, array.ctypes.data + 4, 4, 1, 77)]


def test_a_failing_gpu_is_lost(runtime: Runtime) -> None:
    cuda = Cuda()
    runtime.error = Error.cudaErrorIllegalAddress
    with pytest.raises(DeviceLost, match=r"cudaErrorIllegalAddress.*start the engine again"):
        cuda.copy(4096, 8192, 8)


def test_closing_frees_all_memory(runtime: Runtime) -> None:
    cuda = Cuda()
    for _ in range(3):
        cuda.allocate(MIB, "something")
    runtime.error = Error.cudaErrorIllegalAddress  # also after a failure
    cuda.close()
    assert (runtime.free, cuda.taken) == (80 * MIB, 0)
