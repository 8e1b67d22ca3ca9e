"""`engineshed devices`: what engines can run on here, and what is missing for the rest."""

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import get_args

import msgspec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from runtime import devices
from runtime.bundle import Target
from runtime.devices import Cpu, DeviceError, Gpu

GIB = 1 << 30
_REPLACE = "pip uninstall --yes onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"
"""Both distributions hold the package `onnxruntime`, and installing any extra brings the CPU's back."""
_BESIDE = "is installed beside onnxruntime, and each has overwritten files of the other's; only one may stay"


class Runtime(msgspec.Struct, frozen=True):
    """A library that runs engines, or that those need."""

    name: str
    version: str | None
    """None where it is not installed."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers that its package brings."""
    problem: str | None
    """Why it cannot be used; None where it can."""


class Card(msgspec.Struct, frozen=True):
    """A GPU and whether engines can run on it."""

    gpu: Gpu
    problem: str | None
    """Why none can; None where they can."""


class Runs(msgspec.Struct, frozen=True):
    """Whether variants for a target run here."""

    target: Target
    missing: tuple[str, ...]
    """What they lack, a sentence each; empty where they run."""
    commands: tuple[str, ...]
    """Shell commands that add what can be installed with pip."""


class Survey(msgspec.Struct, frozen=True):
    """All that the command shows; its JSON form is this with these names, sizes in bytes."""

    cpu: Cpu
    gpus: tuple[Card, ...]
    no_gpu: str | None
    """Why no GPU is listed, and what to do."""
    runtimes: tuple[Runtime, ...]
    targets: tuple[Runs, ...]


@dataclass(frozen=True)
class _Package:
    """How a runtime is recognised without being imported, which would load its libraries."""

    distributions: tuple[str, ...]
    module: str | None = None
    library: tuple[str, str] | None = None
    """The module that brings its shared library, and the library's name where it is installed for the whole system."""


