"""A plan of TensorRT-RTX on the GPU: built for it where the builder knows its architecture, and run by runtime.trt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.gpu import models
from export import graph
from export.verify import continue_prompts
from runtime import trt
from runtime.cuda import Cuda
from runtime.engine import EngineError
from runtime.gpu import GpuEngine

if TYPE_CHECKING:
    from tests.gpu.conftest import Exported, Exporter

VOCAB = 512
SLOTS, CAPACITY, CHUNK, ROWS = 6, 192, 64, 64
COUNT = 24
ELSEWHERE = "8.9"
"""An architecture that the builder knows, for a plan that this GPU is to refuse where the builder does not know its own."""


@pytest.fixture(scope="module")
def builder() -> Any:
    """TensorRT-RTX's builder."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    tensorrt = pytest.importorskip("export.tensorrt", reason="building plans needs: pip install msgspec psutil")
    return tensorrt.Builder("tensorrt-rtx")


def build(builder: Any, exported: "Exported", folder: Path, capability: str) -> Any:
    """What stands for the variant: plans of the model's step in TensorRT's dialect, and of the sampler."""
    from runtime.bundle import Plan, Profile  # which need msgspec, as the builder does

    traced = models.trace(exported.model, exported.seen, "tensorrt", CAPACITY)
    dtype = exported.model.dtype
    graphs = models.write(traced, exported.seen, folder, dtype=dtype, vocab=VOCAB, target="tensorrt-rtx")
    profiles = (Profile(SLOTS, 1, SLOTS), Profile(1, CHUNK, ROWS))
    builder.build(folder / graph.MODEL, folder / "model.plan", profiles, (capability,), capacity=CAPACITY)
    for source, made in ((graph.SAMPLER, "sampler.plan"), (graph.ADORNED, "adorned.plan")):
        builder.build(folder / source, folder / made, (Profile(1, 1, ROWS),), (capability,), capacity=CAPACITY)
    plan: Any = Plan(
        builder="tensorrt-rtx",
        version=builder.version,
        compute_capabilities=(capability,),
        capacity=CAPACITY,
        profiles=profiles,
        stripped=False,
        source=graph.MODEL,
        sampler_source=graph.SAMPLER,
        adorned_source=graph.ADORNED,
    )
    return replace(graphs, model="model.plan", sampler="sampler.plan", adorned="adorned.plan", plan=plan)


@pytest.fixture(scope="module", params=["llama", "sliding"])
def engine(
    builder: Any, export: "Exporter", request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple["Exported", GpuEngine]]:
    """The engine of a plan that was built for this GPU, in fp16."""
    exported, cuda = export(request.param, "fp16"), Cuda()
    if cuda.compute_capability not in builder.known:
        cuda.close()
        pytest.skip(
            f"{builder} builds no plan for compute capability {cuda.compute_capability}, only {', '.join(builder.known)}"
        )
    folder = tmp_path_factory.mktemp(request.param) / "plan"
    variant = build(builder, exported, folder, cuda.compute_capability)
    loaded = trt.load(folder, variant, VOCAB, slots=SLOTS, cuda=cuda)
    yield exported, loaded
    loaded.close()


def test_greedy_tokens(engine: tuple["Exported", GpuEngine], prompts: list[list[int]]) -> None:
    exported, running = engine
    exported.check(prompts, continue_prompts(running, prompts, COUNT, CHUNK))
    exported.check(prompts[:3], continue_prompts(running, prompts[:3], COUNT, chunk=7))
    for prompt in prompts:
        exported.check([prompt], continue_prompts(running, [prompt], COUNT, CHUNK))


def test_what_the_library_says_of_a_plan_for_other_gpus(
    builder: Any, export: "Exporter", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from msgspec import structs

    exported, cuda = export("llama", "fp16"), Cuda()
    here = cuda.compute_capability
    other = next(capability for capability in builder.known if capability != here)
    variant = build(builder, exported, tmp_path / "plan", ELSEWHERE if here != ELSEWHERE else other)
    claimed = replace(variant, plan=structs.replace(variant.plan, compute_capabilities=(here,)))
    said = {}
    for name, tried in (("by its manifest", variant), ("by the library", claimed)):
        try:
            trt.load(tmp_path / "plan", tried, VOCAB, slots=SLOTS, cuda=cuda).close()
            said[name] = "nothing: it runs"
        except EngineError as refusal:
            said[name] = str(refusal)
    cuda.close()
    with capsys.disabled():
        known = "knows" if here in builder.known else "does not know"
        print(f"\n{builder} {known} this GPU's compute capability {here}. Of a plan for another:")
        print("\n".join(f"  {name}: {text}" for name, text in said.items()))
    assert said["by its manifest"].startswith(f"variant {variant.name!r} was built for GPUs of compute capability")
