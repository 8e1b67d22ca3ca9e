"""A TensorRT plan, opened; or refused with a reason, where it does not belong on this machine or to this manifest."""

import logging
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.accelerator import ALIGNMENT, Accelerator
from runtime.engine import MOST_ALTERNATIVES, EngineError
from runtime.gpu_memory import ADJUSTMENTS, KV_ITEMSIZE, SAMPLING

if TYPE_CHECKING:
    from runtime.bundle import Plan, Variant  # which needs msgspec; this module does not

log = logging.getLogger(__name__)

Tensors = dict[str, tuple[Any, tuple[int, ...]]]
"""Type and dimensions of a plan's tensors by name; -1 for a dimension that each step sets."""

_KV_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
_VERDICTS = {
    "VERSION_MISMATCH": "was built by another version of TensorRT-RTX than the one installed here",
    "UNSUPPORTED_CC": "was built for GPUs of another architecture than this one",
    "OLD_CUDA_DRIVER": "needs a newer NVIDIA driver than the one installed; update the driver",
    "OLD_CUDA_RUNTIME": "needs a newer CUDA runtime than the one installed; update the extra 'engineshed[tensorrt-rtx]'",
    "INSUFFICIENT_GPU_MEMORY": "needs more GPU memory than there is; export the model in a smaller precision",
    "MALFORMED_ENGINE": "is damaged or no plan at all",
    "CUDA_ERROR": "cannot be judged because CUDA does not work here; look at `engineshed devices`",
}


class PlanRefused(EngineError):
    """A plan does not run here; one that is built here would."""


class Lines:
    """What TensorRT said: warnings go to the log at once, and errors into the exception that they explain."""

    def __init__(self, trt: Any) -> None:
        severity = trt.ILogger.Severity
        levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}
        errors: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                level = levels.get(severity, logging.DEBUG)
                log.log(level if level < logging.ERROR else logging.DEBUG, "TensorRT: %s", msg)
                if level >= logging.ERROR:
                    errors.append(msg)

        self.logger: Any = Logger()
        self._errors = errors

    def take(self) -> str:
        """The errors since the last call, in one line."""
        text = "; ".join(" ".join(line.split()) for line in self._errors) or "TensorRT gave no reason"
        self._errors.clear()
        return text


def check_machine(variant: "Variant", plan: "Plan", trt: Any, cuda: Accelerator) -> None:
    """Raise PlanRefused where the manifest says that the plan is for another TensorRT or another GPU."""
    if plan.version != trt.__version__:
        raise PlanRefused(
            f"variant {variant.name!r} was built by {plan.builder} {plan.version}, installed is {trt.__version__}; install "
            f"that version, or {_advice(plan.builder)}"
        )
    if cuda.compute_capability not in plan.compute_capabilities:
        raise PlanRefused(
            f"variant {variant.name!r} was built for GPUs of compute capability {', '.join(plan.compute_capabilities)}, this "
            f"one has {cuda.compute_capability}; {_advice(plan.builder)}"
        )


def open_plan(trt: Any, runtime: Any, lines: Lines, path: Path, source: Path, plan: "Plan") -> Any:
    """The engine in the plan at `path`, with its weights. Raises PlanRefused."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_verdict(trt, runtime, lines, path, content, plan)
            engine = runtime.deserialize_cuda_engine(content)
    except (OSError, ValueError) as error:  # ValueError: a file of no bytes cannot be mapped
        raise PlanRefused(f"{path} cannot be read ({error}); {_advice(plan.builder)}") from error
    if engine is None:
        raise PlanRefused(f"{plan.builder} {trt.__version__} cannot open {path}: {lines.take()}; {_advice(plan.builder)}")
    if plan.stripped and engine.refittable:
        _refit(trt, lines, engine, path, source, plan)
    return engine


def _check_verdict(trt: Any, runtime: Any, lines: Lines, path: Path, content: mmap.mmap, plan: "Plan") -> None:
    """What TensorRT-RTX says of a plan before it is opened; TensorRT says so only when it fails to open it."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    verdict, reasons = runtime.get_engine_validity(content)
    if verdict == trt.EngineValidity.SUBOPTIMAL:
        log.warning("%s runs here, but slower than one that is built here; %s", path, _advice(plan.builder))
    if verdict == trt.EngineValidity.INVALID:
        known = trt.EngineInvalidityDiagnostics
        said = [text for name, text in _VERDICTS.items() if int(reasons) & int(getattr(known, name).value)]
        said = said or [f"is refused by TensorRT-RTX ({lines.take()})"]
        raise PlanRefused(f"{path} {', and '.join(said)}; {_advice(plan.builder)}")


def _refit(trt: Any, lines: Lines, engine: Any, path: Path, source: Path, plan: "Plan") -> None:
    """Put the weights of the graph `source` into an engine that was built without."""
    refitter = trt.Refitter(engine, lines.logger)
    parser = trt.OnnxParserRefitter(refitter, lines.logger)
    if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
        said = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise PlanRefused(
            f"the weights in {source} do not fit the plan {path}: {'; '.join(said) or lines.take()}; {_advice(plan.builder)}"
        )


# What a plan must be made of -------------------------------------------------------------------------------------------


