"""The engine on ONNX Runtime: KV slots bound in place, once; a step moves a few integers."""

import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import psutil

from runtime import bundle
from runtime.bundle import Bundle, Variant
from runtime.engine import Adjustments, Batch, Draw, EngineError, Float32, Int64
from runtime.footprint import CHUNK, ROWS

_MANY_COST = {"fp32": 0.0, "int8": 0.2, "int4": 0.2}
_ROW_COST = {"fp32": 0.06, "int8": 0.13, "int4": 0.13}
_BYTE_COST = {"fp32": 1.0, "int8": 1.3, "int4": 2.0}
"""By precision, as measured on x86-64 with AVX-512: a step in float32 takes the time of reading the weights, in which more
rows are nearly free; quantized products are bound by arithmetic already at one row, and read other weights for several."""
_ADORNING = "mask", "adjust_ids", "adjust_bias", "adjust_scale", "adjust_penalty", "alternatives"
_KV_TYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16}


class OrtEngine:
    """A variant of a bundle on ONNX Runtime's CPU provider.

    One buffer a layer, [slots, kv_heads, capacity, dim], is past and present at once: GroupQueryAttention and
    TensorScatter write the new rows into it and nothing is copied. Bindings are made once for each (first slot, batch)
    and reused; a step binds its few integers and runs.
    """

    def __init__(self, folder: Path, variant: Variant, vocab_size: int, *, slots: int, context: int, threads: int = 0) -> None:
        """Load `variant` of the bundle in `folder`. `threads` 0 means all cores this process may use."""
        if variant.kv_dtype not in _KV_TYPES:
            raise EngineError(f"variant {variant.name!r} keeps its cache in {variant.kv_dtype}, which the CPU does not serve")
        self.slots, self.context, self.vocab_size = slots, context, vocab_size
        self.chunk, self.rows, self.runs_ahead = CHUNK, max(slots, ROWS), False
        self.length_boundaries = variant.length_boundaries
        self.many_cost = _MANY_COST.get(variant.precision, 0.2)
        self.row_cost = _ROW_COST.get(variant.precision, 0.13)
        self.step_cost = _BYTE_COST.get(variant.precision, 2.0) * (variant.step_bytes or variant.size)
        self._session = session(folder / variant.model, threads)
        self._input_names = {node.name for node in self._session.get_inputs()}
        dtype = np.dtype(_KV_TYPES[variant.kv_dtype])
        _check_memory(variant, slots, context)
        self._kv = {
            f"{layer.index}.{part}": _zeros((slots, layer.kv_heads, context, dim), dtype)
            for part in ("key", "value")
            for layer in variant.layers
            for dim in [layer.key_dim if part == "key" else layer.value_dim]
        }
        self._adorns = self._input_names.issuperset(_ADORNING)
        """The graph masks, adjusts and tells alternatives; those for GPUs, which run here to be verified, do not."""
        missing = {f"past.{name}" for name in self._kv} - self._input_names
        if missing:
            raise EngineError(f"{variant.model} has no input {min(missing)!r}; export the model again")
        self._kv_range = np.arange(context, dtype=np.int64)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._tokens = np.zeros(slots, np.int64)
        self._logprobs = np.zeros(slots, np.float32)
        self._tops = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)
        self._unadorned: dict[tuple[int, int], int] = {}
        """By binding: for how many rows without wishes its mask, adjustments and alternatives are bound; -1 for rows with."""
        self._no_alternatives = np.zeros(1, np.int64)
        words = -(-vocab_size // 32)
        self._no_mask, self._full_mask = np.zeros((0, words), np.int32), np.full((1, words), -1, np.int32)

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        """See `runtime.engine.Engine.step`; the arrays returned are valid until the next step. Raises EngineError."""
        count, seq = batch.input_ids.shape
        rows = len(batch.logit_rows)
        if batch.draw.adorned and not self._adorns:
            raise EngineError("the graph takes no masks and adjustments and tells no alternatives; export the model again")
        if rows > len(self._tokens):
            self._tokens, self._logprobs = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
        binding = self._binding(batch.first_slot, count)
        positions = batch.kv_lengths.astype(np.int64)[:, None] - seq + np.arange(seq)
        longest = np.asarray(batch.kv_lengths.max())
        feeds: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": batch.input_ids,
            "position_ids": positions,
            "kv_lengths": batch.kv_lengths,
            "kv_range": self._kv_range[:longest],
            "kv_longest": longest,
            "rope_lengths": batch.kv_lengths if batch.rope_lengths is None else batch.rope_lengths,
            "logit_rows": batch.logit_rows,
            **_draw_feeds(batch.draw),
        }
        key = batch.first_slot, count
        if self._adorns and (batch.draw.adorned or self._unadorned.get(key) != rows):
            feeds |= self._adorn(binding, batch.draw)
            self._unadorned[key] = -1 if batch.draw.adorned else rows
        for name, array in feeds.items():
            if name in self._input_names:
                _bind_input(binding, name, array)
        tokens, logprobs = self._tokens[:rows], self._logprobs[:rows]
        _bind_output(binding, "tokens", tokens)
        _bind_output(binding, "logprobs", logprobs)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime failed on a step: {error}") from error
        return tokens, logprobs

    def alternatives(self) -> tuple[Int64, Float32]:
        """See `runtime.engine.Engine.alternatives`."""
        return self._tops

    def copy(self, source: int, target: int, length: int) -> None:
        """See `runtime.engine.Engine.copy`."""
        for buffer in self._kv.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """See `runtime.engine.Engine.exchange`."""
        (one, length), (other, other_length) = first, second
        for buffer in self._kv.values():
            kept = buffer[other, :, :other_length].copy()
            buffer[other, :, :length] = buffer[one, :, :length]
            buffer[one, :, :other_length] = kept

    def fill(self, slot: int, name: str, rows: npt.NDArray[np.generic]) -> None:
        """Put `rows` [kv_heads, length, dim] into a slot as its first ones; `name` is what follows `past.` in the graph's
        name.
        """
        self._kv[name][slot, :, : rows.shape[1]] = rows

    def close(self) -> None:
        """Drop the session and the slots."""
        self._bindings.clear()
        self._kv.clear()
        del self._session

    def _adorn(self, binding: ort.IOBinding, draw: Draw) -> dict[str, npt.NDArray[np.generic]]:
        """The inputs for what `draw` wants beyond most steps; what is told of alternatives is bound already."""
        wanted = len(draw.forced), draw.alternatives
        tops = self._tops = np.empty(wanted, np.int64), np.empty(wanted, np.float32)
        _bind_output(binding, "top_tokens", tops[0])
        _bind_output(binding, "top_logprobs", tops[1])
        mask = draw.mask() if callable(draw.mask) else draw.mask
        adjustments = draw.adjustments or _no_adjustments(len(draw.forced))
        if mask is None:  # without one the graph adjusts nothing
            mask = self._no_mask if draw.adjustments is None else self._full_mask
        return {
            "mask": np.ascontiguousarray(mask).view(np.uint8),
            "adjust_ids": np.ascontiguousarray(adjustments.ids),
            "adjust_bias": np.ascontiguousarray(adjustments.bias),
            "adjust_scale": np.ascontiguousarray(adjustments.scale),
            "adjust_penalty": np.ascontiguousarray(adjustments.penalty),
            "alternatives": np.array([draw.alternatives]) if draw.alternatives else self._no_alternatives,
        }

    def _binding(self, first: int, count: int) -> ort.IOBinding:
        key = (first, count)
        if key not in self._bindings:
            binding = self._session.io_binding()
            for name, buffer in self._kv.items():
                view = buffer[first : first + count]
                _bind_input(binding, f"past.{name}", view)
                _bind_output(binding, f"present.{name}", view)
            self._bindings[key] = binding
        return self._bindings[key]


