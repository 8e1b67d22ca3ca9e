"""What computes: two engines with the same files give the same tokens where this is the same, too."""

import platform
from importlib import import_module
from pathlib import Path

from runtime import devices
from runtime.bundle import Variant
from runtime.devices import Device

_CPU_FLAGS = frozenset(
    (
        *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
        *("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
    )
)
"""Those by which ONNX Runtime chooses kernels that round differently."""
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def describe(variant: Variant, device: Device, provider: str = "cuda", cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The library, its version and the kind of processor that `variant` runs with on `device`.

    `provider` is ONNX Runtime's for a variant for cuda. Raises DeviceError where there is no such GPU.
    """
    if device.kind == "cpu":
        return f"{_version('onnxruntime')} on {platform.machine()} {' '.join(_flags(cpuinfo))}".rstrip()
    gpu = devices.gpu(device)
    module = _MODULES.get(variant.target)
    library = f"{_version('onnxruntime')} {provider}" if module is None else _version(module)
    return f"{library} on {gpu.name} {gpu.compute_capability}"


def _version(module: str) -> str:
    """The module's name and version; its name alone where it is not installed, which whoever needs it will say better."""
    try:
        return f"{module} {import_module(module).__version__}"
    except ImportError:
        return module


def _flags(cpuinfo: Path) -> list[str]:
    """What of `_CPU_FLAGS` the first processor has; nothing where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    words = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(_CPU_FLAGS & set(words.split()))
