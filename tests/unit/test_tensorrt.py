"""Real plans by TensorRT-RTX, which builds without a GPU: what is asked of it, what it says, and what the bundle then says.

A plan is not opened here: deserializing one needs a driver. What stands in it is read off the network that it is built from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest

from export import sampler, tensorrt
from export.errors import ExportError
from export.recipe import Build
from export.tensorrt import Builder, Network
from runtime import bundle, loading
from runtime.bundle import Bundle, Profile, Variant
from runtime.devices import DeviceError
from runtime.engine import EngineError
from tests import tiny

CONTEXT = 90
CAPACITY = 96
GPUS = ("8.9", "12.0")
BUILD = Build("tensorrt-rtx", "fp16", context=CONTEXT, batches=(1, 8), chunk=200, gpus=GPUS)


@dataclass(frozen=True)
class Exported:
    """The tiny model's bundle with a plan, and what its export told."""

    folder: Path
    manifest: Bundle
    progress: tiny.Silent

    @property
    def variant(self) -> Variant:
        return self.manifest.variant(BUILD.name)


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    engines, progress = tmp_path_factory.mktemp("plans") / "engines", tiny.Silent()
    with tiny.tracing_once():
        folder = tiny.exporting(engines, progress=progress).run(tiny.recipe(tiny_model, BUILD))
    return Exported(folder, bundle.read(folder), progress)


@pytest.fixture(scope="module")
def network(exported: Exported) -> Network:
    plan = exported.variant.plan
    assert plan is not None
    return Builder("tensorrt-rtx").inspect(exported.folder / plan.source)


def test_the_bundle_says_what_its_plan_is(exported: Exported) -> None:
    variant, plan = exported.variant, exported.variant.plan

    assert plan is not None
    assert (plan.builder, plan.compute_capabilities, plan.capacity) == ("tensorrt-rtx", GPUS, CAPACITY)
    assert plan.profiles == (Profile(1, 1, 1), Profile(8, 1, 8), Profile(1, CAPACITY - 8, CAPACITY - 8))
    assert plan.version in variant.builder
    assert variant.kv_dtype == "float16"
    assert exported.manifest.longest(variant) == CAPACITY - 1
    assert exported.manifest.for_device("cuda") == variant


def test_its_tokens_were_compared_with_transformers(exported: Exported) -> None:
    verification = exported.variant.verification
    assert verification is not None
    assert verification.equal == verification.tokens > 100


def test_every_slot_is_updated_in_place_and_every_layer_attends(network: Network) -> None:
    slots = {f"{layer}.{part}" for layer in range(2) for part in ("key", "value")}

    assert network.in_place == {f"present.{slot}": f"past.{slot}" for slot in slots}
    assert network.layers["KV_CACHE_UPDATE"] == len(slots)
    assert network.layers["ATTENTION_INPUT"] == network.layers["ATTENTION_OUTPUT"] == 2
    assert not {"CONDITION", "LOOP_OUTPUT", "NON_ZERO"} & set(network.layers)


def test_the_bindings_are_those_of_the_step_contract(network: Network) -> None:
    slots = {name: shape for name, shape in network.inputs.items() if name.startswith("past.")}

    assert set(network.inputs) - set(slots) == {"input_ids", "position_ids", "kv_range", "logit_rows", "forced"}
    assert set(slots.values()) == {(-1, 2, CAPACITY, 16)}
    assert list(network.outputs)[:3] == ["tokens", "logprobs", "logits"]
    assert network.outputs["logits"] == (-1, tiny.VOCAB)


def test_the_sampler_is_a_plan_too_without_a_branch(exported: Exported) -> None:
    plan = exported.variant.plan
    assert plan is not None
    seen = Builder("tensorrt-rtx").inspect(exported.folder / plan.sampler_source)

    assert set(seen.inputs) == {"logits", *sampler.INPUTS}
    assert set(seen.outputs) == {"tokens", "logprobs"}
    assert not {"CONDITION", "LOOP_OUTPUT"} & set(seen.layers)


def test_the_sampler_that_takes_masks_and_adjustments_is_a_plan_too(exported: Exported) -> None:
    plan = exported.variant.plan
    assert plan is not None
    seen = Builder("tensorrt-rtx").inspect(exported.folder / plan.adorned_source)

    assert set(seen.inputs) == {"logits", sampler.MASK, *sampler.INPUTS, *sampler.ADJUSTMENTS}
    assert set(seen.outputs) == {"tokens", "logprobs", "top_tokens", "top_logprobs"}
    assert not {"CONDITION", "LOOP_OUTPUT"} & set(seen.layers)


