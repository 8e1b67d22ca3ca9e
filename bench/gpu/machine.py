"""The GPU, what runs on it, and what its memory gives."""

import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import onnxruntime
import torch

from bench.gpu.measure import Bandwidth, Machine

_BUFFER = 4 << 30
"""Bytes that are read and copied, where there is as much room: a GPU's caches hold some ten MiB."""
_PASSES = 20
_PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnx-ir", "onnxscript", "triton", "cuda-core", "cuda-bindings")


def why_not() -> str | None:
    """Why nothing can run on a GPU here, with what to do; None where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs; install one for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU; `nvidia-smi` shows what the driver knows of"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider; put onnxruntime-gpu in its place, or in a "
            "folder that stands first on PYTHONPATH"
        )
    return None


def describe() -> Machine:
    """What this machine is."""
    gpu = torch.cuda.get_device_properties(0)
    return Machine(
        gpu=gpu.name,
        compute_capability=f"{gpu.major}.{gpu.minor}",
        memory=gpu.total_memory,
        driver=_driver(),
        versions={
            "python": platform.python_version(),
            "CUDA of torch": str(torch.version.cuda),
            "onnxruntime": onnxruntime.__version__,
            **{name: found for name in _PACKAGES if (found := _version(name))},
        },
        date=datetime.now(UTC).date().isoformat(),
    )


def bandwidth() -> Bandwidth:
    """Measure it: the median of a few passes over a buffer that no cache holds."""
    free, _ = torch.cuda.mem_get_info()
    size = min(_BUFFER, free // 4) // 4096 * 4096
    source = torch.ones(size // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return Bandwidth(copy=2 * size / seconds(partial(target.copy_, source)), read=size / seconds(partial(torch.sum, source)))


def seconds(work: Callable[[], object], passes: int = _PASSES) -> float:
    """What the GPU takes for `work` on torch's stream, by its own clock; the median of `passes`, after three to warm up."""
    for _ in range(3):
        work()
    events = [(_event(), _event()) for _ in range(passes)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(median(begin.elapsed_time(end) for begin, end in events)) / 1e3


def _event() -> Any:
    event: Any = torch.cuda.Event
    return event(enable_timing=True)


def _driver() -> str:
    """The driver's version, as `580.65.06`."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown: nvidia-smi does not answer"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
