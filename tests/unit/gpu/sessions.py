"""A stand-in for `onnxruntime-gpu`: what runtime.ort_providers calls, on ONNX Runtime's CPU and a `HostDevice`.

Like the real one it records a run under the number that it is given, and replays it later whatever is bound then.
"""

import ctypes
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from tests.unit.gpu.device import STREAMS, Dims, Work, host_session, run_bound

__version__ = "1.31.1"
CUDA = "CUDAExecutionProvider"

available = ["TensorrtExecutionProvider", CUDA, "CPUExecutionProvider"]
broken: set[str] = set()
"""Providers that do not start."""
unrecordable: set[str] = set()
"""Names of graphs' files with a node that only the CPU has."""
made: list["InferenceSession"] = []
devices: list["OrtEpDevice"] = []


def get_available_providers() -> list[str]:
    return available


def preload_dlls() -> None:
    pass


class OrtEpDevice:
    def __init__(self, ep_name: str) -> None:
        self.ep_name = ep_name


def get_ep_devices() -> list[OrtEpDevice]:
    return devices


def register_execution_provider_library(name: str, path: str) -> None:
    devices.append(OrtEpDevice(name))


class SessionOptions:
    def __init__(self) -> None:
        self.log_severity_level = 2
        self.providers: list[tuple[str, dict[str, str]]] = []

    def add_provider_for_devices(self, devices: Sequence[OrtEpDevice], options: dict[str, str]) -> None:
        self.providers.append((devices[0].ep_name, options))

    def add_provider(self, name: str, options: dict[str, str]) -> None:
        self.providers.append((name, options))


class InferenceSession:
    def __init__(self, path: Path, options: SessionOptions, providers: list[Any] | None, enable_fallback: int) -> None:
        assert enable_fallback == 0, "or a broken provider is replaced by the CPU"
        wanted = options.providers if providers is None else [entry for entry in providers if isinstance(entry, tuple)]
        self.path = path
        self.providers = {name: settings for name, settings in wanted if name not in broken}
        settings = self.providers.get(CUDA, {})
        assert all(isinstance(value, str) for value in settings.values())
        self.recording = settings.get("enable_cuda_graph") == "1"
        if self.recording and path.name in unrecordable:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        self._session = host_session(path)
        if CUDA in self.providers:
            self._device = STREAMS[int(settings["user_compute_stream"])]
        self._recorded: dict[str, Work] = {}
        self.runs: list[str] = []
        """The number of each."""
        self.longest: list[int] = []
        """The value of `kv_longest` in each."""
        made.append(self)

    def get_providers(self) -> list[str]:
        return [*self.providers, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def io_binding(self) -> "Binding":
        return Binding()

    def run_with_iobinding(self, binding: "Binding", options: onnxruntime.RunOptions) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        number = options.get_run_config_entry("gpu_graph_id")
        self.runs.append(number)
        inputs, outputs = dict(binding.inputs), dict(binding.outputs)
        on_host = {name: binding.host_value(name) for name in binding.on_host}
        self.longest += [int.from_bytes(value, sys.byteorder) for value in on_host.values()]
        if self.recording and number in self._recorded:
            self._device.ask(self._recorded[number])
            return

        def work() -> None:
            for name, value in on_host.items():  # ONNX Runtime read it when the run was asked for
                address = self._device.allocate(4, "the stand-in's copy of a host value")
                self._device.memory(address, 4)[:] = list(value)
                inputs[name] = (inputs[name][0], address)
            run_bound(self._session, self._device, inputs, outputs)

        self._device.ask(work)
        if self.recording and int(number) >= 0:
            self._device.ask(work)  # once to allocate, once as it was recorded
            self._recorded[number] = work


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Dims, int]] = {}
        self.outputs: dict[str, tuple[Dims, int]] = {}
        self.on_host: set[str] = set()

    def bind_input(self, name: str, device_type: str, device_id: int, element_type: Any, shape: Dims, buffer_ptr: int) -> None:
        assert (device_type, device_id) in (("cuda", 0), ("cpu", 0))
        if device_type == "cpu":
            assert name == "kv_longest", "a copy from the host cannot be recorded"
            self.on_host.add(name)
        self.inputs[name] = (tuple(shape), buffer_ptr)

    def bind_output(self, name: str, device_type: str, device_id: int, element_type: Any, shape: Dims, buffer_ptr: int) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = (tuple(shape), buffer_ptr)

    def host_value(self, name: str) -> bytes:
        dims, address = self.inputs[name]
        size = 4 * math.prod(dims)
        return bytes((ctypes.c_uint8 * size).from_address(address))
