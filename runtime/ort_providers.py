"""ONNX Runtime's sessions on a GPU: which provider runs a graph, with which options, and what is said where it does not.

ONNX Runtime prefers to go on without a provider that fails. Here that is an error: a model meant for the GPU would otherwise
be served from the CPU, and nobody would know why it is slow.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort

from runtime.accelerator import Accelerator
from runtime.engine import EngineError
from runtime.gpu_memory import Memory, Shape

log = logging.getLogger(__name__)

Provider = Literal["cuda", "tensorrt", "tensorrt-rtx"]

_CPU, _CUDA, _RTX = "CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"
_MODEL_INPUTS = ("input_ids", "position_ids", "kv_lengths", "kv_range", "rope_lengths", "logit_rows", "forced")
"""Those on the device, beside the slots."""
_NAMES: dict[str, str] = {"cuda": _CUDA, "tensorrt": "TensorrtExecutionProvider", "tensorrt-rtx": _RTX}


def check_installed(provider: Provider) -> None:
    """Raise EngineError where this ONNX Runtime has no CUDA provider; have CUDA's libraries found where they were installed."""
    if _CUDA not in ort.get_available_providers():
        raise EngineError(
            f"the installed onnxruntime {ort.__version__} is the one for CPUs: pip uninstall onnxruntime, then pip install "
            "--force-reinstall 'engineshed[cuda]'; onnxruntime and onnxruntime-gpu must not be installed both, for they write "
            "to the same folder"
        )
    if provider == "tensorrt" and _NAMES[provider] not in ort.get_available_providers():
        raise EngineError(f"the installed onnxruntime {ort.__version__} has no TensorRT provider; take --provider cuda")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def cuda_options(cuda: Accelerator, limit: int) -> dict[str, str]:
    """Of the CUDA provider, for a session that takes `limit` bytes at most and puts its work on the stream of `cuda`."""
    return {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(cuda.stream),
        "gpu_mem_limit": str(limit),
        "arena_extend_strategy": "kSameAsRequested",  # doubling would pass the limit with half of it unused
        "use_tf32": "0",  # its 10 bits are not what a variant in float32 was verified with
    }


def cuda_session(path: Path, options: dict[str, str]) -> tuple[Any, bool]:
    """The session of the graph at `path` on the CUDA provider, and whether it records."""
    try:
        return _session(path, ort.SessionOptions(), [(_CUDA, options | {"enable_cuda_graph": "1"}), _CPU], _CUDA), True
    except EngineError as error:  # a node that only the CPU has, or a branch
        log.warning("%s is launched piece by piece, which is slower: %s", path, error)
    return _session(path, ort.SessionOptions(), [(_CUDA, options), _CPU], _CUDA), False


def compiling_session(
    path: Path, provider: Provider, options: dict[str, str], chunk: int, memory: Memory, cache: Path | None
) -> Any:
    """The session of the graph at `path` on a provider that compiles it for this GPU, which can take minutes."""
    name, profile = _NAMES[provider], _profile(memory, chunk)
    stream = {key: options[key] for key in ("has_user_compute_stream", "user_compute_stream")}
    session_options = ort.SessionOptions()
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    if provider == "tensorrt":
        kept = {} if cache is None else {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
        shapes = {f"trt_profile_{which}_shapes": text for which, text in profile.items()}
        compiled = {"device_id": "0", **stream, **shapes, **kept}
        return _session(path, session_options, [(name, compiled), (_CUDA, options), _CPU], name)
    kept = {} if cache is None else {"nv_runtime_cache_path": str(cache)}
    shapes = {f"nv_profile_{which}_shapes": text for which, text in profile.items()}
    session_options.add_provider_for_devices([_rtx_device()], {**stream, **shapes, **kept})
    session_options.add_provider(_CUDA, options)
    return _session(path, session_options, None, name)


def _rtx_device() -> Any:
    """The GPU as ONNX Runtime's plugin for TensorRT-RTX sees it."""
    try:
        plugin = import_module("onnxruntime_ep_nv_tensorrt_rtx")
        if not any(device.ep_name == _RTX for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(_RTX, plugin.get_library_path())
    except Exception as error:  # the import's, the file's or ONNX Runtime's own
        raise EngineError(
            f"ONNX Runtime's plugin for TensorRT-RTX cannot be loaded ({error}); "
            "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13, or take --provider cuda"
        ) from error
    found = [device for device in ort.get_ep_devices() if device.ep_name == _RTX]
    if not found:
        raise EngineError("TensorRT-RTX takes no GPU of this machine (it wants an RTX one); take --provider cuda")
    return found[0]


def _session(path: Path, options: Any, providers: list[Any] | None, wanted: str) -> Any:
    """A session that runs on the provider `wanted`. Raises EngineError, also where ONNX Runtime would do without it."""
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot load {path} on the GPU: {error}") from error
    if wanted not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot start its {wanted}, most likely for want of CUDA's or cuDNN's libraries; "
            "pip install 'engineshed[cuda]', and look at `engineshed devices`"
        )
    return session


def _profile(memory: Memory, chunk: int) -> dict[str, str]:
    """The range of the model's shapes in the words of the providers that compile, by `min`, `opt` and `max`."""
    shapes = {
        "min": Shape(0, 1, 1, 1, 1),
        "opt": Shape(0, memory.slots, 1, memory.slots, memory.capacity),
        "max": Shape(0, memory.slots, chunk, memory.rows, memory.capacity),
    }
    names = [*_MODEL_INPUTS, *(f"past.{name}" for name in memory.kv_names)]
    return {which: ",".join(f"{name}:{_times(memory.dims(name, shape))}" for name in names) for which, shape in shapes.items()}


def _times(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))
