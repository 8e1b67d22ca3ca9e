"""What an engine can run on: this machine's cores, and the GPUs as CUDA would number them.

Imports little: `engineshed serve` reads `--device` before its engines load. GPUs are seen through NVML (`nvidia-ml-py`), which
starts no CUDA context: a process that has only looked holds no memory on any GPU.
"""

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

CPU_SLOTS = 8
"""Slots of an engine on a CPU unless somebody says otherwise; on a GPU its free memory decides."""
CUDA = "13.0"
"""The CUDA version that a driver has to support for the libraries that the extras install."""
CAPABILITY = "7.5"
"""The oldest compute capability (Turing) that CUDA 13's libraries have code for."""
WORKSPACE = 768 << 20
"""Bytes on a GPU that are neither weights nor slots: the CUDA context with its kernels, which take most of it, the libraries'
scratch memory, and a step's activations and logits. An allowance, not a measurement."""
GPU_MEMORY = 0.9
"""Share of a GPU's memory that an engine takes at most, where nobody says otherwise."""
LOGIT_ROWS = 128
"""Of a step, for which a GPU's engine has room, at most."""

_ORDINAL = re.compile(r"\s*\+?([0-9]+)")


class DeviceError(Exception):
    """A device is not there or cannot be used; the message says what to do."""


class Device(msgspec.Struct, frozen=True):
    """Where an engine is to run, as a command line names it; whether it is there, `gpu` says."""

    kind: Literal["cpu", "cuda"]
    index: int = 0
    """CUDA's number for the GPU; 0 on the CPU."""

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


class Cpu(msgspec.Struct, frozen=True):
    """The processor, as far as this process may use it."""

    cores: int
    total: int
    """Bytes of memory."""
    available: int
    """Bytes that can be had without swapping. A container's own limit is not in it."""


class Gpu(msgspec.Struct, frozen=True):
    """A GPU at one moment."""

    index: int
    """N in `cuda:N`."""
    uuid: str
    """As `GPU-8932f937-d72c-4106-c12f-20bd9faed9f6`."""
    name: str
    compute_capability: str
    """As `8.9`."""
    total: int
    """Bytes of memory."""
    free: int
    """Bytes that no process holds now."""
    driver: str
    """The driver's version, as `580.95.05`."""
    cuda: str
    """The latest CUDA version that the driver supports, as `13.0`."""
    mig: bool = False
    """Whether it is divided into MIG slices."""

    def __str__(self) -> str:
        return f"cuda:{self.index} ({self.name})"


def parse(text: str) -> Device:
    """The device that `cpu`, `cuda` (short for `cuda:0`) or `cuda:N` means. Raises DeviceError for anything else."""
    match = re.fullmatch(r"(cpu)|cuda(?::(0|[1-9][0-9]{0,3}))?", text.strip())
    if match is None:
        raise DeviceError(f"{text!r} is no device; write cpu, cuda or cuda:N, N counting from 0")
    return Device("cpu") if match[1] else Device("cuda", int(match[2] or 0))


def parse_list(text: str) -> tuple[Device, ...]:
    """The devices of a list with commas, as `cuda:0,cuda:1`, one engine each; `cpu` may come several times.

    Raises DeviceError for an item that is empty or no device, and for a GPU that is named twice.
    """
    found: list[Device] = []
    for item in text.split(","):
        if not item.strip():
            raise DeviceError(f"{text!r} is no list of devices: an item is empty; write for instance cuda:0,cuda:1")
        device = parse(item)
        if device.kind == "cuda" and device in found:
            raise DeviceError(
                f"{text!r} names {device} twice; a second engine would take the first one's memory and time: name each GPU once"
            )
        found.append(device)
    return tuple(found)


def cpu() -> Cpu:
    """The cores that this process may use, and the machine's memory now."""
    import psutil

    memory = psutil.virtual_memory()
    return Cpu(cores=len(os.sched_getaffinity(0)), total=memory.total, available=memory.available)


