"""What runs TensorRT's engines: execution contexts, bound once and set anew only where a step differs from the last.

Recorded work refers to what its context holds, so a context whose work is recorded serves one shape for good; all other
steps share one context a profile. All of them share their scratch memory: on one stream no two run at the same time.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.accelerator import Accelerator
from runtime.engine import EngineError
from runtime.gpu_memory import Memory, Shape

if TYPE_CHECKING:
    from runtime.bundle import Profile  # which needs msgspec; this module does not
    from runtime.trt_plan import Lines

log = logging.getLogger(__name__)


class Contexts:
    """The `runtime.gpu.Backend` of the engines of a model and its two samplers."""

    pads = True
    recordable = True

    def __init__(
        self,
        trt: Any,
        runtime: Any,
        lines: "Lines",
        model: Any,
        samplers: tuple[Any, Any],
        profiles: "tuple[Profile, ...]",
        memory: Memory,
        cuda: Accelerator,
        cache: Path | None,
    ) -> None:
        """`samplers`: the plain one and the one that is adorned.

        `cache` is the file in which TensorRT-RTX keeps what it compiles here."""
        self._trt, self._runtime, self._lines, self._profiles = trt, runtime, lines, profiles
        self._model, self._samplers, self._memory, self._cuda = model, samplers, memory, cuda
        self.inputs = frozenset(_names(trt, model, trt.TensorIOMode.INPUT))
        self._scratch_size = max(1, *(engine.device_memory_size_v2 for engine in (model, *samplers)))
        self._scratch = cuda.allocate(
            self._scratch_size,
            "TensorRT's memory for a step",
            "start with fewer slots, or export the model again with a smaller batch and chunk",
        )
        self._cache_file, self._cache = cache, _compiled(model, cache)
        self._contexts: dict[tuple[str, Shape | int], _Context] = {}

    def check(self, shape: Shape) -> None:
        """See `runtime.gpu.Backend.check`."""
        self._profile(shape)

    def run(self, shape: Shape, longest: int) -> None:
        """See `runtime.gpu.Backend.run`."""
        profile = self._profile(shape)
        key = ("model", shape if shape.recorded else profile)
        if key not in self._contexts:
            self._contexts[key] = self._context(self._model, profile, eager=shape.recorded)
        self._contexts[key].run(shape)

    def sample(self, shape: Shape) -> None:
        """See `runtime.gpu.Backend.sample`."""
        plain, adorned = self._samplers
        name, engine = ("adorned", adorned) if shape.adjusted else ("sampler", plain)
        key = (name, shape if shape.recorded else 0)
        if key not in self._contexts:
            self._contexts[key] = self._context(engine, 0, eager=shape.recorded)
        self._contexts[key].run(shape)

    def close(self) -> None:
        """See `runtime.gpu.Backend.close`; what was compiled is written to the cache."""
        if self._cache is not None and self._cache_file is not None and self._contexts:
            _keep(self._cache, self._cache_file)
        self._contexts.clear()
        del self._model, self._samplers, self._cache, self._runtime

    def _profile(self, shape: Shape) -> int:
        for index, profile in enumerate(self._profiles):
            if shape.batch <= profile.max_batch and shape.seq <= profile.max_seq and shape.rows <= profile.max_rows:
                return index
        there = ", ".join(f"{p.max_batch} x {p.max_seq} with {p.max_rows} logit rows" for p in self._profiles)
        raise EngineError(
            f"a step of {shape.batch} x {shape.seq} tokens with {shape.rows} logit rows fits none of the plan's profiles "
            f"({there}); split it, or export the model again with larger ones"
        )

    def _context(self, engine: Any, profile: int, eager: bool) -> "_Context":
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED  # the engine records by itself
            # A kernel for a shape is compiled when that is first run, and never while it is recorded. Where shapes are many,
            # as those of prefill, waiting for the compiler at each would take longer than a special kernel saves.
            strategy = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER if eager else strategy.NONE
            if self._cache is not None:
                config.set_runtime_cache(self._cache)
        context = engine.create_execution_context(runtime_config=config)
        if context is None:
            raise EngineError(f"TensorRT makes no execution context: {self._lines.take()}")
        context.set_device_memory(self._scratch, self._scratch_size)
        if not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise EngineError(f"TensorRT does not take profile {profile}: {self._lines.take()}")
        return _Context(self._trt, engine, context, self._memory, self._cuda.stream, self._lines)


class _Context:
    """An execution context, and what is set on it."""

    def __init__(self, trt: Any, engine: Any, context: Any, memory: Memory, stream: int, lines: "Lines") -> None:
        self._context, self._memory, self._stream, self._lines = context, memory, stream, lines
        self._inputs = _names(trt, engine, trt.TensorIOMode.INPUT)
        self._tensors = self._inputs + _names(trt, engine, trt.TensorIOMode.OUTPUT)
        self._shape: Shape | None = None

    def run(self, shape: Shape) -> None:
        """Put a step of `shape` on the stream."""
        if shape != self._shape:
            self._set(shape)
        if not self._context.execute_async_v3(self._stream):
            self._shape = None
            raise EngineError(f"TensorRT failed on a step: {self._lines.take()}")

    def _set(self, shape: Shape) -> None:
        old, self._shape = self._shape, None  # what is set by halves is set anew next time
        if old is None or old.first_slot != shape.first_slot:
            for name in self._tensors:
                if not self._context.set_tensor_address(name, self._memory.address(name, shape.first_slot)):
                    raise EngineError(f"TensorRT does not take the address of {name}: {self._lines.take()}")
        for name in self._inputs:
            dims = self._memory.dims(name, shape)
            if (old is None or self._memory.dims(name, old) != dims) and not self._context.set_input_shape(name, dims):
                raise EngineError(f"TensorRT does not take {name} as {list(dims)}: {self._lines.take()}")
        self._shape = shape


def _names(trt: Any, engine: Any, mode: Any) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _compiled(engine: Any, path: Path | None) -> Any:
    """TensorRT-RTX's store of what it compiles, with what `path` has kept of it; None in TensorRT, which compiles nothing."""
    config = engine.create_runtime_config()
    if not hasattr(config, "create_runtime_cache"):
        return None
    cache = config.create_runtime_cache()
    if path is not None and path.is_file():
        cache.deserialize(path.read_bytes())  # one that was kept by another version or GPU is passed over
    return cache


def _keep(cache: Any, path: Path) -> None:
    """Write what was compiled; whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(bytes(memoryview(cache.serialize())))
        part.replace(path)
    except OSError as error:
        log.warning(
            "what TensorRT-RTX compiled cannot be kept in %s (%s), so the next start takes longer", path, error.strerror
        )
