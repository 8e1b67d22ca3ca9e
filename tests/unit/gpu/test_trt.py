"""TensorRT plans: opened where they belong, refused with a reason elsewhere, refitted, built anew; and their contexts."""

import logging
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from runtime.bundle import Plan, Profile, Variant
from runtime.engine import Draw, EngineError
from runtime.trt import PlanRefused
from tests.unit.gpu import plans
from tests.unit.gpu.conftest import CAPACITY, CHUNK, CONTEXT, PROFILES, SLOTS, Export, Load, model_ranges
from tests.unit.gpu.device import HostDevice
from tests.unit.gpu.test_gpu_engine import Greedy, answers, chunk, decode, prefill, prompt

BUILD = "engineshed export MODEL --target tensorrt-rtx.*engineshed serve --build-on-load"


def plan_of(variant: Variant) -> Plan:
    assert variant.plan is not None
    return variant.plan


def changed(export: Export, **changes: Any) -> Variant:
    """The variant with another manifest of its plan."""
    return msgspec.structs.replace(export.variant, plan=msgspec.structs.replace(plan_of(export.variant), **changes))


def with_plan(export: Export, name: str, **changes: Any) -> Variant:
    """The variant with another plan of its model, under `name`."""
    ranges = [model_ranges(export.variant.layers, profile) for profile in PROFILES]
    plans.write_plan(export.folder / name, export.folder / "model.onnx", ranges, **changes)
    return msgspec.structs.replace(export.variant, model=name)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[plans.ICudaEngine]:
    """The engines of the model and its two samplers, once they are opened."""
    opened: list[plans.ICudaEngine] = []
    real = plans.Runtime.deserialize_cuda_engine

    def open_it(self: plans.Runtime, serialized_engine: Any) -> plans.ICudaEngine | None:
        engine = real(self, serialized_engine)
        if engine is not None:
            opened.append(engine)
        return engine

    monkeypatch.setattr(plans.Runtime, "deserialize_cuda_engine", open_it)
    return opened


def test_an_engine_is_as_large_as_its_plan(load_plan: Load) -> None:
    engine = load_plan()
    assert (engine.slots, engine.context, engine.chunk, engine.runs_ahead) == (SLOTS, CONTEXT, CHUNK, True)
    assert load_plan(context=20).context == 20


def test_a_shorter_context_pads_to_the_row_behind_it(load_plan: Load, greedy: Greedy) -> None:
    prompts = [prompt(4), prompt(5), prompt(6)]
    assert answers(load_plan(context=20), prompts, 8, ahead=True) == [greedy(tokens, 8) for tokens in prompts]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"slots": 9}, "--slots 8"), ({"context": CAPACITY}, f"--context {CONTEXT}")],
)
def test_sizes_beyond_the_plan_are_refused_with_the_largest_it_takes(
    load_plan: Load, options: dict[str, int], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        load_plan(**options)


def test_a_step_that_fits_no_profile_is_refused_with_those_there_are(load_plan: Load, plan_export: Export) -> None:
    engine = load_plan(changed(plan_export, profiles=(*PROFILES[:2], Profile(1, CHUNK, 4))))
    with pytest.raises(EngineError, match=rf"1 x 6 tokens with 6 logit rows.*, 1 x {CHUNK} with 4 logit rows"):
        engine.step(chunk(0, prompt(6), 6, list(range(6))))


# Refusals --------------------------------------------------------------------------------------------------------------


def test_a_plan_of_another_version_is_refused(load_plan: Load, plan_export: Export) -> None:
    with pytest.raises(PlanRefused, match=rf"tensorrt-rtx 1.6.0, installed is {plans.__version__}; .*{BUILD}"):
        load_plan(changed(plan_export, version="1.6.0"))


def test_a_plan_for_another_gpu_is_refused(load_plan: Load) -> None:
    with pytest.raises(PlanRefused, match=rf"capability 8.6, 8.9, this one has 12.0; .*{BUILD}"):
        load_plan(device=HostDevice(compute_capability="12.0"))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("VERSION_MISMATCH", "another version of TensorRT-RTX"),
        ("UNSUPPORTED_CC", "another architecture"),
        ("OLD_CUDA_DRIVER", "update the driver"),
        ("OLD_CUDA_RUNTIME", "newer CUDA runtime"),
        ("INSUFFICIENT_GPU_MEMORY", "more GPU memory"),
        ("CUDA_ERROR", "engineshed devices"),
    ],
)
def test_each_verdict_on_a_plan_is_a_sentence_of_its_own(load_plan: Load, plan_export: Export, reason: str, words: str) -> None:
    bits = plans.EngineInvalidityDiagnostics[reason].value
    variant = with_plan(plan_export, f"{reason}.plan", verdict="INVALID", reasons=bits)
    with pytest.raises(PlanRefused, match=f"{reason}.plan.*{words}.*{BUILD}"):
        load_plan(variant)