_PACKAGES = {
    "onnxruntime": _Package(("onnxruntime",), "onnxruntime"),
    "onnxruntime-gpu": _Package(("onnxruntime-gpu",), "onnxruntime"),
    "cudnn": _Package(("nvidia-cudnn-cu13",), library=("nvidia.cudnn", "cudnn")),
    "tensorrt": _Package(("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings"), "tensorrt", ("tensorrt_libs", "nvinfer")),
    "tensorrt-rtx": _Package(
        ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
        "tensorrt_rtx",
        ("tensorrt_rtx_libs", "tensorrt_rtx"),
    ),
    "onnxruntime_ep_nv_tensorrt_rtx": _Package(("onnxruntime-ep-nv-tensorrt-rtx-cu13",), "onnxruntime_ep_nv_tensorrt_rtx"),
    "cuda-core": _Package(("cuda-core",), "cuda.core"),
    "cuda-bindings": _Package(("cuda-bindings",), "cuda.bindings"),
    "nvidia-ml-py": _Package(("nvidia-ml-py",), "pynvml"),
}
_ON_GPU = ("cuda-core", "cuda-bindings", "nvidia-ml-py")
_NEEDS: dict[Target, tuple[str, ...]] = {
    "cuda": ("onnxruntime-gpu", "cudnn", *_ON_GPU),
    "tensorrt": ("tensorrt", *_ON_GPU),
    "tensorrt-rtx": ("tensorrt-rtx", *_ON_GPU),
}
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""By the name of the shared library beside ONNX Runtime's."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = "Show the CPU and the GPUs, the runtimes that are installed, and which targets of bundles run here."
    parser.add_argument("--json", action="store_true", help="print the same as JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the survey; 0 whether there is a GPU or not."""
    found = survey()
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
    else:
        _show(found, Console(highlight=False, markup=False))
    return 0


def survey() -> Survey:
    """Look at this machine and this Python environment; imports no runtime."""
    no_gpu, gpus = None, []
    try:
        gpus = devices.gpus()
    except DeviceError as error:
        no_gpu = str(error)
    cards = tuple(Card(gpu, _problem(gpu)) for gpu in gpus)
    runtimes = {name: _runtime(name, package) for name, package in _PACKAGES.items()}
    return Survey(
        cpu=devices.cpu(),
        gpus=cards,
        no_gpu=no_gpu,
        runtimes=tuple(_on_these(runtime, cards) for runtime in runtimes.values()),
        targets=tuple(_runs(target, runtimes, cards, no_gpu) for target in get_args(Target)),
    )


def _problem(gpu: Gpu) -> str | None:
    try:
        devices.check(gpu)
    except DeviceError as error:
        return str(error)
    return None


def _runtime(name: str, package: _Package) -> Runtime:
    version = _version(package)
    providers = _providers() if version is not None and package.module == "onnxruntime" else ()
    return Runtime(name, version, providers, _missing_part(name, package, version, providers))


def _on_these(runtime: Runtime, cards: tuple[Card, ...]) -> Runtime:
    """`runtime` with the lack of a GPU among its problems."""
    fit = bool(cards) if runtime.name == "nvidia-ml-py" else any(card.problem is None for card in cards)
    if fit or runtime.problem is not None or runtime.name in ("onnxruntime", "onnxruntime-gpu"):
        return runtime
    return msgspec.structs.replace(runtime, problem="finds no GPU that it can use")


def _missing_part(name: str, package: _Package, version: str | None, providers: tuple[str, ...]) -> str | None:
    if version is None and not (package.module is None and _has_library(package)):
        return "is not installed"
    if package.module is not None and not _found(package.module):
        return f"is installed without its module {package.module}"
    if not _has_library(package):
        return "is installed without its libraries"
    if name == "onnxruntime-gpu" and _version(_PACKAGES["onnxruntime"]) is not None:
        return _BESIDE
    if name == "onnxruntime-gpu" and "CUDAExecutionProvider" not in providers:
        return "is installed without its CUDA provider"
    return None


def _runs(target: Target, runtimes: Mapping[str, Runtime], cards: tuple[Card, ...], no_gpu: str | None) -> Runs:
    if target == "cpu":
        alternatives = [runtimes["onnxruntime"], runtimes["onnxruntime-gpu"]]
        if any(runtime.problem is None for runtime in alternatives):
            return Runs(target, (), ())
        return Runs(target, (f"onnxruntime {runtimes['onnxruntime'].problem}",), ("pip install --force-reinstall onnxruntime",))
    lacking = [runtimes[name] for name in _NEEDS[target] if runtimes[name].problem is not None]
    missing = [f"{runtime.name} {runtime.problem}" for runtime in lacking]
    if no_gpu is not None and runtimes["nvidia-ml-py"].problem is None:  # without which nothing is known of GPUs
        missing.append(no_gpu)
    if cards and all(card.problem is not None for card in cards):
        missing.extend(str(card.problem) for card in cards)
    commands = []
    if any(runtime.problem != _BESIDE for runtime in lacking):
        commands.append(f"pip install 'engineshed[{target}]'")
    if lacking and (target == "cuda" or runtimes["onnxruntime-gpu"].version is not None):
        commands.append(_REPLACE)
    return Runs(target, tuple(missing), tuple(commands))


def _version(package: _Package) -> str | None:
    for distribution in package.distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def _has_library(package: _Package) -> bool:
    if package.library is None:
        return True
    module, name = package.library
    return _found(module) or find_library(name) is not None


def _providers() -> tuple[str, ...]:
    spec = importlib.util.find_spec("onnxruntime")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    there = (
        provider
        for name, provider in _PROVIDERS.items()
        if any(Path(folder, "capi", f"libonnxruntime_providers_{name}.so").is_file() for folder in folders)
    )
    return (*there, "CPUExecutionProvider")


def _show(found: Survey, console: Console) -> None:
    console.print(_devices(found))
    console.print()
    console.print(_runtimes(found.runtimes))
    console.print()
    console.print(_targets(found.targets))
    notes = [found.no_gpu] if found.no_gpu is not None else [card.problem for card in found.gpus if card.problem is not None]
    for note in notes:
        console.print(f"\n{note}", soft_wrap=True)
    for runs in found.targets:
        reasons = [reason for reason in runs.missing if reason not in notes]
        if reasons or runs.commands:
            console.print(f"\n{runs.target}: {'; '.join(reasons)}", soft_wrap=True)
        for command in runs.commands:
            console.print(f"  {command}", soft_wrap=True)


def _devices(found: Survey) -> Table:
    result = _table("device", "", "memory free", "of", "compute", "driver", "CUDA")
    cores = f"{found.cpu.cores} core{'' if found.cpu.cores == 1 else 's'}"
    result.add_row("cpu", cores, _gib(found.cpu.available), _gib(found.cpu.total))
    for card in found.gpus:
        gpu = card.gpu
        result.add_row(
            f"cuda:{gpu.index}",
            Text(gpu.name),
            _gib(gpu.free),
            _gib(gpu.total),
            gpu.compute_capability,
            gpu.driver,
            gpu.cuda,
            style=None if card.problem is None else "red",
        )
    return result


def _runtimes(runtimes: tuple[Runtime, ...]) -> Table:
    result = _table("runtime", "version", "usable", "providers")
    for runtime in runtimes:
        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime.providers)
        usable = "yes" if runtime.problem is None else "" if runtime.version is None else "no"
        result.add_row(runtime.name, runtime.version or "-", usable, providers)
    return result


def _targets(targets: tuple[Runs, ...]) -> Table:
    result = _table("target", "runs here")
    for runs in targets:
        result.add_row(runs.target, "no" if runs.missing else "yes")
    return result


def _table(*columns: str) -> Table:
    return Table(*(Column(name, no_wrap=bool(name)) for name in columns), box=None, padding=(0, 2, 0, 0))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