def check_model(trt: Any, engine: Any, variant: "Variant", plan: "Plan", vocab_size: int, slots: int) -> None:
    """Raise PlanRefused where the model's tensors, aliases and profiles are not what the manifest says."""
    types, kv = trt.DataType, getattr(trt.DataType, _KV_TYPES[variant.kv_dtype])
    itemsize = KV_ITEMSIZE[variant.kv_dtype]
    inputs: Tensors = {
        "input_ids": (types.INT64, (-1, -1)),
        "position_ids": (types.INT64, (-1, -1)),
        "kv_lengths": (types.INT32, (-1,)),
        "kv_range": (types.INT64, (-1,)),
        "rope_lengths": (types.INT32, (-1,)),
        "logit_rows": (types.INT64, (-1,)),
        "forced": (types.INT64, (-1,)),
    }
    outputs = _chosen(trt) | {"logits": (types.FLOAT, (-1, vocab_size))}
    optional = {"position_ids", "kv_lengths", "kv_range", "rope_lengths"}
    for layer in variant.layers:
        for part, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            name, dims = f"{layer.index}.{part}", (-1, layer.kv_heads, plan.capacity, dim)
            inputs[f"past.{name}"], outputs[f"present.{name}"] = (kv, dims), (kv, dims)
            if slots > 1 and layer.kv_heads * plan.capacity * dim * itemsize % ALIGNMENT:
                raise PlanRefused(
                    f"a slot of {plan.capacity} rows is no multiple of {ALIGNMENT} bytes in layer {layer.index} of variant "
                    f"{variant.name!r}, so only --slots 1 can be served; export the model again with a capacity that is a "
                    "multiple of 64"
                )
    _check_tensors(trt, engine, variant.model, plan, inputs, outputs, optional)
    for name in outputs:
        if name.startswith("present.") and engine.get_aliased_input_tensor(name) != name.replace("present", "past"):
            raise PlanRefused(
                f"{variant.model} writes {name} to memory of its own instead of into the slot; {_advice(plan.builder)}"
            )
    if engine.num_optimization_profiles != len(plan.profiles):
        raise PlanRefused(
            f"{variant.model} has {engine.num_optimization_profiles} profiles, the manifest names {len(plan.profiles)}; "
            f"{_advice(plan.builder)}"
        )


def check_sampler(trt: Any, engine: Any, name: str, plan: "Plan", vocab_size: int) -> None:
    """Raise PlanRefused where the sampler's tensors are not those of the contract; `name` says which plan it is."""
    _check_tensors(trt, engine, name, plan, _sampling(trt, vocab_size), _chosen(trt), set())


def check_adorned(trt: Any, engine: Any, name: str, plan: "Plan", vocab_size: int) -> None:
    """`check_sampler` of the one that takes masks and adjustments, too."""
    types = trt.DataType
    inputs = _sampling(trt, vocab_size) | {"mask": (types.UINT8, (-1, 4 * -(-vocab_size // 32)))}
    inputs |= {name: (types.INT64 if name == "adjust_ids" else types.FLOAT, (-1, -1)) for name in ADJUSTMENTS}
    told = -1, min(MOST_ALTERNATIVES, vocab_size)
    outputs = _chosen(trt) | {"top_tokens": (types.INT64, told), "top_logprobs": (types.FLOAT, told)}
    _check_tensors(trt, engine, name, plan, inputs, outputs, set())


def _sampling(trt: Any, vocab_size: int) -> Tensors:
    types, integers = trt.DataType, {"top_k", "forced"}
    inputs: Tensors = {name: (types.INT64 if name in integers else types.FLOAT, (-1,)) for name in SAMPLING}
    return inputs | {"logits": (types.FLOAT, (-1, vocab_size))}


def _chosen(trt: Any) -> Tensors:
    return {"tokens": (trt.DataType.INT64, (-1,)), "logprobs": (trt.DataType.FLOAT, (-1,))}


def _check_tensors(
    trt: Any,
    engine: Any,
    name: str,
    plan: "Plan",
    inputs: Tensors,
    outputs: Tensors,
    optional: set[str],
) -> None:
    """Refuse a plan whose tensors are not these, by name, type and dimensions (-1: set at each step)."""
    there = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    known = inputs | outputs
    missing, strange = known.keys() - optional - there, there - known.keys()
    if missing or strange:
        what = f"has no tensor {min(missing)!r}" if missing else f"has a tensor {min(strange)!r} that nobody knows"
        raise PlanRefused(f"{name} {what}; {_advice(plan.builder)}")
    for tensor in sorted(there):
        dtype, dims = known[tensor]
        got, got_dims = engine.get_tensor_dtype(tensor), tuple(engine.get_tensor_shape(tensor))
        is_input = engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT
        on_device = engine.get_tensor_location(tensor) == trt.TensorLocation.DEVICE
        if got != dtype or got_dims != dims or is_input != (tensor in inputs) or not on_device:
            raise PlanRefused(
                f"{name} has {tensor} as {got} {list(got_dims)}, the manifest wants {dtype} {list(dims)}; "
                f"{_advice(plan.builder)}"
            )


def _advice(builder: str) -> str:
    return (
        f"build it on this machine: engineshed export MODEL --target {builder}, or let the server do so from the graph in the "
        "bundle: engineshed serve --build-on-load"
    )
