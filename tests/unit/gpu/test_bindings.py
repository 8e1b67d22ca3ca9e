"""The real packages have what is called of them, and the stand-ins nothing that they lack."""

import enum
import inspect
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest

from runtime.bundle import Plan, Profile
from runtime.cuda import Cuda
from runtime.engine import EngineError
from runtime.trt_plan import Lines, PlanRefused, open_plan
from tests.unit.gpu import plans, sessions

TENSORRT = [name for name in ("tensorrt_rtx", "tensorrt") if find_spec(name)] or ["tensorrt_rtx"]
ONLY_RTX = {
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "IRuntimeCache",
}
"""Looked up only where `tensorrt_rtx` is at work."""
ONLY_RTX_MEMBERS = {
    "Runtime": {"get_engine_validity"},
    "IRuntimeConfig": {
        "create_runtime_cache",
        "set_runtime_cache",
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
    },
}


@pytest.fixture(params=TENSORRT)
def trt(request: pytest.FixtureRequest) -> Any:
    """Each that is installed; the two have one API, but for what is asked of `tensorrt_rtx` only."""
    return pytest.importorskip(request.param, exc_type=ImportError)


def is_rtx(trt: ModuleType) -> bool:
    return "rtx" in trt.__name__


def public(thing: Any) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


def classes() -> list[type]:
    """The stand-in's, that is: all that runtime.trt calls."""
    return [thing for thing in vars(plans).values() if isinstance(thing, type) and thing.__module__ == plans.__name__]


OWN_MEMBERS = {
    "ICudaEngine": {"logger", "profiles", "session", "has_weights", "inputs", "contexts", "names"},
    "IRuntimeConfig": {"allocation", "cache"},
    "IExecutionContext": {"config"},
    "Refitter": {"engine", "ready"},
    "OnnxParserRefitter": {"errors"},
    "IRuntimeCache": {"compiled"},
}
"""What the stand-in has for itself."""


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_tensorrt_has_every_member_that_is_used(trt: ModuleType, kind: type) -> None:
    name = kind.__name__
    if not is_rtx(trt) and name in ONLY_RTX:
        pytest.skip("is asked of tensorrt_rtx only")
    real = getattr(trt, name)
    assigned = set(re.findall(r"self\.([a-z]\w*)(?:\s*=|:\s|, )", inspect.getsource(kind))) if not _is_enum(kind) else set()
    wanted = (public(kind) | assigned) - OWN_MEMBERS.get(name, set())
    if not is_rtx(trt):
        wanted -= ONLY_RTX_MEMBERS.get(name, set())
    if _is_enum(kind):
        wanted = {member.name for member in kind}  # type: ignore[attr-defined]
    assert {member for member in wanted if not hasattr(real, member)} == set()


def _is_enum(kind: type) -> bool:
    return issubclass(kind, enum.Enum)


CALLS = {
    "Runtime.get_engine_validity": ("buffer",),
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.create_execution_context": ("runtime_config",),
    "ICudaEngine.get_tensor_name": ("index",),
    "ICudaEngine.get_tensor_mode": ("name",),
    "ICudaEngine.get_tensor_dtype": ("name",),
    "ICudaEngine.get_tensor_shape": ("name",),
    "ICudaEngine.get_tensor_location": ("name",),
    "ICudaEngine.get_aliased_input_tensor": ("name",),
    "IRuntimeConfig.set_execution_context_allocation_strategy": ("strategy",),
    "IRuntimeConfig.set_runtime_cache": ("cache",),
    "IRuntimeCache.deserialize": ("blob",),
    "IExecutionContext.set_device_memory": ("memory", "size"),
    "IExecutionContext.set_optimization_profile_async": ("profile_index", "stream_handle"),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
    "OnnxParserRefitter.get_error": ("index",),
    "OnnxParserRefitter.refit_from_file": ("model",),
}
"""The arguments that are given, under the real names and in their order."""


@pytest.mark.parametrize("call", CALLS)
def test_tensorrt_takes_the_arguments_that_are_given(trt: ModuleType, call: str) -> None:
    kind, method = call.split(".")
    if not is_rtx(trt) and (kind in ONLY_RTX or method in ONLY_RTX_MEMBERS.get(kind, set())):
        pytest.skip("is asked of tensorrt_rtx only")
    text = getattr(getattr(trt, kind), method).__doc__
    taken = [
        tuple(re.findall(r"(?:^|, )(\w+): ", found.split(", ", 1)[-1]))
        for found in re.findall(rf"{method}\((self: .*)\) ->", text)
    ]
    assert CALLS[call] in taken


