"""The tiny model as GPUs are given it, in float32, which the CPU under the stand-ins computes exactly."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from export import decoder, graph, sampler
from export.compile import Compiler
from export.recipe import Build
from export.stage import Stage
from runtime import gpu, ort, ort_cuda, ort_providers, trt
from runtime.bundle import File, Layer, Plan, Profile, Variant
from runtime.gpu import GpuEngine
from runtime.gpu_memory import most_adjusted
from runtime.ort import OrtEngine
from tests import tiny
from tests.unit.gpu import plans, sessions
from tests.unit.gpu.device import HostDevice
from tests.unit.gpu.plans import Range

SLOTS = 6
"""No power of two."""
CAPACITY = 64
CONTEXT = CAPACITY - 1
CHUNK = 24
ROWS = 16
PROFILES = (Profile(2, 1, 2), Profile(8, 1, 8), Profile(1, CHUNK, ROWS))


@dataclass(frozen=True)
class Export:
    """A bundle's folder with one variant."""

    folder: Path
    variant: Variant


@pytest.fixture(scope="session")
def plan_export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """With plans that the stand-in of TensorRT-RTX opens."""
    folder = tmp_path_factory.mktemp("plans")
    model = tiny.random_model()
    seen = decoder.survey(model)
    traced = decoder.trace(model, seen, "tensorrt", CAPACITY)
    sampler.append_choice(traced, tiny.VOCAB)
    graph.tidy(traced)
    graph.write(traced, folder)
    graph.write_whole(sampler.sampling_graph(tiny.VOCAB), folder / graph.SAMPLER)
    graph.write_whole(sampler.sampling_graph(tiny.VOCAB, adorned=True), folder / graph.ADORNED)
    layers = tuple(Layer(x.index, x.kv_heads, x.key_dim, x.value_dim) for x in seen.layers)
    plans.write_plan(folder / "model.plan", folder / graph.MODEL, [model_ranges(layers, profile) for profile in PROFILES])
    rows = max(profile.max_rows for profile in PROFILES)
    plans.write_plan(folder / "sampler.plan", folder / graph.SAMPLER, [sampler_ranges(rows)])
    plans.write_plan(folder / "adorned.plan", folder / graph.ADORNED, [sampler_ranges(rows) | adorned_ranges(rows)])
    plan = Plan(
        "tensorrt-rtx", plans.__version__, ("8.6", "8.9"), CAPACITY, PROFILES, False, graph.MODEL, graph.SAMPLER, graph.ADORNED
    )
    variant = Variant(
        name="tensorrt-rtx-fp32",
        target="tensorrt-rtx",
        precision="fp32",
        kv_dtype="float32",
        model="model.plan",
        files=(File("model.plan", "", 1000),),
        layers=layers,
        builder="the stand-in",
        sampler="sampler.plan",
        adorned="adorned.plan",
        plan=plan,
    )
    return Export(folder, variant)


@pytest.fixture(scope="session")
def cuda_export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """With the graphs for ONNX Runtime's CUDA provider."""
    folder = tmp_path_factory.mktemp("cuda")
    model = tiny.random_model()

    def silently(stage: str) -> AbstractContextManager[Stage]:
        return nullcontext(Stage(stage, tiny.Silent()))

    compiler = Compiler(model, decoder.survey(model), tiny.VOCAB, tiny.POSITIONS, folder, silently)
    with tiny.tracing_once():
        return Export(folder, compiler.compile(Build("cuda", "fp32"), folder))


Load = Callable[..., GpuEngine]


@pytest.fixture(autouse=True)
def _short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tiny model's slots have several."""
    monkeypatch.setattr(gpu, "LEAST_RANGE", 16)


@pytest.fixture
def load_plan(plan_export: Export, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads the plans on a device of its own, if no other is given."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", plans)

    def load(variant: Variant = plan_export.variant, *, device: HostDevice | None = None, **options: object) -> GpuEngine:
        arguments: dict[str, object] = {"slots": SLOTS, "cuda": device or HostDevice()} | options
        return trt.load(plan_export.folder, variant, tiny.VOCAB, **arguments)  # type: ignore[arg-type]

    return load


@pytest.fixture
def load_graph(cuda_export: Export, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads the graphs on a device of its own, if no other is given."""
    monkeypatch.setattr(ort_providers, "ort", sessions)

    def load(*, device: HostDevice | None = None, **options: object) -> GpuEngine:
        arguments: dict[str, object] = {"slots": SLOTS, "context": CONTEXT, "cuda": device or HostDevice()} | options
        return ort_cuda.load(cuda_export.folder, cuda_export.variant, tiny.VOCAB, **arguments)  # type: ignore[arg-type]

    return load


@pytest.fixture(params=["tensorrt-rtx", "onnxruntime"])
def load(request: pytest.FixtureRequest) -> Load:
    """Either."""
    chosen: Load = request.getfixturevalue("load_plan" if request.param == "tensorrt-rtx" else "load_graph")
    return chosen


@pytest.fixture(scope="session")
def reference(tiny_bundle: Path) -> Iterator[OrtEngine]:
    """The same model on the CPU, as users run it."""
    engine = ort.load(tiny_bundle, "cpu-fp32", slots=SLOTS, context=CONTEXT, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def greedy() -> Callable[[list[int], int], list[int]]:
    """transformers' own continuation of a prompt by so many tokens."""
    model: Any = tiny.random_model()
    memo: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def answer(prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt), count
        if key not in memo:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            memo[key] = out[0, len(prompt) :].tolist()
        return memo[key]

    return answer


def model_ranges(layers: tuple[Layer, ...], profile: Profile) -> dict[str, Range]:
    """The least and the largest dimensions of the model's inputs in `profile`."""
    batch, seq, rows = profile.max_batch, profile.max_seq, profile.max_rows
    ranges: dict[str, Range] = dict.fromkeys(("input_ids", "position_ids"), ((1, 1), (batch, seq)))
    ranges["kv_range"] = ((1,), (CAPACITY,))
    ranges |= dict.fromkeys(("logit_rows", "forced"), ((1,), (rows,)))
    for layer in layers:
        for part, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            fixed = (layer.kv_heads, CAPACITY, dim)
            ranges[f"past.{layer.index}.{part}"] = ((1, *fixed), (batch, *fixed))
    return ranges


def sampler_ranges(rows: int) -> dict[str, Range]:
    """The same of the sampler's."""
    ranges: dict[str, Range] = dict.fromkeys(sampler.INPUTS, ((1,), (rows,)))
    return ranges | {"logits": ((1, tiny.VOCAB), (rows, tiny.VOCAB))}


def adorned_ranges(rows: int) -> dict[str, Range]:
    """What the one that takes masks and adjustments has beside them."""
    ranges: dict[str, Range] = dict.fromkeys(sampler.ADJUSTMENTS, ((1, 1), (rows, most_adjusted(CAPACITY))))
    words = 4 * -(-tiny.VOCAB // 32)
    return ranges | {"mask": ((1, words), (rows, words))}