def core_numbers() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def memory_limit() -> int:
    """Bytes of memory that this process and its children may take: the machine's, or a container's where that is less."""
    limits = [cpu().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def gpus() -> list[Gpu]:
    """The GPUs that CUDA would show this process, in the order of `cuda:0`, `cuda:1`, ...

    They are numbered by PCI bus, as nvidia-smi does, and CUDA where CUDA_DEVICE_ORDER is PCI_BUS_ID. CUDA's default order,
    fastest first, cannot be told without a CUDA context; it does not matter: a worker asks for its GPU by UUID (`claim`).
    CUDA_VISIBLE_DEVICES counts as it does for CUDA: indices, or UUIDs and their beginnings; the first entry that is none
    hides itself and all after it, and one that comes twice hides everything.

    Raises DeviceError where there is no GPU or none can be seen: no `nvidia-ml-py`, no driver, all hidden, a MIG slice named.
    """
    with _nvml() as nvml:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        if not handles:
            raise DeviceError("the NVIDIA driver is loaded and finds no GPU; see what it logged: sudo dmesg | grep -i nvrm")
        handles.sort(key=lambda handle: _bus(nvml, handle))
        visible = _visible([nvml.nvmlDeviceGetUUID(handle) for handle in handles])
        if not visible:
            raise DeviceError(
                f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU of this machine, which has "
                f"{len(handles)}; unset it, or list indices or UUIDs as nvidia-smi -L shows them"
            )
        return [_describe(nvml, handles[place], index) for index, place in enumerate(visible)]


def gpu(device: Device) -> Gpu:
    """The GPU that `device` means. Raises DeviceError, which names those there are."""
    if device.kind != "cuda":
        raise DeviceError(f"{device} is no GPU; write cuda or cuda:N")
    found = gpus()
    if device.index >= len(found):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise DeviceError(
            f"there is no {device}, only {', '.join(map(str, found))}"
            + (f" under CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else "")
            + "; see: engineshed devices"
        )
    return found[device.index]


def check(gpu: Gpu, cuda: str = CUDA) -> None:
    """Raise DeviceError where libraries made for the version `cuda` cannot run on `gpu`."""
    if gpu.mig:
        raise DeviceError(
            f"{gpu} is divided into MIG slices, which engines do not use; take another GPU, or undo it: "
            f"sudo nvidia-smi --id={gpu.uuid} --multi-instance-gpu=0"
        )
    if _version(gpu.compute_capability) < _version(CAPABILITY):
        raise DeviceError(
            f"{gpu} has compute capability {gpu.compute_capability}; CUDA {CUDA} needs {CAPABILITY} (Turing) or newer: "
            "take another GPU, or serve a variant for the cpu"
        )
    check_driver(gpu, cuda)


def check_driver(gpu: Gpu, least: str) -> None:
    """Raise DeviceError where the driver of `gpu` supports no CUDA version as new as `least` (`13.0`)."""
    if _version(gpu.cuda) < _version(least):
        raise DeviceError(
            f"the driver of {gpu} is {gpu.driver}, which supports CUDA {gpu.cuda} at most; CUDA {least} is needed: install a "
            "newer NVIDIA driver (nvidia-smi shows the CUDA version of the one that runs)"
        )


def claim(gpu: Gpu) -> None:
    """Make `gpu` the only GPU of this process and its children: it is `cuda:0` to every library, and to `gpus`, from then on.

    To be called before anything initialises CUDA, which reads the environment once.
    """
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid


def budget(gpu: Gpu, share: float) -> int:
    """Bytes that an engine may take of `gpu`: `share` (over 0, at most 1) of the whole, but no more than is free.

    Of the whole, not of what is free, so that an engine has as many slots whether it starts first or again after a
    crash; what others hold already is theirs. Raises DeviceError for a share out of range.
    """
    if not 0 < share <= 1:
        raise DeviceError(f"{share} is no share of a GPU's memory; give a number over 0 and at most 1")
    return min(gpu.free, int(share * gpu.total))


def slots_that_fit(budget_bytes: int, weight_bytes: int, kv_bytes_per_token: int, context: int, *, most: int) -> int:
    """How many slots of `context` tokens fit into `budget_bytes` beside the weights and `WORKSPACE`; `most` at most.

    `weight_bytes` is all that the engine keeps on the GPU whatever the slots: weights, and a plan's own activation memory.
    Raises DeviceError with the whole sum where not even one slot fits.
    """
    left, slot = budget_bytes - weight_bytes - WORKSPACE, kv_bytes_per_token * context
    if left >= slot:
        return min(most, left // slot)
    shorter = f"start with --context {left // kv_bytes_per_token} or less, or " if left >= kv_bytes_per_token else ""
    raise DeviceError(
        f"no slot of {context} tokens fits on the GPU: {_mib(budget_bytes)} that the engine may take, less "
        f"{_mib(weight_bytes)} of weights and {_mib(WORKSPACE)} of workspace, leave {_mib(left)}, and a slot takes "
        f"{_mib(slot)} ({context} x {kv_bytes_per_token:,} bytes); {shorter}free memory on the GPU, raise "
        "--gpu-memory or serve a smaller variant"
    )


@contextmanager
def _nvml() -> Iterator[Any]:
    """The module `pynvml`, initialised; its errors become DeviceError."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise DeviceError(
            "GPUs cannot be seen without nvidia-ml-py, which is not installed; run: pip install 'engineshed[cuda]'"
        ) from None
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError_LibraryNotFound:
        raise DeviceError(
            "there is no NVIDIA driver here (libnvidia-ml.so.1 is not found): install it; a container gets its host's when it "
            "is started with GPUs (docker run --gpus all)"
        ) from None
    except nvml.NVMLError_DriverNotLoaded:
        raise DeviceError(
            "the NVIDIA driver is installed but not loaded; install one that fits this kernel, or run: sudo modprobe nvidia"
        ) from None
    except nvml.NVMLError_LibRmVersionMismatch:
        raise DeviceError("the NVIDIA driver was updated while the old one is still loaded; restart this machine") from None
    except nvml.NVMLError_NoPermission:
        raise DeviceError("this user may not open /dev/nvidiactl; add the user to the group that owns it") from None
    except nvml.NVMLError as error:
        raise DeviceError(f"the NVIDIA driver gave an error ({error}); see what nvidia-smi says") from error


def _describe(nvml: Any, handle: Any, index: int) -> Gpu:
    total, free = _memory(nvml, handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 13020 is 13.2
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        compute_capability=f"{major}.{minor}",
        total=total,
        free=free,
        driver=nvml.nvmlSystemGetDriverVersion(),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        mig=_divided(nvml, handle),
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Bytes in all and free."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:  # a GPU without memory of its own, which shares the processor's
        shared = cpu()
        return shared.total, shared.available
    return memory.total, memory.free


def _divided(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError_NotSupported:
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _bus(nvml: Any, handle: Any) -> tuple[int, int, int]:
    place = nvml.nvmlDeviceGetPciInfo(handle)
    return place.domain, place.bus, place.device


def _visible(uuids: list[str]) -> list[int]:
    """The places in `uuids` that CUDA_VISIBLE_DEVICES shows, in its order. Raises DeviceError where it names a MIG slice."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return list(range(len(uuids)))
    entries = value.split(",")
    by_uuid = entries[0].startswith("GPU-")
    seen: list[int] = []
    for entry in entries:
        if entry.startswith("MIG-"):
            raise DeviceError(f"CUDA_VISIBLE_DEVICES names the MIG slice {entry}, which engines do not use; name whole GPUs")
        place = _place_of_uuid(entry, uuids) if by_uuid else _place_of_ordinal(entry, uuids)
        if place is None:
            break
        if place in seen:
            return []
        seen.append(place)
    return seen


def _place_of_uuid(beginning: str, uuids: list[str]) -> int | None:
    """Where the one UUID stands that begins so; an entry of another kind than the list's first counts as invalid, too."""
    fitting = [place for place, uuid in enumerate(uuids) if uuid.startswith(beginning)]
    return fitting[0] if beginning.startswith("GPU-") and len(fitting) == 1 else None


def _place_of_ordinal(text: str, uuids: list[str]) -> int | None:
    """The number at the beginning of `text`: CUDA reads it with strtoul, to which `1gpu` is 1."""
    match = _ORDINAL.match(text)
    return int(match[1]) if match is not None and int(match[1]) < len(uuids) else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _mib(size: int) -> str:
    return f"{size >> 20:,} MiB"
