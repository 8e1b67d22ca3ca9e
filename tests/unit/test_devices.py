"""Devices: what a command line means, what NVML says of the GPUs, what fits on one, and what `engineshed devices` shows.

There is no GPU where these tests run: `Nvml` stands in for the module `pynvml`, and one test holds it to the real one.
"""

import argparse
import importlib.machinery
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import psutil
import pytest

from runtime import devices
from runtime.bundle import Target
from runtime.devices import WORKSPACE, Device, DeviceError, Gpu
from server import devices as command

MIB = 1 << 20
GIB = 1 << 30


class NvmlError(Exception):
    """As pynvml.NVMLError, of which each error code is a subclass."""


class Nvml(ModuleType):
    """A stand-in for `pynvml` over `cards`, in the order in which the driver would find them."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVMLError = NvmlError
    NVMLError_LibraryNotFound = type("NVMLError_LibraryNotFound", (NvmlError,), {})
    NVMLError_DriverNotLoaded = type("NVMLError_DriverNotLoaded", (NvmlError,), {})
    NVMLError_LibRmVersionMismatch = type("NVMLError_LibRmVersionMismatch", (NvmlError,), {})
    NVMLError_NoPermission = type("NVMLError_NoPermission", (NvmlError,), {})
    NVMLError_NotSupported = type("NVMLError_NotSupported", (NvmlError,), {})
    NVMLError_GpuIsLost = type("NVMLError_GpuIsLost", (NvmlError,), {})

    def __init__(self, *cards: SimpleNamespace, cuda: int = 13000, broken: str | None = None) -> None:
        super().__init__("pynvml")
        self.__spec__ = importlib.machinery.ModuleSpec("pynvml", None)
        self._cards, self._cuda, self._broken = cards, cuda, broken
        self.users = 0

    def nvmlInit(self) -> None:
        if self._broken is not None:
            raise getattr(self, self._broken)()
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self._cuda

    def nvmlDeviceGetCount(self) -> int:
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:
        return self._cards[index]

    def nvmlDeviceGetUUID(self, handle: SimpleNamespace) -> str:
        return str(handle.uuid)

    def nvmlDeviceGetName(self, handle: SimpleNamespace) -> str:
        return str(handle.name)

    def nvmlDeviceGetPciInfo(self, handle: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(domain=0, bus=handle.bus, device=0)

    def nvmlDeviceGetCudaComputeCapability(self, handle: SimpleNamespace) -> tuple[int, int]:
        major, minor = handle.capability
        return major, minor

    def nvmlDeviceGetMemoryInfo(self, handle: SimpleNamespace, version: int | None = None) -> SimpleNamespace:
        if handle.lost:
            raise self.NVMLError_GpuIsLost("GPU is lost")
        if handle.total is None:
            raise self.NVMLError_NotSupported
        return SimpleNamespace(total=handle.total, free=handle.free, used=handle.total - handle.free)

    def nvmlDeviceGetMigMode(self, device: SimpleNamespace) -> list[int]:
        if device.mig is None:
            raise self.NVMLError_NotSupported
        return [device.mig, device.mig]


def card(bus: int, letter: str = "", **changed: Any) -> SimpleNamespace:
    """A GPU in the slot `bus`, whose UUID begins with `letter` eight times."""
    is_ = {
        "uuid": f"GPU-{(letter or str(bus)) * 8}-d72c-4106-c12f-20bd9faed9f6",
        "name": "NVIDIA L4",
        "bus": bus,
        "lost": False,
    }
    return SimpleNamespace(**is_ | {"capability": (8, 9), "total": 24 * GIB, "free": 20 * GIB, "mig": None} | changed)


def gpu(**changed: Any) -> Gpu:
    known: dict[str, Any] = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA L4", "compute_capability": "8.9"}
    return Gpu(**known | {"total": 24 * GIB, "free": 20 * GIB, "driver": "580.95.05", "cuda": "13.0"} | changed)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests, and `claim`, do to the environment ends with them."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Nvml], Nvml]:
    """Puts a stand-in where `import pynvml` finds it."""

    def put(nvml: Nvml) -> Nvml:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return put


Install = Callable[[Nvml], Nvml]


# What a command line means


@pytest.mark.parametrize(
    ("text", "meant", "shown"),
    [
        ("cpu", Device("cpu"), "cpu"),
        ("cuda", Device("cuda", 0), "cuda:0"),
        ("cuda:0", Device("cuda", 0), "cuda:0"),
        (" cuda:12 ", Device("cuda", 12), "cuda:12"),
    ],
)
def test_a_device_is_read_and_shown_again(text: str, meant: Device, shown: str) -> None:
    assert devices.parse(text) == meant
    assert str(meant) == shown
    assert devices.parse(shown) == meant


@pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "cuda:x", "cuda:٣", "cuda:99999"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="write cpu, cuda or cuda:N"):
        devices.parse(text)


def test_a_list_keeps_its_order_and_cpu_may_come_twice() -> None:
    assert devices.parse_list("cuda:1, cuda:0") == (Device("cuda", 1), Device("cuda", 0))
    assert devices.parse_list("cpu,cpu") == (Device("cpu"), Device("cpu"))


@pytest.mark.parametrize(
    ("text", "why"), [("", "empty"), ("cpu,", "empty"), ("cuda,cuda:0", "cuda:0 twice"), ("cpu,tpu", "'tpu'")]
)
def test_a_list_with_a_fault_is_refused(text: str, why: str) -> None:
    with pytest.raises(DeviceError, match=why):
        devices.parse_list(text)


def test_the_module_is_read_without_what_engines_need() -> None:
    script = "import sys, runtime.devices; print(*{'psutil', 'numpy', 'onnxruntime', 'pynvml'} & set(sys.modules))"
    assert not subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


# What NVML says


def test_the_stand_in_has_the_functions_of_the_real_module() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name in (name for name in vars(Nvml) if name.startswith("nvml")):
        theirs = list(inspect.signature(getattr(real, name)).parameters)
        assert theirs == list(inspect.signature(getattr(Nvml, name)).parameters)[1:], name
    for name in (name for name in vars(Nvml) if name.startswith("NVMLError_")):
        assert issubclass(getattr(real, name), real.NVMLError)
    assert real.NVML_DEVICE_MIG_ENABLE == Nvml.NVML_DEVICE_MIG_ENABLE
    assert {name for name, _ in real.nvmlPciInfo_t._fields_} >= {"domain", "bus", "device"}
    assert {name for name, _ in real.c_nvmlMemory_t._fields_} >= {"total", "free"}


def test_a_gpu_is_described(install: Install) -> None:
    nvml = install(Nvml(card(1), cuda=13020))
    assert devices.gpus() == [gpu(uuid=card(1).uuid, cuda="13.2")]
    assert nvml.users == 0, "NVML is left open"


def test_gpus_are_numbered_by_pci_bus(install: Install) -> None:
    install(Nvml(card(65, "c"), card(1, "a"), card(23, "b")))
    assert [(found.index, found.uuid[4]) for found in devices.gpus()] == [(0, "a"), (1, "b"), (2, "c")]


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        ("1", "b"),
        ("2,0", "ca"),
        (" 1, 2", "bc"),
        ("1gpu,0", "ba"),
        ("0,7,1", "a"),
        ("0,-1,1", "a"),
        ("0,,1", "a"),
        ("GPU-bbbb", "b"),
        ("GPU-cccccccc-d72c-4106-c12f-20bd9faed9f6,GPU-a", "ca"),
        ("GPU-c,GPU-x,GPU-a", "c"),
        ("GPU-c,GPU-,GPU-a", "c"),  # which fits all three
        ("GPU-c,0", "c"),
        ("0,GPU-c", "a"),
    ],
)
def test_only_visible_gpus_count_as_cuda_counts_them(
    install: Install, monkeypatch: pytest.MonkeyPatch, visible: str, shown: str
) -> None:
    install(Nvml(card(1, "a"), card(2, "b"), card(3, "c")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = devices.gpus()
    assert "".join(one.uuid[4] for one in found) == shown
    assert [one.index for one in found] == list(range(len(shown)))


@pytest.mark.parametrize("visible", ["", "-1", "7", "0,0", "GPU-a,GPU-aaaa", "none"])
def test_hidden_gpus_are_named_as_hidden(install: Install, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    install(Nvml(card(1, "a"), card(2, "b")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=f"CUDA_VISIBLE_DEVICES='{visible}' hides every GPU .* has 2"):
        devices.gpus()


def test_a_mig_slice_is_refused_by_name(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Nvml(card(1, mig=1)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-41b3b4c2")
    with pytest.raises(DeviceError, match="MIG slice MIG-41b3b4c2"):
        devices.gpus()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("NVMLError_LibraryNotFound", "no NVIDIA driver here .*install it"),
        ("NVMLError_DriverNotLoaded", "not loaded.*modprobe nvidia"),
        ("NVMLError_LibRmVersionMismatch", "restart this machine"),
        ("NVMLError_NoPermission", "/dev/nvidiactl"),
        ("NVMLError_GpuIsLost", "gave an error.*nvidia-smi"),
    ],
)
def test_each_way_of_having_no_driver_has_its_own_sentence(install: Install, error: str, advice: str) -> None:
    install(Nvml(broken=error))
    with pytest.raises(DeviceError, match=advice):
        devices.gpus()


def test_a_driver_without_gpus_is_told_from_no_driver(install: Install) -> None:
    install(Nvml())
    with pytest.raises(DeviceError, match="finds no GPU"):
        devices.gpus()


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # Python's own way of "there is no such module"
    with pytest.raises(DeviceError, match=r"pip install 'engineshed\[cuda\]'"):
        devices.gpus()


def test_a_gpu_that_fails_while_it_is_read_is_an_error_and_closes_nvml(install: Install) -> None:
    nvml = install(Nvml(card(1, lost=True)))
    with pytest.raises(DeviceError, match="GPU is lost"):
        devices.gpus()
    assert nvml.users == 0


def test_a_gpu_without_memory_of_its_own_has_the_processors(install: Install) -> None:
    install(Nvml(card(1, total=None)))
    (found,) = devices.gpus()
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.free <= found.total


# The one that is meant


def test_the_gpu_meant_is_found_and_one_that_is_not_there_names_the_others(install: Install) -> None:
    install(Nvml(card(1, "a"), card(2, "b")))
    assert devices.gpu(Device("cuda", 1)).uuid[4] == "b"
    with pytest.raises(
        DeviceError, match=r"no cuda:2, only cuda:0 \(NVIDIA L4\), cuda:1 \(NVIDIA L4\); see: engineshed devices"
    ):
        devices.gpu(Device("cuda", 2))
    with pytest.raises(DeviceError, match="cpu is no GPU"):
        devices.gpu(Device("cpu"))


def test_a_gpu_that_is_not_visible_is_missed_with_the_reason(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Nvml(card(1, "a"), card(2, "b")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(DeviceError, match="under CUDA_VISIBLE_DEVICES=1"):
        devices.gpu(Device("cuda", 1))


def test_a_claimed_gpu_is_the_only_one_from_then_on(install: Install) -> None:
    install(Nvml(card(2, "b"), card(1, "a")))
    claimed = devices.gpu(Device("cuda", 1))
    devices.claim(claimed)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == (claimed.uuid, "PCI_BUS_ID")
    assert [found.uuid for found in devices.gpus()] == [claimed.uuid]
    assert devices.gpu(Device("cuda", 0)).uuid == claimed.uuid


@pytest.mark.parametrize("least", ["12.9", "13.0", "13.2"])
def test_a_driver_that_is_new_enough_passes(least: str) -> None:
    devices.check_driver(gpu(cuda="13.2"), least)


def test_a_driver_that_is_too_old_names_both_versions() -> None:
    with pytest.raises(DeviceError, match=r"580\.95\.05, which supports CUDA 12\.9 at most; CUDA 12\.10 is needed: install"):
        devices.check_driver(gpu(cuda="12.9"), "12.10")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cuda": "12.8"}, r"CUDA 13\.0 is needed"),
        ({"compute_capability": "7.0"}, r"compute capability 7\.0"),
        ({"mig": True}, "--multi-instance-gpu=0"),
    ],
)
def test_a_gpu_that_engines_cannot_use_is_refused(changed: dict[str, Any], why: str) -> None:
    devices.check(gpu(compute_capability="10.0"))
    with pytest.raises(DeviceError, match=why):
        devices.check(gpu(**changed))


# What fits


def test_the_budget_is_a_share_of_the_whole_but_never_more_than_is_free() -> None:
    assert devices.budget(gpu(total=10 * GIB, free=10 * GIB), 0.5) == 5 * GIB
    assert devices.budget(gpu(total=10 * GIB, free=2 * GIB), 0.5) == 2 * GIB
    assert devices.budget(gpu(total=10 * GIB, free=10 * GIB), 1) == 10 * GIB


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(DeviceError, match="over 0 and at most 1"):
        devices.budget(gpu(), share)


def test_as_many_slots_fit_as_memory_is_left_for() -> None:
    weights, token, context = 1000 * MIB, 128 << 10, 4096  # 512 MiB a slot
    room = weights + WORKSPACE
    assert devices.slots_that_fit(room + 512 * MIB, weights, token, context, most=64) == 1
    assert devices.slots_that_fit(room + 8 * 512 * MIB - 1, weights, token, context, most=64) == 7
    assert devices.slots_that_fit(room + 8 * 512 * MIB, weights, token, context, most=64) == 8
    assert devices.slots_that_fit(room + 8 * 512 * MIB, weights, token, context, most=4) == 4


def test_no_slot_shows_the_whole_sum_and_a_context_that_fits() -> None:
    weights, token = 1000 * MIB, 128 << 10
    budget = weights + WORKSPACE + 511 * MIB
    with pytest.raises(DeviceError) as refused:
        devices.slots_that_fit(budget, weights, token, 4096, most=64)
    said = str(refused.value)
    for part in (
        "2,279 MiB",
        "1,000 MiB of weights",
        "768 MiB of workspace",
        "leave 511 MiB",
        "512 MiB (4096 x 131,072 bytes)",
    ):
        assert part in said
    assert "--context 4088 " in said
    assert devices.slots_that_fit(budget, weights, token, 4088, most=64) == 1


def test_weights_that_do_not_fit_get_no_advice_on_the_context() -> None:
    with pytest.raises(DeviceError, match="leave -768 MiB") as refused:
        devices.slots_that_fit(GIB, GIB, 128 << 10, 4096, most=64)
    assert "--context" not in str(refused.value)
    assert "smaller variant" in str(refused.value)


# The command

MODULES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "nvidia-cudnn-cu13": "nvidia.cudnn",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "cuda-core": "cuda.core",
    "cuda-bindings": "cuda.bindings",
    "nvidia-ml-py": "pynvml",
}
"""The module that each distribution brings."""


class Site:
    """A stand-in for what pip has installed: versions as the metadata gives them, packages that are empty folders."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._versions = folder, dict[str, str]()
        patch.setattr(metadata, "version", self._version)
        patch.setattr(command, "find_library", lambda name: None)  # whatever CUDA this machine has
        patch.syspath_prepend(folder)
        for name in self.loaded():
            patch.delitem(sys.modules, name)

    @staticmethod
    def loaded() -> list[str]:
        """The modules that this test's packages would be mistaken for, or that looking for them has loaded."""
        roots = {module.partition(".")[0] for module in MODULES.values()}
        return [name for name in sys.modules if name.partition(".")[0] in roots]

    def add(self, *distributions: str) -> None:
        for name in distributions:
            self._versions[name] = "1.2.3"
            self.module(MODULES[name])
            if name == "onnxruntime-gpu":
                (self._folder / "onnxruntime/capi").mkdir()
                (self._folder / "onnxruntime/capi/libonnxruntime_providers_cuda.so").touch()

    def module(self, name: str) -> None:
        (self._folder / name.replace(".", "/")).mkdir(parents=True, exist_ok=True)
        (self._folder / name.replace(".", "/") / "__init__.py").touch()

    def _version(self, distribution: str) -> str:
        if distribution not in self._versions:
            raise metadata.PackageNotFoundError(distribution)
        return self._versions[distribution]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield Site(tmp_path, monkeypatch)
    for name in Site.loaded():
        del sys.modules[name]


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args(options))


