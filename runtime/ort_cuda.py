"""The engine on ONNX Runtime's GPU providers: tensors bound to device memory by address, decode steps replayed from recordings.

ONNX Runtime records by itself, under a number that each run names, and replays without looking at its bindings; that holds
because no tensor ever moves. GroupQueryAttention reads a whole slot for every row, so no batch is padded: there is a recording
for each number of slots.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from runtime.accelerator import Accelerator, check_room
from runtime.engine import DeviceLost, EngineError
from runtime.gpu import GpuEngine
from runtime.gpu_memory import ADJUSTMENTS, SAMPLING, TOPS, Memory, Shape
from runtime.ort_providers import Provider, check_installed, compiling_session, cuda_options, cuda_session

if TYPE_CHECKING:
    from runtime.bundle import Variant  # which needs msgspec; this module does not

CHUNK = 512
"""Prompt tokens of a step; not measured yet."""
ROWS = 64
"""Logit rows of a step, where there are no more slots than that."""
_ROW_MULTIPLE = 16
"""Of a slot's rows, so that every slot begins at an aligned address."""
_NOT_RECORDED = -1
"""The number of a run that ONNX Runtime neither records nor replays."""
_SAMPLER_COPIES = 16
"""Of the logits, for which the sampler's session has room; an estimate."""
_BFLOAT16 = 16
"""ONNX's number of the type, for which numpy has none."""
_KV_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": _BFLOAT16}
_TYPES: dict[str, Any] = {
    "input_ids": np.int64,
    "position_ids": np.int64,
    "kv_lengths": np.int32,
    "kv_longest": np.int32,
    "kv_range": np.int64,
    "rope_lengths": np.int32,
    "logit_rows": np.int64,
    "logits": np.float32,
    "tokens": np.int64,
    "logprobs": np.float32,
    "mask": np.uint8,
    **SAMPLING,
    **ADJUSTMENTS,
    **TOPS,
}


