"""ONNX to a TensorRT plan, by either of two builders that share one API.

* `tensorrt` builds for the GPU that it runs on and times its kernels there.
* `tensorrt-rtx` builds ahead of time, on any machine, for the architectures that it is told; the last step of compiling is done
  when the plan is loaded.

The network is strongly typed: it computes in the types that the ONNX file has. What is read off the network after parsing is
checked before anything is built, because the runtime counts on it: every KV slot is updated in place.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from export.errors import ExportError
from runtime.bundle import Profile
from runtime.devices import DeviceError, gpus
from runtime.gpu_memory import ADJUSTMENTS, most_adjusted

Flavour = Literal["tensorrt", "tensorrt-rtx"]
Share = Callable[[float], None]
"""Is told how much of a build is done, from 0 to 1."""

MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
MODEL_PLAN, SAMPLER_PLAN, ADORNED_PLAN = "model.plan", "sampler.plan", "adorned.plan"
LONGEST_OPTIMUM = 1024
"""Keys in a slot that kernels are chosen for; any other number up to the slot's rows is served as well."""
ADJUSTED_OPTIMUM = 64
"""Adjusted logits of a row that kernels are chosen for; likewise."""
_LEAST_ADVANCE = 0.01
"""Of a build, that is worth telling."""
_LAST_WORDS = 5
"""Messages of a builder that an error repeats."""


@dataclass(frozen=True)
class Network:
    """What a parsed network holds."""

    layers: Counter[str]
    """By TensorRT's name of their type."""
    inputs: dict[str, tuple[int, ...]]
    """Shapes; -1 where a dimension is not fixed."""
    outputs: dict[str, tuple[int, ...]]
    in_place: dict[str, str]
    """Outputs that are written into an input's memory, and which input."""


class Builder:
    """Builds plans with one flavour of TensorRT. Raises ExportError where it is not installed."""

    def __init__(self, flavour: Flavour, *, cache: Path | None = None) -> None:
        """Keep kernels' timings from one build to the next in the folder `cache`, None keeps none."""
        self.flavour = flavour
        try:
            self._trt = importlib.import_module(MODULES[flavour])
        except ImportError as error:
            raise ExportError(
                f"target {flavour!r} needs its builder, which cannot be imported ({error}); run: "
                f"pip install 'engineshed[{flavour}]'"
            ) from error
        self.version = str(self._trt.__version__)
        self._log = _log_of(self._trt)
        self._timings = None if cache is None else cache / f"{flavour}-{self.version}.timings"

    def __str__(self) -> str:
        return f"{self.flavour} {self.version}"

    def targets(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """The compute capabilities, as `8.9`, to build for: those `wanted`, or that of the GPU here. Raises ExportError."""
        if self.flavour == "tensorrt":
            here = self._here("it builds for the GPU that it runs on")
            if set(wanted) - {here}:
                raise ExportError(
                    f"tensorrt builds for the GPU that it runs on, which is a {here}; for {', '.join(wanted)} "
                    "export there, or take --target tensorrt-rtx, which builds for other GPUs as well"
                )
            return (here,)
        known = self.known
        for capability in wanted:
            if capability not in known:
                raise ExportError(f"{self} does not build for compute capability {capability}; it knows {', '.join(known)}")
        if wanted:
            return tuple(dict.fromkeys(wanted))
        here = self._here(f"name the GPUs to build for with --gpu, out of {', '.join(known)}")
        if here not in known:
            raise ExportError(f"{self} does not build for this GPU, of compute capability {here}; it knows {', '.join(known)}")
        return (here,)

    @property
    def known(self) -> tuple[str, ...]:
        """The compute capabilities that tensorrt-rtx builds for."""
        members = getattr(self._trt.ComputeCapability, "__members__", {})
        numbers = sorted(int(name[2:]) for name in members if name.startswith("SM"))
        return tuple(f"{number // 10}.{number % 10}" for number in numbers)

    def inspect(self, source: Path) -> Network:
        """What TensorRT makes of an ONNX file. Raises ExportError with the parser's own words."""
        builder = self._trt.Builder(self._log)
        return _read(self._parse(builder, source).network)

    def build(
        self,
        source: Path,
        plan: Path,
        profiles: Sequence[Profile],
        capabilities: Sequence[str],
        *,
        capacity: int,
        strip: bool = False,
        share: Share = lambda share: None,
    ) -> Network:
        """Build `plan` from the ONNX file `source` for steps up to `profiles` and slots of `capacity` rows.

        `strip` leaves the weights out of the plan. Raises ExportError with the builder's own words.
        """
        trt = self._trt
        self._log.clear()
        builder = trt.Builder(self._log)
        parsed = self._parse(builder, source)
        network = parsed.network
        seen = _read(network)
        _check_slots(seen, source)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for profile in profiles:
            config.add_optimization_profile(_profile(builder, network, profile, capacity))
        if strip:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # so that every step can be captured as a CUDA graph
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self.flavour == "tensorrt-rtx":
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
        timings = self._start_timings(config)
        monitor = _monitor_of(trt, share)
        config.progress_monitor = monitor
        built = builder.build_serialized_network(network, config)
        if built is None:
            hint = "; leaving the weights out may need a GPU on the machine that builds" if strip else ""
            raise ExportError(f"{self} could not build {plan.name}: {self._log.words()}{hint}")
        plan.write_bytes(memoryview(built))
        self._keep_timings(timings)
        return seen

    def build_all(
        self,
        source: Path,
        samplers: tuple[Path, Path],
        folder: Path,
        profiles: Sequence[Profile],
        capabilities: Sequence[str],
        *,
        capacity: int,
        strip: bool = False,
        share: Share = lambda share: None,
    ) -> Network:
        """`build` the plans of a model and of the graphs that draw from its logits into `folder`; gives the model's network.

        `samplers` are the plain one and the one that takes masks and adjustments.
        """
        seen = self.build(source, folder / MODEL_PLAN, profiles, capabilities, capacity=capacity, strip=strip, share=share)
        rows = max(profile.max_rows for profile in profiles)
        for sampler, name in zip(samplers, (SAMPLER_PLAN, ADORNED_PLAN), strict=True):
            self.build(sampler, folder / name, [Profile(1, 1, rows)], capabilities, capacity=capacity)
        return seen

    def _here(self, otherwise: str) -> str:
        try:
            return gpus()[0].compute_capability
        except DeviceError as error:
            raise ExportError(f"target {self.flavour!r} and no GPU is here ({error}); {otherwise}") from error

    def _parse(self, builder: Any, source: Path) -> "_Parsed":
        trt = self._trt
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flags is None else 1 << int(flags))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(source)):
            said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)) or self._log.words()
            raise ExportError(f"{self} does not take {source.name}: {said}")
        return _Parsed(network, parser)

    def _start_timings(self, config: Any) -> Any:
        if self._timings is None:
            return None
        known = self._timings.read_bytes() if self._timings.exists() else b""
        timings = config.create_timing_cache(known)
        return timings if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False) else None

    def _keep_timings(self, timings: Any) -> None:
        if timings is None or self._timings is None:
            return
        self._timings.parent.mkdir(parents=True, exist_ok=True)
        partial = self._timings.with_suffix(".partial")
        partial.write_bytes(memoryview(timings.serialize()))
        partial.replace(self._timings)


