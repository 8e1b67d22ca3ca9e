"""ONNX Runtime on a GPU: the providers and their options, recordings by number, and what is said when one is missing."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.engine import DeviceLost, EngineError
from tests.unit.gpu import sessions
from tests.unit.gpu.conftest import CAPACITY, CHUNK, CONTEXT, SLOTS, Load
from tests.unit.gpu.device import HostDevice
from tests.unit.gpu.test_gpu_engine import Greedy, answers, chunk, decode, prefill, prompt

RTX = "NvTensorRTRTXExecutionProvider"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("made", "devices"):
        monkeypatch.setattr(sessions, name, [])
    for name in ("broken", "unrecordable"):
        monkeypatch.setattr(sessions, name, set())


def made() -> dict[str, sessions.InferenceSession]:
    """The sessions by their graphs' files."""
    return {session.path.name: session for session in sessions.made}


def test_sessions_share_the_engines_stream_and_its_memory(load_graph: Load) -> None:
    device = HostDevice()
    load_graph(device=device)
    options = [session.providers[sessions.CUDA] for session in sessions.made]
    assert {option["user_compute_stream"] for option in options} == {str(device.stream)}
    assert {option["use_tf32"] for option in options} == {"0"}
    assert sum(int(option["gpu_mem_limit"]) for option in options) <= device.limit - device.taken


def test_decode_steps_replay_a_recording_and_prompts_do_not(load_graph: Load, greedy: Greedy) -> None:
    engine = load_graph()
    for count in (1, 3, 3):
        prompts = [prompt(4 + slot, seed=slot) for slot in range(count)]
        assert answers(engine, prompts, 3, ahead=False) == [greedy(tokens, 3) for tokens in prompts]
    model = made()["model.onnx"]
    assert [number for number in model.runs if number != "-1"] == ["1", "1", "2", "2", "2", "2"]
    assert len(model.runs) == 6 + 7  # and a prompt each


def test_a_graph_that_cannot_be_recorded_is_run_all_the_same(
    load_graph: Load, greedy: Greedy, caplog: pytest.LogCaptureFixture
) -> None:
    sessions.unrecordable.add("model.onnx")
    engine = load_graph()
    assert "cannot use the graph capture feature" in caplog.text
    assert answers(engine, [prompt(5)], 4, ahead=True) == [greedy(prompt(5), 4)]
    assert set(made()["model.onnx"].runs) == {"-1"}


def test_the_onnxruntime_for_cpus_is_told_apart(load_graph: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "available", ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"pip uninstall onnxruntime.*engineshed\[cuda\].*not be installed both"):
        load_graph()


def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(load_graph: Load) -> None:
    sessions.broken.add(sessions.CUDA)
    with pytest.raises(EngineError, match=rf"cannot start its {sessions.CUDA}.*engineshed\[cuda\]"):
        load_graph()


def test_tensorrts_provider_is_told_the_shapes(load_graph: Load, greedy: Greedy, tmp_path: Path) -> None:
    engine = load_graph(provider="tensorrt", cache=tmp_path)
    providers = made()["model.onnx"].providers
    assert list(providers) == ["TensorrtExecutionProvider", sessions.CUDA]
    options = providers["TensorrtExecutionProvider"]
    assert options["trt_profile_min_shapes"].startswith("input_ids:1x1,position_ids:1x1,kv_lengths:1,kv_range:1,")
    assert "past.0.key:1x2x64x16" in options["trt_profile_min_shapes"]
    assert options["trt_profile_max_shapes"].startswith(f"input_ids:{SLOTS}x{engine.chunk},")
    assert options["trt_engine_cache_path"] == str(tmp_path)
    assert "enable_cuda_graph" not in providers[sessions.CUDA]
    assert answers(engine, [prompt(5)], 4, ahead=True) == [greedy(prompt(5), 4)]


def test_tensorrt_rtx_comes_as_a_plugin(load_graph: Load, greedy: Greedy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(EngineError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        load_graph(provider="tensorrt-rtx")
    plugin = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    for _ in range(2):  # it is registered once in a process
        engine = load_graph(provider="tensorrt-rtx")
    assert [device.ep_name for device in sessions.devices] == [RTX]
    assert list(made()["model.onnx"].providers) == [RTX, sessions.CUDA]
    assert answers(engine, [prompt(5)], 4, ahead=True) == [greedy(prompt(5), 4)]


def test_weights_beyond_the_limit_are_refused_before_they_are_loaded(load_graph: Load) -> None:
    device = HostDevice()
    load_graph(device=device)
    slots_only = device.taken
    with pytest.raises(EngineError, match=r"variant 'cuda-fp32' needs 0 MiB.*fewer slots"):
        load_graph(device=HostDevice(limit=slots_only + 1000))
    assert len(sessions.made) == 3


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("Failed to allocate memory for requested buffer of size 512", EngineError, "fewer slots"),
        ("CUDA failure 700: an illegal memory access was encountered", DeviceLost, "start the engine again"),
        ("Non-zero status code returned", EngineError, "Non-zero status code"),
    ],
)
def test_what_onnx_runtime_raises_is_explained(
    load_graph: Load, monkeypatch: pytest.MonkeyPatch, text: str, kind: type[EngineError], words: str
) -> None:
    engine = load_graph()

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(sessions.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(EngineError, match=words) as raised:
        engine.step(chunk(0, [3], 1, [0]))
    assert type(raised.value) is kind


def test_a_recording_holds_for_every_length(load_graph: Load, greedy: Greedy) -> None:
    """It is made at a short one, with the slot's capacity in the place of the longest length."""
    engine, tokens = load_graph(), prompt(40)
    prefill(engine, 0, prompt(3))
    engine.step(decode([1], [4]))
    right = greedy(tokens, CONTEXT - 40)
    assert answers(engine, [tokens], len(right), ahead=True) == [right]
    model = made()["model.onnx"]
    assert {longest for number, longest in zip(model.runs, model.longest, strict=True) if number != "-1"} == {CAPACITY}
    assert [longest for number, longest in zip(model.runs, model.longest, strict=True) if number == "-1"] == [3, CHUNK, 40]