def load(folder: Path, variant_name: str | None = None, *, slots: int, context: int | None, threads: int = 0) -> OrtEngine:
    """The CPU engine of the bundle in `folder`, its hashes verified.

    `context` None takes the model's own length. Raises BundleError or EngineError.
    """
    manifest = bundle.read(folder)
    return start(folder, manifest, manifest.variant(variant_name), slots=slots, context=context, threads=threads)


def start(folder: Path, manifest: Bundle, variant: Variant, *, slots: int, context: int | None, threads: int = 0) -> OrtEngine:
    """`load` where the manifest has been read already.

    ONNX Runtime only parses a graph whose hash is right. It packs the weights while they are hashed, on another core; they are
    numbers, which cannot lead it astray, and no engine is returned whose weights are not those that were exported.
    """
    if variant.target != "cpu":
        raise EngineError(f"variant {variant.name!r} is for {variant.target}; this engine runs variants for the cpu")
    if manifest.task != "text-generation":
        raise EngineError(f"bundle {manifest.name!r} is for {manifest.task}; this engine generates text")
    if context is not None and context > manifest.max_length:
        raise EngineError(f"model {manifest.name!r} was made for {manifest.max_length} positions; --context {context} is more")
    length = manifest.max_length if context is None else context
    files = manifest.served(variant)
    bundle.verify(folder, [file for file in files if file.path == variant.model])
    with ThreadPoolExecutor(max_workers=1) as hashing:
        others = hashing.submit(bundle.verify, folder, [file for file in files if file.path != variant.model])
        try:
            return OrtEngine(folder, variant, manifest.vocab_size, slots=slots, context=length, threads=threads)
        finally:
            others.result()  # Where the engine failed, too, the damaged file is the reason.