@dataclass(frozen=True)
class _Parsed:
    """A network, and the parser that owns the memory of its weights."""

    network: Any
    parser: Any


def _read(network: Any) -> Network:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    outputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_output, range(network.num_outputs))}
    in_place = {
        layer.get_output(0).name: layer.get_input(0).name
        for layer in layers
        if layer.type.name == "KV_CACHE_UPDATE"
        and layer.get_input(0).is_network_input
        and layer.get_output(0).is_network_output
    }
    return Network(Counter(layer.type.name for layer in layers), inputs, outputs, in_place)


def _check_slots(network: Network, source: Path) -> None:
    """Every `present.N` must be `past.N`, in place."""
    for name in network.outputs:
        if name.startswith("present.") and network.in_place.get(name) != name.replace("present.", "past.", 1):
            raise ExportError(
                f"TensorRT does not write {name} of {source.name} into its slot in place, so the model's cache cannot be kept "
                "there; take --target cuda"
            )


def _profile(builder: Any, network: Any, profile: Profile, capacity: int) -> Any:
    """The least, the likeliest and the largest shape of each input for steps up to `profile`."""
    made = builder.create_optimization_profile()
    limits = {
        "input_ids": (profile.max_batch, profile.max_seq),
        "position_ids": (profile.max_batch, profile.max_seq),
        "kv_range": (capacity,),
    }
    adjusted = dict.fromkeys(ADJUSTMENTS, (profile.max_rows, most_adjusted(capacity)))
    limits |= adjusted
    for tensor in map(network.get_input, range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        first = profile.max_batch if tensor.name.startswith("past.") else profile.max_rows
        most = limits.get(tensor.name, (first,)) + shape[len(limits.get(tensor.name, (first,))) :]
        least = tuple(1 if free == -1 else size for free, size in zip(shape, most, strict=True))
        likely = (min(capacity, LONGEST_OPTIMUM),) if tensor.name == "kv_range" else most
        if tensor.name in adjusted:
            likely = (profile.max_rows, ADJUSTED_OPTIMUM)
        made.set_shape(tensor.name, least, likely, most)
    return made


def _log_of(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors, for the error that they may end in."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._messages: list[tuple[bool, str]] = []

        def log(self, severity: Any, message: str) -> None:
            error = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            if error or severity == trt.ILogger.WARNING:
                self._messages.append((error, message.strip()))

        def clear(self) -> None:
            self._messages.clear()

        def words(self) -> str:
            errors = [message for error, message in self._messages if error]
            said = errors or [message for _, message in self._messages]
            return "; ".join(said[-_LAST_WORDS:]) or "it said nothing of the reason"

    return Log()


def _monitor_of(trt: Any, share: Share) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns the builder's nested phases into one share that never falls; called from the builder's threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._progress = Progress(share)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._progress.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._progress.finish(phase_name)

    return Monitor()


class Progress:
    """The share of a build that is done, out of phases within phases whose number is not known beforehand."""

    def __init__(self, share: Share) -> None:
        self._share, self._shown = share, 0.0
        self._phases: dict[str, tuple[float, float]] = {}
        """By name: where a running phase begins, and the width of one of its steps."""
        self._lock = Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps begins, within a step of `parent`; one without a parent takes all that is left."""
        with self._lock:
            begin, width = self._phases.get(parent or "", (self._shown, 1 - self._shown))
            self._phases[name] = (begin, width / max(1, steps))

    def step(self, name: str, step: int) -> None:
        """The step numbered `step`, from 0, of a phase is done."""
        with self._lock:
            if name in self._phases:
                begin, width = self._phases[name]
                self._phases[name] = (begin + width, width)
                reached = min(1.0, begin + width)
                if reached >= self._shown + _LEAST_ADVANCE:
                    self._shown = reached
                    self._share(reached)

    def finish(self, name: str) -> None:
        """A phase is over."""
        with self._lock:
            self._phases.pop(name, None)