def test_serving_reads_the_plans_and_not_what_they_were_built_from(exported: Exported) -> None:
    served = {file.path for file in exported.manifest.served(exported.variant)}
    kept = {file.path for file in exported.variant.files}

    assert {f"{BUILD.name}/{name}.plan" for name in ("model", "sampler", "adorned")} <= served
    assert {f"{BUILD.name}/{name}" for name in ("model.onnx", "weights.bin", "sampler.onnx", "adorned.onnx")} == kept - served


def test_the_build_tells_how_far_it_is(exported: Exported) -> None:
    shares = exported.progress.shares[f"{BUILD.name}: build"]
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5 < shares[-1] <= 1


def test_timings_are_kept_for_the_next_build(exported: Exported) -> None:
    (kept,) = (exported.folder.parent.parent / "tensorrt").iterdir()
    assert kept.name.startswith("tensorrt-rtx-")
    assert kept.stat().st_size > 0


def test_a_gpu_that_the_builder_does_not_know_is_refused_with_those_it_knows() -> None:
    with pytest.raises(ExportError, match=r"does not build for compute capability 9\.0; it knows 7\.5, 8\.0, 8\.6, 8\.9"):
        Builder("tensorrt-rtx").targets(["8.9", "9.0"])


def test_without_a_gpu_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[object]:
        raise DeviceError("there is no GPU")

    monkeypatch.setattr(tensorrt, "gpus", none)
    with pytest.raises(ExportError, match=r"no GPU is here .* name the GPUs to build for with --gpu, out of 7\.5"):
        Builder("tensorrt-rtx").targets([])


def test_a_builder_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match=r"pip install 'engineshed\[tensorrt\]'"):
        Builder("tensorrt")


def test_what_the_parser_does_not_take_is_said_in_its_own_words(tmp_path: Path) -> None:
    damaged = tmp_path / "model.onnx"
    damaged.write_bytes(b"no graph at all")
    with pytest.raises(ExportError, match=r"does not take model\.onnx: .*pars"):
        Builder("tensorrt-rtx").inspect(damaged)


def test_what_the_builder_cannot_do_is_said_in_its_own_words(exported: Exported, tmp_path: Path) -> None:
    plan = exported.variant.plan
    assert plan is not None
    with pytest.raises(ExportError, match=r"could not build .*IKVCacheUpdateLayer"):
        Builder("tensorrt-rtx").build(
            exported.folder / plan.source, tmp_path / "p", [Profile(1, 2 * CAPACITY, 1)], GPUS, capacity=CAPACITY
        )
    assert not (tmp_path / "p").exists()


def test_a_slot_that_is_not_written_in_place_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    past = ir.Value(name="past.0.key", shape=ir.Shape(["batch", 2, 8, 16]), type=ir.TensorType(ir.DataType.FLOAT16))
    node = ir.node("Neg", [past])
    present = node.outputs[0]
    present.name, present.shape, present.type = "present.0.key", past.shape, past.type
    model = ir.Model(ir.Graph([past], [present], nodes=[node], opset_imports={"": 24}, name="copies"), ir_version=10)
    path = tmp_path / "copies.onnx"
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())

    with pytest.raises(ExportError, match=r"does not write present\.0\.key of copies\.onnx into its slot in place"):
        Builder("tensorrt-rtx").build(path, tmp_path / "p", [Profile(1, 1, 1)], GPUS, capacity=8)


def test_plans_are_built_anew_for_another_gpu_once(exported: Exported, tmp_path: Path) -> None:
    first = loading.rebuilt(exported.folder, exported.variant, "8.6", tmp_path)
    built = Path(first.model).stat().st_mtime_ns
    second = loading.rebuilt(exported.folder, exported.variant, "8.6", tmp_path)

    assert first.plan is not None
    assert (first.plan.compute_capabilities, first.plan.capacity) == (("8.6",), CAPACITY)
    assert first == second
    assert Path(first.model).stat().st_mtime_ns == built
    bundle.verify(exported.folder, first.files)
    assert not list(tmp_path.rglob(".*"))


def test_plans_that_cannot_be_built_anew_leave_nothing(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"could not be built anew: .*does not build for compute capability 9\.0"):
        loading.rebuilt(exported.folder, exported.variant, "9.0", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("phases", "shown"),
    [
        ([("a", None, 2, ["step", "step"])], [0.5, 1.0]),
        ([("a", None, 2, []), ("b", "a", 4, ["step", "step", "step", "step"])], [0.125, 0.25, 0.375, 0.5]),
        ([("a", None, 1, ["step"]), ("late", None, 3, ["step", "step"])], [1.0]),
    ],
)
def test_progress_never_falls(phases: list[tuple[str, str | None, int, list[str]]], shown: list[float]) -> None:
    shares: list[float] = []
    progress = tensorrt.Progress(shares.append)
    for name, parent, steps, events in phases:
        progress.start(name, parent, steps)
        for step, _ in enumerate(events):
            progress.step(name, step)
    progress.step("unknown", 0)
    progress.finish("unknown")

    assert shares == shown
