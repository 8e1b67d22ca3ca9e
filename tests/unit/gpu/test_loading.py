"""From a bundle to an engine on a GPU: which slots, which memory, what is checked before the device is touched."""

import os
from pathlib import Path

import msgspec
import pytest

from runtime import bundle, cuda, devices, loading
from runtime.bundle import Bundle, BundleError, Source, Variant
from runtime.devices import Device, DeviceError, Gpu
from runtime.engine import EngineError
from runtime.gpu import GpuEngine
from runtime.loading import Placement
from tests import tiny
from tests.unit.gpu.conftest import CAPACITY, PROFILES, Export, Load
from tests.unit.gpu.device import HostDevice

GIB = 1 << 30
LOGITS = devices.LOGIT_ROWS * tiny.VOCAB * 4
HERE = Gpu(
    index=1,
    uuid="GPU-5d2f",
    name="a stand-in",
    compute_capability="8.9",
    total=24 * GIB,
    free=20 * GIB,
    driver="580.1",
    cuda="13.0",
    mig=False,
)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[HostDevice]:
    """Where NVML would show one GPU, and CUDA would open it: the devices that were opened."""
    opened: list[HostDevice] = []

    def open_device(limit: int) -> HostDevice:
        opened.append(HostDevice(limit=limit))
        return opened[-1]

    monkeypatch.setattr(devices, "gpus", lambda: [msgspec.structs.replace(HERE, index=0), HERE])
    monkeypatch.setattr(cuda, "Cuda", open_device)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # so that both are as they were afterwards
        monkeypatch.delenv(name)
    return opened


def manifest_of(export: Export) -> tuple[Bundle, Variant]:
    """A manifest around the variant of `export`, with the hashes of its files."""
    variant, plan = export.variant, export.variant.plan
    sources = (plan.source, plan.sampler_source, plan.adorned_source) if plan else ()
    weights = str(Path(plan.source if plan else variant.model).with_name("weights.bin"))
    names = {*variant.computing, *sources, weights}
    paths = sorted(name for name in names if name is not None)
    files = tuple(bundle.describe(export.folder, path) for path in paths)
    variant = msgspec.structs.replace(variant, files=files)
    source = Source("folder", "tiny")
    manifest = Bundle(bundle.FORMAT, "tiny", source, "llama", tiny.VOCAB, tiny.POSITIONS, (2,), {}, (), (variant,), 0)
    return manifest, variant


def start(export: Export, **options: object) -> GpuEngine:
    manifest, variant = manifest_of(export)
    engine = loading.start(export.folder, manifest, variant, Placement(Device("cuda", 1), **options))  # type: ignore[arg-type]
    assert isinstance(engine, GpuEngine)
    return engine


def test_the_gpu_is_claimed_before_it_is_opened(load_plan: Load, plan_export: Export, made: list[HostDevice]) -> None:
    start(plan_export)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == HERE.uuid
    assert len(made) == 1


def test_no_more_memory_is_taken_than_the_share_that_was_given(
    load_plan: Load, plan_export: Export, made: list[HostDevice]
) -> None:
    start(plan_export, gpu_memory=0.5)
    start(plan_export, gpu_memory=1.0)
    assert [device.limit for device in made] == [12 * GIB, 20 * GIB]


def test_a_plan_gets_the_slots_of_its_largest_batch_where_memory_allows(
    load_plan: Load, plan_export: Export, made: list[HostDevice]
) -> None:
    engine = start(plan_export)
    assert engine.slots == max(profile.max_batch for profile in PROFILES)
    assert engine.context == CAPACITY - 1


def test_memory_decides_the_slots_where_it_is_short(
    load_plan: Load, plan_export: Export, made: list[HostDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, variant = manifest_of(plan_export)
    weights = sum(file.size for file in manifest.served(variant)) + LOGITS
    room = weights + devices.WORKSPACE + 3 * CAPACITY * variant.kv_bytes_per_token + 1
    monkeypatch.setattr(devices, "gpus", lambda: [HERE, msgspec.structs.replace(HERE, free=room)])

    assert start(plan_export).slots == 3
    monkeypatch.setattr(devices, "gpus", lambda: [HERE, msgspec.structs.replace(HERE, free=weights)])
    with pytest.raises(DeviceError, match="no slot of"):
        start(plan_export)


def test_a_variant_beside_gets_its_room(load_plan: Load, plan_export: Export, made: list[HostDevice]) -> None:
    manifest, variant = manifest_of(plan_export)
    weights = sum(file.size for file in manifest.served(variant))
    room = 2 * weights + LOGITS + devices.WORKSPACE + 4 * CAPACITY * variant.kv_bytes_per_token
    place = Placement(Device("cuda", 1), gpu_memory=room / HERE.total)

    alone = loading.start(plan_export.folder, manifest, variant, place)
    paired = loading.start(plan_export.folder, manifest, variant, place, beside=variant)
    assert alone.slots > 2 * paired.slots - 1 > 0


def test_a_graph_runs_on_onnx_runtime(load_graph: Load, cuda_export: Export, made: list[HostDevice]) -> None:
    engine = start(cuda_export, slots=3, context=40)
    assert (engine.slots, engine.context) == (3, 40)


def test_a_context_that_the_plan_does_not_hold_is_refused(plan_export: Export, made: list[HostDevice]) -> None:
    with pytest.raises(BundleError, match=f"is made for {CAPACITY - 1} tokens; --context {CAPACITY} is more"):
        start(plan_export, context=CAPACITY)
    assert made == []


def test_a_changed_byte_is_noticed_before_the_gpu_is_opened(
    plan_export: Export, made: list[HostDevice], tmp_path: Path
) -> None:
    manifest, variant = manifest_of(plan_export)
    for file in variant.files:
        (tmp_path / file.path).write_bytes((plan_export.folder / file.path).read_bytes())
    (tmp_path / variant.model).write_bytes((plan_export.folder / variant.model).read_bytes()[:-1] + b"?")

    with pytest.raises(BundleError, match=r"model\.plan is not the file that was exported"):
        loading.start(tmp_path, manifest, variant, Placement(Device("cuda", 1)))
    assert made == []


def test_a_plan_for_another_gpu_is_refused_or_built_anew(
    load_plan: Load, plan_export: Export, made: list[HostDevice], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, Path]] = []

    def rebuilt(folder: Path, variant: Variant, compute_capability: str, cache: Path) -> Variant:
        asked.append((compute_capability, cache))
        return plan_export.variant

    monkeypatch.setattr(loading, "rebuilt", rebuilt)
    plan = plan_export.variant.plan
    assert plan is not None
    elsewhere = msgspec.structs.replace(plan, compute_capabilities=("7.5",))
    other = Export(plan_export.folder, msgspec.structs.replace(plan_export.variant, plan=elsewhere))

    with pytest.raises(EngineError, match=r"7\.5"):
        start(other)
    assert asked == []
    assert start(other, build_on_load=True, cache=tmp_path).slots > 0
    assert asked == [("8.9", tmp_path)]


def test_a_gpu_that_is_not_there_is_named(plan_export: Export, made: list[HostDevice]) -> None:
    manifest, variant = manifest_of(plan_export)
    with pytest.raises(DeviceError, match="there is no cuda:7"):
        loading.start(plan_export.folder, manifest, variant, Placement(Device("cuda", 7)))
