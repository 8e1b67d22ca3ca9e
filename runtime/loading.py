"""From a bundle's variant to an engine on the device that it is meant for, and never more memory than it may take."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from runtime import bundle, devices, ort
from runtime.bundle import Bundle, BundleError, Variant
from runtime.devices import CPU_SLOTS, GPU_MEMORY, LOGIT_ROWS, Device, Gpu
from runtime.engine import Engine, EngineError

Provider = Literal["cuda", "tensorrt", "tensorrt-rtx"]

MOST_SLOTS = 64
"""Slots on a GPU where nobody says how many and its memory has room for more."""
_ROW_MULTIPLE = 16
"""Rows by which a slot for ONNX Runtime is longer than its tokens, at most."""
_LAST_WORDS = 2000
"""Characters of what a rebuild said last that an error shows."""


def default_cache() -> Path:
    """The folder for what can be built again: `engineshed` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engineshed"


@dataclass(frozen=True)
class Placement:
    """Where an engine is to run, and how much of it."""

    device: Device
    slots: int | None = None
    """None: `CPU_SLOTS` on a CPU; on a GPU as many as its memory holds, up to `MOST_SLOTS`."""
    context: int | None = None
    """Tokens a slot holds; None takes what the model, and a plan, was made for."""
    threads: int = 0
    """Of a CPU's engine; 0 takes all cores that the process may use."""
    gpu_memory: float = GPU_MEMORY
    provider: Provider = "cuda"
    """Of ONNX Runtime, for a variant for cuda."""
    build_on_load: bool = False
    """Build a plan that is for another GPU or TensorRT anew."""
    cache: Path = field(default_factory=default_cache)
    """Where plans that were built on load are kept, and what TensorRT-RTX compiled for this GPU."""


def start(folder: Path, manifest: Bundle, variant: Variant, place: Placement, *, beside: Variant | None = None) -> Engine:
    """The engine of `variant` of the bundle in `folder`, its files verified.

    On a GPU, `beside` is another variant for which room is left; the GPU is claimed for this process, so nothing of it may have
    used CUDA before. Raises BundleError, EngineError or DeviceError.
    """
    if place.device.kind == "cpu":
        return ort.start(
            folder, manifest, variant, slots=place.slots or CPU_SLOTS, context=place.context, threads=place.threads
        )
    gpu = devices.gpu(place.device)
    devices.check(gpu)
    limit = devices.budget(gpu, place.gpu_memory)
    context = _context(manifest, variant, place.context)
    slots = place.slots
    if slots is None:
        both = [variant] if beside is None else [variant, beside]
        weights = sum(_weights(one) for one in both) + LOGIT_ROWS * manifest.vocab_size * 4
        per_token = sum(one.kv_bytes_per_token for one in both)
        slots = devices.slots_that_fit(limit, weights, per_token, _rows(variant, context), most=_most(variant))
    bundle.verify(folder, manifest.served(variant))
    devices.claim(gpu)
    return _on_gpu(folder, manifest, variant, place, gpu, slots, context, limit)


def _on_gpu(
    folder: Path, manifest: Bundle, variant: Variant, place: Placement, gpu: Gpu, slots: int, context: int, limit: int
) -> Engine:
    from runtime.cuda import Cuda  # which, like its users, is there only where its packages are

    cuda = Cuda(limit)
    if variant.plan is None:
        from runtime import ort_cuda

        return ort_cuda.load(
            folder,
            variant,
            manifest.vocab_size,
            slots=slots,
            context=context,
            cuda=cuda,
            provider=place.provider,
            cache=place.cache,
        )
    from runtime import trt

    def rebuild(reason: str) -> tuple[Path, Variant]:
        return folder, rebuilt(folder, variant, gpu.compute_capability, place.cache)

    return trt.load(
        folder,
        variant,
        manifest.vocab_size,
        slots=slots,
        context=context,
        cuda=cuda,
        cache=place.cache,
        rebuild=rebuild if place.build_on_load else None,
    )


def rebuilt(folder: Path, variant: Variant, compute_capability: str, cache: Path) -> Variant:
    """`variant` with plans in `cache`, built from its ONNX files for a GPU of `compute_capability`. Raises EngineError.

    A process of its own builds, which takes its memory with it when it ends; the runtime itself knows nothing of export.
    """
    command = [
        *(sys.executable, "-m", "export.rebuild", str(folder), variant.name),
        *("--gpu", compute_capability, "--cache", str(cache / "plans")),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-_LAST_WORDS:] or f"exit status {done.returncode}"
        raise EngineError(f"variant {variant.name!r} could not be built anew: {said}")
    return msgspec.json.decode(done.stdout, type=Variant)


def _context(manifest: Bundle, variant: Variant, wanted: int | None) -> int:
    longest = manifest.longest(variant)
    if wanted is not None and wanted > longest:
        raise BundleError(
            f"{variant.name} of bundle {manifest.name!r} is made for {longest} tokens; --context {wanted} is more"
        )
    return longest if wanted is None else wanted


def _rows(variant: Variant, context: int) -> int:
    """Rows of a slot that holds `context` tokens."""
    return context + _ROW_MULTIPLE if variant.plan is None else variant.plan.capacity


def _most(variant: Variant) -> int:
    return MOST_SLOTS if variant.plan is None else max(profile.max_batch for profile in variant.plan.profiles)


def _weights(variant: Variant) -> int:
    """Bytes of weights that the variant keeps on a GPU."""
    plan = variant.plan
    of_graph = sum(file.size for file in variant.files if file.path not in variant.computing)
    if plan is None or plan.stripped:
        return of_graph
    return sum(file.size for file in variant.files if file.path in variant.computing)
