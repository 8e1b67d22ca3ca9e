"""The engine on TensorRT: a variant's plans, opened, made contexts of and given their memory.

`tensorrt` and `tensorrt_rtx` are one API under two names. What only the second has is looked up before it is used: a verdict
on a plan before it is opened, and the settings of a compiler that finishes its work on the GPU that the plan runs on.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.accelerator import Accelerator
from runtime.engine import EngineError
from runtime.gpu import GpuEngine
from runtime.gpu_memory import Memory
from runtime.trt_contexts import Contexts
from runtime.trt_plan import Lines, PlanRefused, check_adorned, check_machine, check_model, check_sampler, open_plan

if TYPE_CHECKING:
    from runtime.bundle import Plan, Variant  # which needs msgspec; this module does not

__all__ = ["PlanRefused", "Rebuild", "load"]

log = logging.getLogger(__name__)

Rebuild = Callable[[str], tuple[Path, "Variant"]]
"""Builds plans for this GPU and this TensorRT, given why those there are refused: the folder and the variant to load."""

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def load(
    folder: Path,
    variant: "Variant",
    vocab_size: int,
    *,
    slots: int,
    context: int | None = None,
    cuda: Accelerator,
    cache: Path | None = None,
    rebuild: Rebuild | None = None,
) -> GpuEngine:
    """The engine of `variant`, whose files in the bundle `folder` have been verified; it owns `cuda`.

    `context` None takes what the plan's slots hold: one row less than they have, since rows that only fill a batch up write
    to the row after the last token's. TensorRT-RTX keeps what it compiles on this GPU in the folder `cache`, so that the next
    start is quick. Raises PlanRefused where the plan is not for this machine, unless there is `rebuild`; EngineError for all
    else.
    """
    try:
        return _start(folder, variant, vocab_size, slots, context, cuda, cache)
    except PlanRefused as refusal:
        if rebuild is None:
            raise
        log.warning("%s. Building it anew, which takes minutes.", refusal)
        folder, variant = rebuild(str(refusal))
    return _start(folder, variant, vocab_size, slots, context, cuda, cache)


def _start(
    folder: Path,
    variant: "Variant",
    vocab_size: int,
    slots: int,
    context: int | None,
    cuda: Accelerator,
    cache: Path | None,
) -> GpuEngine:
    plan = variant.plan
    if plan is None or variant.sampler is None or variant.adorned is None:
        raise EngineError(f"the manifest says of variant {variant.name!r} not what its plan is; export the model again")
    context = _check_sizes(plan, slots, context)
    trt = _library(plan)
    check_machine(variant, plan, trt, cuda)
    lines = Lines(trt)
    runtime = trt.Runtime(lines.logger)
    before = cuda.free
    model = open_plan(trt, runtime, lines, folder / variant.model, folder / plan.source, plan)
    sampler = open_plan(trt, runtime, lines, folder / variant.sampler, folder / plan.sampler_source, plan)
    adorned = open_plan(trt, runtime, lines, folder / variant.adorned, folder / plan.adorned_source, plan)
    check_model(trt, model, variant, plan, vocab_size, slots)
    check_sampler(trt, sampler, variant.sampler, plan, vocab_size)
    check_adorned(trt, adorned, variant.adorned, plan, vocab_size)
    cuda.account(max(before - cuda.free, 0))  # the weights, which TensorRT put there by itself
    chunk = max(profile.max_seq for profile in plan.profiles)
    memory = Memory(
        cuda,
        variant.layers,
        variant.kv_dtype,
        slots=slots,
        context=context,
        capacity=plan.capacity,
        tokens=max(slots, chunk),
        rows=max(profile.max_rows for profile in plan.profiles),
        vocab_size=vocab_size,
    )
    kept = None if cache is None else cache / f"{folder.name}-{variant.name}-{plan.version}-{cuda.compute_capability}.cache"
    backend = Contexts(trt, runtime, lines, model, (sampler, adorned), plan.profiles, memory, cuda, kept)
    return GpuEngine(
        cuda,
        memory,
        backend,
        chunk=chunk,
        step_bytes=variant.step_bytes or variant.size,
        length_boundaries=variant.length_boundaries,
    )


def _library(plan: "Plan") -> Any:
    try:
        return import_module(_MODULES[plan.builder])
    except (ImportError, OSError) as error:
        raise EngineError(
            f"a plan of {plan.builder} needs its library, which cannot be loaded ({error}); "
            f"pip install 'engineshed[{plan.builder}]'"
        ) from error


def _check_sizes(plan: "Plan", slots: int, context: int | None) -> int:
    """Tokens of a slot; raises EngineError where the plan does not take so many slots or tokens."""
    most_slots, most_context = max(profile.max_batch for profile in plan.profiles), plan.capacity - 1
    if slots > most_slots:
        raise EngineError(
            f"the plan decodes {most_slots} slots at a time, so it cannot serve {slots}; start with --slots {most_slots}, or "
            "export the model again with a larger batch"
        )
    if context is not None and context > most_context:
        raise EngineError(
            f"the plan's slots hold {most_context} tokens, --context {context} is more; start with --context {most_context}, "
            "or export the model again with a longer context"
        )
    return most_context if context is None else context