def test_tensorrt_rtx_judges_a_file_before_it_is_opened(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    path = tmp_path / "damaged.plan"
    path.write_bytes(b"no plan at all" * 100)
    plan = Plan("tensorrt-rtx", trt.__version__, ("8.9",), 64, (Profile(1, 1, 1),), False, "m.onnx", "s.onnx", "a.onnx")
    lines = Lines(trt)
    with pytest.raises(PlanRefused, match=r"damaged.plan is damaged or no plan at all; build it on this machine"):
        open_plan(trt, trt.Runtime(lines.logger), lines, path, path, plan)


RUNTIME_CALLS = {
    "cudaMalloc": ("size",),
    "cudaFree": ("devPtr",),
    "cudaMallocHost": ("size",),
    "cudaFreeHost": ("ptr",),
    "cudaMemGetInfo": (),
    "cudaDriverGetVersion": (),
    "cudaRuntimeGetVersion": (),
    "cudaMemsetAsync": ("devPtr", "value", "count", "stream"),
    "cudaMemcpyAsync": ("dst", "src", "count", "kind", "stream"),
    "cudaMemcpy2DAsync": ("dst", "dpitch", "src", "spitch", "width", "height", "kind", "stream"),
    "cudaStreamSynchronize": ("stream",),
    "cudaGetErrorString": ("error",),
}


def test_cuda_bindings_take_the_arguments_that_are_given() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    for name, arguments in RUNTIME_CALLS.items():
        head = getattr(runtime, name).__doc__.splitlines()[0]
        taken = head[head.index("(") + 1 : head.rindex(")")]
        names = [part.split(":")[0].split()[-1] for part in taken.split(",") if part.strip()]
        assert tuple(names) == arguments, head
    asked = set(re.findall(r'_ask\(\s*"(\w+)"|_runtime\.(cuda[A-Z]\w+)\(', source("cuda")))
    assert {name for pair in asked for name in pair if name} == set(RUNTIME_CALLS)
    assert {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"} <= vars(
        runtime.cudaMemcpyKind
    ).keys()
    assert {"cudaSuccess", "cudaErrorMemoryAllocation"} <= vars(runtime.cudaError_t).keys()


def test_cuda_core_has_what_is_called() -> None:
    core = pytest.importorskip("cuda.core", exc_type=ImportError)
    graph = import_module("cuda.core.graph")
    for kind, members in {
        core.Device: ("set_current", "create_stream", "create_event", "compute_capability"),
        core.Stream: ("handle", "record", "create_graph_builder"),
        core.Event: ("sync",),
        graph.GraphBuilder: ("begin_building", "end_building", "complete"),
        graph.Graph: ("launch",),
    }.items():
        assert [member for member in members if not hasattr(kind, member)] == []
    assert "thread_local" in graph.GraphBuilder.begin_building.__doc__


def test_a_machine_without_a_gpu_is_told_so() -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    try:
        Cuda().close()
    except EngineError as error:
        message = str(error)
    else:
        pytest.skip("there is one")
    assert "engineshed devices" in message


def source(module: str) -> str:
    return (Path(__file__).parents[3] / "runtime" / f"{module}.py").read_text()


def test_onnx_runtime_has_what_is_called() -> None:
    """The CPU's package has the same API as the GPU's."""
    used = set(re.findall(r"\bort\.([a-zA-Z]\w+)", source("ort_providers") + source("ort_cuda"))) - {"preload_dlls"}
    assert {name for name in used if not hasattr(onnxruntime, name)} == set()
    for kind in (sessions.SessionOptions, sessions.InferenceSession):
        real = getattr(onnxruntime, kind.__name__)
        assert {name for name in public(kind) if not hasattr(real, name)} == set()
    for name in ("bind_input", "bind_output"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (sessions.Binding, onnxruntime.IOBinding))
        assert list(ours.parameters) == list(theirs.parameters)


def test_the_engines_need_nothing_but_numpy_and_what_computes() -> None:
    """So that they can be tried on a GPU in an environment that has no more."""
    absent = ("msgspec", "psutil", "zmq", "torch", "tokenizers", "cuda", "tensorrt_rtx")
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import runtime.trt, runtime.ort_cuda"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