def target(name: str) -> command.Runs:
    return next(runs for runs in command.survey().targets if runs.target == name)


REPLACE = "pip uninstall --yes onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"


def test_without_a_gpu_the_command_says_why_and_what_to_install(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.add("onnxruntime")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert run() == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "onnxruntime 1.2.3 yes CPU" in lines
    assert {"cpu yes", "cuda no", "tensorrt no", "tensorrt-rtx no"} <= set(lines)
    assert {f"pip install 'engineshed[{extra}]'" for extra in ("cuda", "tensorrt", "tensorrt-rtx")} <= set(lines)
    assert any(line.startswith("GPUs cannot be seen without nvidia-ml-py") for line in lines)


def test_json_is_the_same_without_a_gpu(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.add("onnxruntime")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert run("--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert said["gpus"] == []
    assert "nvidia-ml-py" in said["no_gpu"]
    assert {runs["target"]: not runs["missing"] for runs in said["targets"]} == {
        "cpu": True,
        "cuda": False,
        "tensorrt": False,
        "tensorrt-rtx": False,
    }
    (engine,) = (runtime for runtime in said["runtimes"] if runtime["name"] == "onnxruntime")
    assert engine == {"name": "onnxruntime", "version": "1.2.3", "providers": ["CPUExecutionProvider"], "problem": None}


def test_with_gpus_and_every_runtime_all_targets_run(site: Site, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(Nvml(card(1, name="NVIDIA H100 80GB HBM3", capability=(9, 0), total=80 * GIB, free=79 * GIB), card(2)))
    site.add(*(name for name in MODULES if name != "onnxruntime"))
    site.module("tensorrt_libs")
    site.module("tensorrt_rtx_libs")
    assert run() == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "cuda:0 NVIDIA H100 80GB HBM3 79.0 GiB 80.0 GiB 9.0 580.95.05 13.0" in lines
    assert "cuda:1 NVIDIA L4 20.0 GiB 24.0 GiB 8.9 580.95.05 13.0" in lines
    assert "onnxruntime-gpu 1.2.3 yes CUDA, CPU" in lines
    assert {"cpu yes", "cuda yes", "tensorrt yes", "tensorrt-rtx yes"} <= set(lines)
    assert "pip" not in out
    assert "pynvml" in sys.modules
    assert "onnxruntime" not in sys.modules, "the command has imported a runtime"


def test_gpus_in_json(site: Site, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(Nvml(card(1), card(2, capability=(7, 0))))
    assert run("--json") == 0
    said = json.loads(capsys.readouterr().out)
    fit, old = said["gpus"]
    assert (fit["gpu"]["total"], fit["gpu"]["uuid"], fit["problem"]) == (24 * GIB, card(1).uuid, None)
    assert "compute capability 7.0" in old["problem"]
    assert said["no_gpu"] is None


def test_a_driver_that_is_too_old_is_what_every_gpu_target_lacks(site: Site, install: Install) -> None:
    install(Nvml(card(1), cuda=12080))
    site.add("onnxruntime", *(name for name in MODULES if name.startswith(("tensorrt", "cuda", "nvidia-ml"))))
    site.module("tensorrt_libs")
    (missing,) = target("tensorrt").missing
    assert "CUDA 13.0 is needed" in missing
    assert target("tensorrt").commands == ()
    usable = {runtime.name for runtime in command.survey().runtimes if runtime.problem is None}
    assert usable == {"onnxruntime", "nvidia-ml-py"}


def test_both_onnxruntimes_at_once_are_told_apart_again(site: Site, install: Install) -> None:
    install(Nvml(card(1)))
    site.add("onnxruntime", "onnxruntime-gpu", "nvidia-cudnn-cu13", "cuda-core", "cuda-bindings", "nvidia-ml-py")
    assert target("cpu").missing == ()
    (missing,) = target("cuda").missing
    assert "beside onnxruntime" in missing
    assert target("cuda").commands == (REPLACE,)


def test_an_extra_that_brings_the_cpus_onnxruntime_back_is_followed_by_its_removal(site: Site, install: Install) -> None:
    install(Nvml(card(1)))
    site.add("onnxruntime-gpu", "nvidia-cudnn-cu13", "cuda-core", "cuda-bindings", "nvidia-ml-py")
    assert target("cuda").missing == ()
    assert target("tensorrt").commands == ("pip install 'engineshed[tensorrt]'", REPLACE)


def test_bindings_without_their_libraries_are_not_enough(site: Site, install: Install) -> None:
    install(Nvml(card(1)))
    site.add("onnxruntime", "tensorrt", "cuda-core", "cuda-bindings", "nvidia-ml-py")
    assert target("tensorrt").missing == ("tensorrt is installed without its libraries",)


def test_libraries_of_the_whole_system_count(site: Site, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Nvml(card(1)))
    site.add("onnxruntime-gpu", "cuda-core", "cuda-bindings", "nvidia-ml-py")
    assert target("cuda").missing == ("cudnn is not installed",)
    monkeypatch.setattr(command, "find_library", {"cudnn": "libcudnn.so.9"}.get)
    assert target("cuda").missing == ()


def test_every_target_of_bundles_is_covered() -> None:
    assert tuple(runs.target for runs in command.survey().targets) == get_args(Target)