def test_a_damaged_plan_is_refused(load_plan: Load, plan_export: Export) -> None:
    for content in (b"", b"no plan"):
        (plan_export.folder / "damaged.plan").write_bytes(content)
        with pytest.raises(PlanRefused, match=f"damaged.plan.*{BUILD}"):
            load_plan(msgspec.structs.replace(plan_export.variant, model="damaged.plan"))


def test_without_verdicts_tensorrts_own_words_are_given(
    load_plan: Load, plan_export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tensorrt` has none to give."""
    monkeypatch.delattr(plans.Runtime, "get_engine_validity")
    with pytest.raises(PlanRefused, match="Error Code 6: the plan is not for this GPU"):
        load_plan(with_plan(plan_export, "other.plan", verdict="INVALID"))


def test_a_plan_that_runs_slowly_here_is_run_with_a_warning(
    load_plan: Load, plan_export: Export, caplog: pytest.LogCaptureFixture
) -> None:
    load_plan(with_plan(plan_export, "slow.plan", verdict="SUBOPTIMAL"))
    assert "slower than one that is built here" in caplog.text


def test_slots_that_are_not_written_in_place_are_refused(load_plan: Load, plan_export: Export) -> None:
    with pytest.raises(PlanRefused, match=r"present\.0\.key to memory of its own"):
        load_plan(with_plan(plan_export, "copies.plan", aliases=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_dtype": "float16"}, "has past.0.key as DataType.FLOAT"),
        ({"layers": ()}, "has a tensor 'past.0.key' that nobody knows"),
        ({"sampler": "model.plan"}, "has no tensor"),
    ],
)
def test_tensors_that_are_not_the_manifests_are_refused(
    load_plan: Load, plan_export: Export, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanRefused, match=words):
        load_plan(msgspec.structs.replace(plan_export.variant, **changes))


def test_a_capacity_that_is_not_the_manifests_is_refused(load_plan: Load, plan_export: Export) -> None:
    with pytest.raises(PlanRefused, match=r"past.0.key as .* \[-1, 2, 64, 16\], the manifest wants .* \[-1, 2, 128, 16\]"):
        load_plan(changed(plan_export, capacity=128))


def test_slots_that_would_not_be_aligned_are_refused(load_plan: Load, plan_export: Export) -> None:
    with pytest.raises(PlanRefused, match="multiple of 256 bytes"):
        load_plan(changed(plan_export, capacity=65))


def test_a_missing_library_names_its_extra(plan_export: Export, load_plan: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"engineshed\[tensorrt-rtx\]"):
        load_plan()


def test_a_refused_plan_is_built_anew_where_that_is_wanted(load_plan: Load, plan_export: Export, greedy: Greedy) -> None:
    reasons: list[str] = []

    def rebuild(reason: str) -> tuple[Path, Variant]:
        reasons.append(reason)
        return plan_export.folder, plan_export.variant

    engine = load_plan(changed(plan_export, version="1.6.0"), rebuild=rebuild)
    assert answers(engine, [prompt(5)], 3, ahead=False) == [greedy(prompt(5), 3)]
    assert len(reasons) == 1
    assert "1.6.0" in reasons[0]
    load_plan(rebuild=rebuild)
    assert len(reasons) == 1


# Weights ---------------------------------------------------------------------------------------------------------------


def test_a_stripped_plan_gets_its_weights_from_the_graph(load_plan: Load, plan_export: Export, greedy: Greedy) -> None:
    stripped = with_plan(plan_export, "stripped.plan", stripped=True)
    variant = msgspec.structs.replace(stripped, plan=msgspec.structs.replace(plan_of(stripped), stripped=True))
    assert answers(load_plan(variant), [prompt(5)], 3, ahead=False) == [greedy(prompt(5), 3)]
    variant = msgspec.structs.replace(variant, plan=msgspec.structs.replace(plan_of(variant), source="gone.onnx"))
    with pytest.raises(PlanRefused, match=r"cannot read .*gone.onnx"):
        load_plan(variant)


# Contexts --------------------------------------------------------------------------------------------------------------


def test_decode_steps_are_launched_from_recordings(load_plan: Load) -> None:
    engine = load_plan(device=(device := HostDevice()))
    prefill(engine, 0, prompt(4))
    for length in range(5, 11):
        engine.step(decode([3], [length]))
    assert [graph.launches for graph in device.graphs] == [5]
    for length in range(5, 8):
        engine.step(decode([3, 4, 5], [length] * 3))  # and a batch of four
    for length in range(20, 23):
        engine.step(decode([3], [length]))  # and a longer range of keys
    assert [graph.launches for graph in device.graphs] == [5, 2, 2]


def test_draws_are_recorded_beside_the_steps(load_plan: Load) -> None:
    engine = load_plan(device=(device := HostDevice()))
    prefill(engine, 0, prompt(4))
    hot = Draw.force(np.array([-1]))
    hot = Draw(np.ones(1, np.float32), hot.top_k, hot.top_p, hot.min_p, hot.uniform, hot.forced)
    for draw in (hot, Draw.greedy(1), hot, hot):
        engine.step(decode([3], [5], draw))
    assert sorted(graph.launches for graph in device.graphs) == [2, 3]


def test_work_that_cannot_be_recorded_is_launched_piece_by_piece(
    load_plan: Load, greedy: Greedy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(self: HostDevice, work: Any) -> Any:
        raise EngineError("the stand-in was told not to")

    monkeypatch.setattr(HostDevice, "record", record)
    with caplog.at_level(logging.WARNING):
        assert answers(load_plan(), [prompt(5)], 6, ahead=True) == [greedy(prompt(5), 6)]
    assert caplog.text.count("the stand-in was told not to") == 1


def test_a_recorded_shape_has_a_context_of_its_own(load_plan: Load, engines: list[plans.ICudaEngine]) -> None:
    """Compiled for it; prefill, of many shapes, has one for all, compiled for none."""
    engine, special, any_shape = load_plan(), "EAGER", "NONE"
    for length in (3, 7, 11):
        prefill(engine, 0, prompt(length))
    for count in (1, 2, 3):
        engine.step(decode([3] * count, [4] * count))
    kinds = [context.config.dynamic_shapes_kernel_specialization_strategy.name for context in engines[0].contexts]
    assert kinds == [any_shape, special, special, special]


def test_what_was_compiled_is_kept_for_the_next_start(
    load_plan: Load, engines: list[plans.ICudaEngine], tmp_path: Path
) -> None:
    folder = tmp_path / "compiled"
    for starts in (1, 2):
        engine = load_plan(cache=folder)
        prefill(engine, 0, prompt(3))
        assert engines[-3].contexts[0].config.cache.compiled == starts  # type: ignore[union-attr]
        engine.close()
        (kept,) = folder.iterdir()
        assert kept.name.endswith("tensorrt-rtx-fp32-1.7.1.116-8.9.cache")
    kept.write_bytes(b"of another version")
    prefill(load_plan(cache=folder), 0, prompt(3))
    assert engines[-3].contexts[0].config.cache.compiled == 1  # type: ignore[union-attr]


def test_an_error_of_tensorrt_reaches_the_one_who_asked(
    load_plan: Load, engines: list[plans.ICudaEngine], greedy: Greedy
) -> None:
    engine = load_plan()
    engines[0].has_weights = False
    with pytest.raises(EngineError, match="the engine's weights are missing"):
        engine.step(chunk(0, [3], 1, [0]))
    engines[0].has_weights = True
    assert answers(engine, [prompt(5)], 3, ahead=True) == [greedy(prompt(5), 3)]
