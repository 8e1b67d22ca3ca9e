"""A stand-in for `tensorrt` and `tensorrt_rtx`: what runtime.trt calls, on ONNX Runtime's CPU and a `HostDevice`.

A plan is a small JSON file that names the graph which the real one would have been built from. Where TensorRT would refuse a
call, or compute something wrong without a word, this one refuses it.
"""

import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.accelerator import ALIGNMENT
from tests.unit.gpu.device import STREAMS, Dims, HostDevice, host_session, run_bound

__version__ = "1.7.1.116"
SCRATCH = 512
"""Bytes that a step takes beside its tensors."""

Range = tuple[Dims, Dims]


class DataType(enum.Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"
    BF16 = "tensor(bfloat16)"
    INT32 = "tensor(int32)"
    INT64 = "tensor(int64)"
    UINT8 = "tensor(uint8)"


TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
EngineValidity = enum.Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
DynamicShapesKernelSpecializationStrategy = enum.Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")


class EngineInvalidityDiagnostics(enum.Enum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class ILogger:
    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


def write_plan(path: Path, graph: Path, profiles: Sequence[dict[str, Range]], **changes: Any) -> None:
    """A plan of `graph`: for each profile the least and the largest dimensions of each input. `changes` make it a bad one."""
    content = {"graph": str(graph), "profiles": profiles, "stripped": False, "verdict": "VALID", "reasons": 0, "aliases": True}
    path.write_text(json.dumps(content | changes))


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        content = _read(buffer)
        if content is None:
            return EngineValidity.INVALID, EngineInvalidityDiagnostics.MALFORMED_ENGINE.value
        return EngineValidity[content["verdict"]], content["reasons"]

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "ICudaEngine | None":
        content = _read(serialized_engine)
        if content is None or content["verdict"] == "INVALID":
            self.logger.log(
                ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 6: the plan is not for this GPU"
            )
            return None
        return ICudaEngine(content, self.logger)


class ICudaEngine:
    def __init__(self, content: dict[str, Any], logger: ILogger) -> None:
        self.logger, self._aliases = logger, content["aliases"]
        self.profiles: list[dict[str, Range]] = content["profiles"]
        self.refittable = content["stripped"]
        self.device_memory_size_v2 = SCRATCH
        self.session = host_session(Path(content["graph"]))
        self.has_weights = not content["stripped"]
        self._nodes: dict[str, Any] = {node.name: node for node in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.names = set(self._nodes)
        self.contexts: list[IExecutionContext] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self._nodes)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._nodes)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._nodes[name].type)

    def get_tensor_shape(self, name: str) -> Dims:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._nodes[name].shape)

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present", "past") if name.startswith("present.") and self._aliases else None

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: "IRuntimeConfig") -> "IExecutionContext":
        assert runtime_config.cuda_graph_strategy is CudaGraphStrategy.DISABLED
        self.contexts.append(IExecutionContext(self, runtime_config))
        return self.contexts[-1]


class IRuntimeCache:
    """Holds, for what is compiled, the number of contexts that were made with it."""

    def __init__(self) -> None:
        self.compiled = 0

    def deserialize(self, blob: bytes) -> bool:
        if not blob.isdigit():
            return False
        self.compiled = int(blob)
        return True

    def serialize(self) -> bytes:
        return str(self.compiled).encode()


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.dynamic_shapes_kernel_specialization_strategy: Any = DynamicShapesKernelSpecializationStrategy.LAZY
        self.allocation: Any = ExecutionContextAllocationStrategy.STATIC
        self.cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        cache.compiled += 1
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine, self.config = engine, config
        self._profile = 0
        self._scratch: tuple[int, int] | None = None
        self._shapes: dict[str, Dims] = {}
        self._addresses: dict[str, int] = {}
        self._settings = 0
        """Grows with everything that is set; recorded work is worth nothing once it has."""
        self._run_with = -1
        """The settings that a step has been run with, so that it can be recorded."""

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        assert memory % ALIGNMENT == 0
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return 0 <= profile_index < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: Dims) -> bool:
        fixed = self._engine.get_tensor_shape(name)
        low, high = self._engine.profiles[self._profile].get(name, (fixed, fixed))
        fits = len(shape) == len(fixed) and all(least <= dim <= most for least, dim, most in zip(low, shape, high, strict=True))
        if not fits:
            return self._refuse(
                f"Static dimension mismatch or profile {self._profile} exceeded: {name} {shape} of {low}..{high}"
            )
        self._shapes[name] = tuple(shape)
        self._settings += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._engine.names
        self._addresses[name] = memory
        self._settings += 1
        return memory % ALIGNMENT == 0 or self._refuse(f"{name} is not aligned")

    def execute_async_v3(self, stream_handle: int) -> bool:
        device, engine = STREAMS[stream_handle], self._engine
        if not engine.has_weights:
            return self._refuse("the engine's weights are missing")
        if self.config.allocation is ExecutionContextAllocationStrategy.USER_MANAGED and self._scratch is None:
            return self._refuse("no device memory was given")
        missing = (engine.names - self._addresses.keys()) | (set(engine.inputs) - self._shapes.keys())
        if missing:
            return self._refuse(f"not specified: {sorted(missing)}")
        for name in engine.names:
            source = engine.get_aliased_input_tensor(name)
            if source is not None and self._addresses[name] != self._addresses[source]:
                return self._refuse(f"{name} and {source} are one tensor")
        if device.recording and self._run_with != self._settings:
            return self._refuse("a step is recorded only after one with the same shapes has run")
        if not device.recording:
            self._run_with = self._settings
        shapes, addresses, settings, recorded = dict(self._shapes), dict(self._addresses), self._settings, device.recording
        outputs = {name: (dims, addresses[name]) for name, dims in self._output_shapes().items()}

        def work() -> None:
            assert not recorded or settings == self._settings, "the context of recorded work was set anew"
            self._scribble(device)
            run_bound(engine.session, device, {name: (shapes[name], addresses[name]) for name in engine.inputs}, outputs)

        device.ask(work)
        return True

    def _output_shapes(self) -> dict[str, Dims]:
        known: dict[Any, int] = {}
        for node in self._engine.session.get_inputs():
            known |= dict(zip(node.shape, self._shapes[node.name], strict=True))
        return {node.name: tuple(known.get(dim, dim) for dim in node.shape) for node in self._engine.session.get_outputs()}

    def _scribble(self, device: HostDevice) -> None:
        if self._scratch is not None:
            device.memory(*self._scratch)[:] = 0x7F

    def _refuse(self, reason: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, f"IExecutionContext: {reason}")
        return False


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self.engine, self.ready = engine, False

    def refit_cuda_engine(self) -> bool:
        self.engine.has_weights = self.ready
        return self.ready


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter
        self.errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> str:
        return self.errors[index]

    def refit_from_file(self, model: str) -> bool:
        if not Path(model).is_file():
            self.errors.append(f"cannot read {model}")
            return False
        self._refitter.engine.session = host_session(Path(model))
        self._refitter.ready = True
        return True


def _read(buffer: Any) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(bytes(memoryview(buffer)))
    except ValueError:
        return None
    return content
