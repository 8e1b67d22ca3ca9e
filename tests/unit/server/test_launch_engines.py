"""From the options of `engineshed serve` to the workers' command lines and what they will take of a device's memory."""

import argparse
from pathlib import Path

import msgspec
import pytest

from runtime import devices
from runtime.bundle import Bundle, BundleError, Plan, Variant
from runtime.devices import Device, DeviceError, Gpu
from server import serve
from server.supervision.catalog import Catalog, Entry
from server.supervision.launch import Launch, bytes_of, launches, seats

GPU = Gpu(0, "GPU-0", "H100", "9.0", 80 << 30, 80 << 30, "580.95.05", "13.0")


def launched(folder: Path, bundle: Bundle, *arguments: str) -> list[Launch]:
    """How `engineshed serve ARGUMENTS` would start the engine of `bundle`."""
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    args = parser.parse_args(arguments)
    entry = Entry("tiny", folder / "tiny", bundle, "build")
    return launches(entry, serve.common(args), seats(args.device, args.memory, args.gpu_memory or 0.9), Catalog(folder))


def told(launch: Launch) -> dict[str, str]:
    """The worker's options."""
    return dict(option.partition("=")[::2] for option in launch.command if option[:2] == "--")


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are not here."""
    monkeypatch.setattr(devices, "gpu", lambda device: msgspec.structs.replace(GPU, index=device.index))


@pytest.fixture
def planned(bundle: Bundle) -> Bundle:
    """A bundle with a variant for GPUs, as far as a command line looks at it."""
    made = Plan(
        "tensorrt",
        "11.4",
        ("8.9",),
        capacity=33,
        profiles=(),
        stripped=False,
        source="a",
        sampler_source="b",
        adorned_source="c",
    )
    variant: Variant = msgspec.structs.replace(bundle.variants[0], name="tensorrt-fp16", target="tensorrt", plan=made)
    return msgspec.structs.replace(bundle, variants=(*bundle.variants, variant))


def test_one_worker_on_the_cpu_has_eight_slots_and_every_core(tmp_path: Path, bundle: Bundle) -> None:
    (launch,) = launched(tmp_path, bundle)
    options = told(launch)
    assert (launch.seat.name, options["--device"], options["--slots"]) == ("cpu", "cpu", "8")
    assert options["--build"] == "build"
    assert not {"--cores", "--threads", "--gpu-memory", "--build-on-load", "--provider"} & options.keys()


@pytest.mark.parametrize(
    ("cores", "shares"), [([0, 1, 2, 3, 5, 6, 7], ["0,1", "2,3", "5,6,7"]), ([4, 9], ["4", "4", "9"]), ([3], ["3", "3", "3"])]
)
def test_several_workers_on_the_cpu_share_its_cores(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, cores: list[int], shares: list[str]
) -> None:
    monkeypatch.setattr(devices, "core_numbers", lambda: cores)
    found = launched(tmp_path, bundle, "--device=cpu,cpu,cpu", "--memory=3GiB")
    assert [launch.seat.name for launch in found] == ["cpu#1", "cpu#2", "cpu#3"]
    assert sorted(told(launch)["--cores"] for launch in found) == sorted(shares)
    assert [launch.seat.budget for launch in found] == [1 << 30] * 3


def test_each_gpu_gets_a_worker_that_counts_its_own_slots(tmp_path: Path, planned: Bundle) -> None:
    found = launched(tmp_path, planned, "--device=cuda:0,cuda:1")
    assert [(launch.seat.name, told(launch)["--device"]) for launch in found] == [("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")]
    assert not any({"--slots", "--threads"} & told(launch).keys() for launch in found)
    assert [launch.need for launch in found] == [launch.seat.budget for launch in found], "as many slots as fit"
    (launch,) = launched(
        tmp_path, planned, "--device=cuda", "--slots=3", "--gpu-memory=0.5", "--build-on-load", "--provider=tensorrt"
    )
    given = {"--slots": "3", "--gpu-memory": "0.5", "--build-on-load": "", "--provider": "tensorrt"}
    assert told(launch).items() >= given.items()
    assert launch.seat.budget == 40 << 30
    assert launch.need < launch.seat.budget


def test_a_gpu_and_the_cpu_each_run_the_variant_that_is_for_them(tmp_path: Path, planned: Bundle) -> None:
    found = launched(tmp_path, planned, "--device=cuda:0,cpu")
    assert [(launch.seat.name, launch.variant) for launch in found] == [("cuda:0", "tensorrt-fp16"), ("cpu", "cpu-int4")]
    (only,) = launched(tmp_path, planned, "--device=cuda:0,cpu", "--variant=cpu-int4")
    assert only.seat.name == "cpu"


def test_the_context_is_no_longer_than_a_plans_slots(tmp_path: Path, planned: Bundle) -> None:
    assert told(launched(tmp_path, planned, "--device=cuda")[0])["--context"] == "32"
    with pytest.raises(BundleError, match="made for 32 tokens"):
        launched(tmp_path, planned, "--device=cuda", "--context=33")


def test_a_models_own_options_come_before_those_of_all(tmp_path: Path, bundle: Bundle) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('slots = 3\ncontext = 60\n[models.tiny]\nslots = 2\ndevice = ["cpu#2"]\n')
    (launch,) = launched(tmp_path, bundle, f"--config={config}", "--device=cpu,cpu")
    assert (launch.seat.name, told(launch)["--slots"], told(launch)["--context"]) == ("cpu#2", "2", "60")
    config.write_text('[models.tiny]\ndevice = ["cuda:3"]\n')
    with pytest.raises(DeviceError, match="may only run on cuda:3; this server has cpu"):
        launched(tmp_path, bundle, f"--config={config}")


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 << 30), ("1.5g", 3 << 29), ("800MB", 800 << 20), ("7", 7), ("2 TiB", 2 << 40)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "0", "many", "1X", "nan"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the option says what to write
        bytes_of(text)


def test_without_a_limit_the_cpu_has_most_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "memory_limit", lambda: 10 << 30)
    (seat,) = seats([Device("cpu")], None, 0.9)
    assert seat.budget == 8 << 30