def session(path: Path, threads: int, *, plan_memory: bool = True) -> ort.InferenceSession:
    """ONNX Runtime's session of the graph at `path` on the CPU. Raises EngineError.

    `plan_memory` keeps a plan of the memory for each shape that inputs come in.
    """
    options = ort.SessionOptions()
    options.enable_mem_pattern = plan_memory
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # GroupQueryAttention's tiled kernel spares the memory of a chunk's scores, and takes 1.3 to 2.4 times as long to prefill
    # (heads of 64, chunks of 64). Only the environment chooses, when a session is made.
    os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}; export the model again") from error


def _check_memory(variant: Variant, slots: int, context: int) -> None:
    """Refuse slots that would not fit once they are full, before that wakes the kernel's out-of-memory killer."""
    need, there = variant.kv_bytes_per_token * slots * context, psutil.virtual_memory().available
    if need > there:
        raise EngineError(
            f"{slots} slots of {context} tokens need {need >> 20} MiB ({slots} x {context} x {variant.kv_bytes_per_token} "
            f"bytes), {there >> 20} MiB are available; start with fewer slots or a shorter context"
        )


def _zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """A zeroed array of which only those pages take memory that are written to.

    The operators write the rows of new tokens and read no later ones: a slot costs what stands in it, an idle one nothing. A
    huge page would be cleared as a whole for the first row in it, and makes no step measurably faster.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise EngineError(
            f"the system gives no {size >> 20} MiB for a layer's slots ({error.strerror}); start with fewer slots or a shorter"
            " context"
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.ndarray(shape, dtype, buffer=memory)


def _draw_feeds(draw: Draw) -> dict[str, npt.NDArray[np.generic]]:
    return {
        "temperature": draw.temperature,
        "top_k": draw.top_k,
        "top_p": draw.top_p,
        "min_p": draw.min_p,
        "uniform": draw.uniform,
        "forced": draw.forced,
    }


@lru_cache(maxsize=256)
def _no_adjustments(rows: int) -> Adjustments:
    nothing = np.zeros((rows, 0), np.float32)
    return Adjustments(np.zeros((rows, 0), np.int64), nothing, nothing, nothing)


def _bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[np.generic]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[np.generic]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