def load(
    folder: Path,
    variant: "Variant",
    vocab_size: int,
    *,
    slots: int,
    context: int,
    cuda: Accelerator,
    provider: Provider = "cuda",
    cache: Path | None = None,
) -> GpuEngine:
    """The engine of `variant`, whose files in the bundle `folder` have been verified; it owns `cuda`.

    `provider` runs the model, the CUDA provider what that leaves and the sampler; the two of TensorRT keep what they compile
    in the folder `cache`. Raises EngineError.
    """
    if variant.sampler is None or variant.adorned is None:
        raise EngineError(f"variant {variant.name!r} has no sampler, which a GPU needs; export the model again")
    check_installed(provider)
    # At least one row more than tokens, as in every GPU engine: see `Memory.fill`.
    capacity = -(-(context + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    rows = max(slots, ROWS)
    memory = Memory(
        cuda,
        variant.layers,
        variant.kv_dtype,
        slots=slots,
        context=context,
        capacity=capacity,
        tokens=max(slots, CHUNK),
        rows=rows,
        vocab_size=vocab_size,
    )
    advice = "start with fewer slots or a shorter context, or export the model in a smaller precision"
    check_room(cuda, variant.size, f"variant {variant.name!r}", advice)
    before, left = cuda.free, cuda.limit - cuda.taken
    share = min(left // 8, (64 << 20) + _SAMPLER_COPIES * 4 * rows * vocab_size)
    samplers = [cuda_session(folder / path, cuda_options(cuda, share)) for path in (variant.sampler, variant.adorned)]
    options = cuda_options(cuda, left - 2 * share)
    if provider == "cuda":
        model, records = cuda_session(folder / variant.model, options)
    else:
        model, records = compiling_session(folder / variant.model, provider, options, CHUNK, memory, cache), False
    cuda.account(max(before - cuda.free, 0))
    backend = Sessions(memory, variant.kv_dtype, (model, records), *samplers)
    return GpuEngine(
        cuda,
        memory,
        backend,
        chunk=CHUNK,
        step_bytes=variant.step_bytes or variant.size,
        length_boundaries=variant.length_boundaries,
    )


class Sessions:
    """The `runtime.gpu.Backend` of the sessions of a model and its two samplers."""

    pads = False
    recordable = False  # by the engine, that is

    def __init__(self, memory: Memory, kv_dtype: str, *sessions: tuple[Any, bool]) -> None:
        """`sessions`: of the model, the plain sampler and the one that is adorned, each with whether it records and replays."""
        self._model, self._sampler, self._adorned = (
            _Session(session, memory, kv_dtype, records) for session, records in sessions
        )
        self.inputs = frozenset(self._model.inputs)
        missing = {"input_ids", "forced", *(f"past.{name}" for name in memory.kv_names)} - self.inputs
        if missing:
            raise EngineError(f"the model's graph has no input {min(missing)!r}; export the model again")

    def check(self, shape: Shape) -> None:
        """See `runtime.gpu.Backend.check`; ONNX Runtime takes every shape."""

    def run(self, shape: Shape, longest: int) -> None:
        """See `runtime.gpu.Backend.run`."""
        self._model.run(shape, longest)

    def sample(self, shape: Shape) -> None:
        """See `runtime.gpu.Backend.sample`."""
        (self._adorned if shape.adjusted else self._sampler).run(shape, 0)

    def close(self) -> None:
        """See `runtime.gpu.Backend.close`."""
        del self._model, self._sampler, self._adorned


class _Session:
    """A session and its bindings: one for each shape that is recorded, one for each run of slots otherwise."""

    def __init__(self, session: Any, memory: Memory, kv_dtype: str, records: bool) -> None:
        self._session, self._memory, self._records = session, memory, records
        self.inputs = [node.name for node in session.get_inputs()]
        self._outputs = [node.name for node in session.get_outputs()]
        self._kv_type = _KV_TYPES[kv_dtype]
        known = _TYPES.keys() | {f"{kind}.{name}" for kind in ("past", "present") for name in memory.kv_names}
        strange = {*self.inputs, *self._outputs} - known
        if strange:
            raise EngineError(f"the graph has a tensor {min(strange)!r} that nobody knows; export the model again")
        self._bindings: dict[Shape | tuple[int, int], _Binding] = {}
        self._numbers: dict[Shape, int] = {}
        """Of the recordings."""

    def run(self, shape: Shape, longest: int) -> None:
        """Put a step of `shape` on the stream."""
        recorded = shape.recorded and self._records
        key = shape if recorded else (shape.first_slot, shape.batch)
        if key not in self._bindings:
            self._bindings[key] = _Binding(self._session.io_binding())
        binding = self._bindings[key]
        if binding.shape != shape:
            self._bind(binding, shape)
        # What is recorded holds for every length up to the slot's end.
        binding.longest[...] = self._memory.capacity if recorded else longest
        number = self._numbers.setdefault(shape, len(self._numbers) + 1) if recorded else _NOT_RECORDED
        try:
            self._session.run_with_iobinding(binding.binding, _run_options(number))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise _explained(error) from error

    def _bind(self, binding: "_Binding", shape: Shape) -> None:
        old, binding.shape = binding.shape, shape
        for name in self.inputs:
            if name == "kv_longest":  # which is read on the host while the step is put on the stream
                binding.binding.bind_input(name, "cpu", 0, np.int32, (), binding.longest.ctypes.data)
            elif old is None or self._memory.dims(name, old) != self._memory.dims(name, shape):
                binding.binding.bind_input(name, *self._place(name, shape))
        for name in self._outputs:
            if old is None or self._memory.dims(name, old) != self._memory.dims(name, shape):
                binding.binding.bind_output(name, *self._place(name, shape))

    def _place(self, name: str, shape: Shape) -> tuple[Any, ...]:
        dtype = _TYPES.get(name, self._kv_type)
        return "cuda", 0, dtype, self._memory.dims(name, shape), self._memory.address(name, shape.first_slot)


class _Binding:
    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.shape: Shape | None = None
        self.longest = np.zeros((), np.int32)


@lru_cache(maxsize=1024)
def _run_options(number: int) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the engine waits where it must
    return options


def _explained(error: Exception) -> EngineError:
    text = " ".join(str(error).split())
    if "Failed to allocate memory" in text or "out of memory" in text:
        return EngineError(
            f"ONNX Runtime has no GPU memory left for a step ({text}); start with fewer slots, a shorter context, or a larger "
            "share of the GPU's memory"
        )
    if "CUDA failure" in text or "CUDA error" in text:
        return DeviceLost(f"the GPU failed on a step: {text}; start the engine again")
    return EngineError(f"ONNX Runtime failed on a step: {text}")
