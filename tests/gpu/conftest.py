"""Tests on a real NVIDIA GPU, of tiny random models in every precision; a machine without one skips them all.

They import nothing that a bare Python with torch, transformers, onnx and onnxruntime-gpu lacks.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from bench.gpu import machine, models
from export import verify
from export.decoder import Survey
from runtime import ort_cuda
from runtime.cuda import Cuda
from runtime.engine import EngineError
from runtime.gpu import GpuEngine

VOCAB = 512
WINDOW = 24
SLOTS, CONTEXT = 6, 160
LENGTHS = (3, 17, 40, 65, 29, 50)
"""Of the prompts, one for each slot: some shorter than the sliding window, some longer."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int4": torch.float16}
TIES = verify.TIES | {"int4": 1e-2}
"""As in `export.verify`; products in 4 bits sum in another order, and their scales are rounded."""

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "sliding": MistralConfig(**_LLAMA, sliding_window=WINDOW),
    # ALiBi is no mask that GroupQueryAttention knows: TensorScatter, and the model's own attention.
    "explicit": BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, pad_token_id=None),
}
CASES = [(family, precision) for family in CONFIGS for precision in DTYPES if (family, precision) != ("explicit", "int4")]


@dataclass(frozen=True)
class Exported:
    """A model on the CPU, and its graphs."""

    family: str
    precision: str
    model: PreTrainedModel
    seen: Survey
    folder: Path
    graphs: Any
    """A `bench.gpu.models.Graphs`, which is what the engine asks of a variant."""

    def load(self, cuda: Cuda, *, slots: int = SLOTS, context: int = CONTEXT) -> GpuEngine:
        """The engine, which owns `cuda`."""
        return ort_cuda.load(self.folder, self.graphs, VOCAB, slots=slots, context=context, cuda=cuda)

    @cached_property
    def on_gpu(self) -> PreTrainedModel:
        """The model as transformers runs it on the GPU."""
        return models.on_gpu(self.model)

    def check(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        """Fail unless every token is transformers' own after what stands before it, or tied with it."""
        found = models.judge(self.on_gpu, prompts, answers, TIES[self.precision])
        assert found.compared == sum(map(len, answers))
        assert not found.different, f"{found.different} of {found.compared} tokens differ, first {found.first}"
        assert found.ties <= found.compared // 4, f"{found.ties} of {found.compared} tokens are only tied"


@dataclass(frozen=True)
class Loaded:
    """An engine, and what it was made of."""

    exported: Exported
    engine: GpuEngine
    prompts: list[list[int]]
    """Random ones, of `LENGTHS`."""
    warnings: list[str]
    """What was logged while the engine was loaded."""

    def check(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        """See `Exported.check`."""
        self.exported.check(prompts, answers)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip everything here, for one reason, where there is no GPU."""
    if reason := machine.why_not():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=f"these tests need an NVIDIA GPU: {reason}"))


class Exporter:
    """Exports each case once; the precisions of a family share what they can."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._traced: dict[tuple[str, torch.dtype], tuple[PreTrainedModel, Survey, Any]] = {}
        self._exported: dict[tuple[str, str], Exported] = {}

    def __call__(self, family: str, precision: str) -> Exported:
        if (family, precision) not in self._exported:
            self._exported[family, precision] = self._export(family, precision)
        return self._exported[family, precision]

    def _export(self, family: str, precision: str) -> Exported:
        dtype = DTYPES[precision]
        if (family, dtype) not in self._traced:
            model = models.random_model(CONFIGS[family], dtype, spread=64**-0.5)
            seen = models.survey(model)
            self._traced[family, dtype] = (model, seen, models.trace(model, seen))
        model, seen, traced = self._traced[family, dtype]
        folder = self._folder / f"{family}-{precision}"
        graphs = models.write(traced.clone(), seen, folder, dtype=dtype, vocab=VOCAB, int4=precision == "int4")
        return Exported(family, precision, model, seen, folder, graphs)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Exports a family in a precision."""
    return Exporter(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Random ones, of `LENGTHS`."""
    chance = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB, (length,), generator=chance).tolist() for length in LENGTHS]


@pytest.fixture(scope="session", params=CASES, ids="-".join)
def loaded(export: Exporter, prompts: list[list[int]], request: pytest.FixtureRequest) -> Iterator[Loaded]:
    """The engine of each case in turn."""
    exported = export(*request.param)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("runtime").addHandler(handler)
    cuda = Cuda()
    try:
        engine = exported.load(cuda)
    except EngineError as error:
        cuda.close()
        if exported.family == "explicit":
            pytest.xfail(f"ONNX Runtime does not take explicit attention on CUDA: {error}")
        raise
    finally:
        logging.getLogger("runtime").removeHandler(handler)
    yield Loaded(exported, engine, prompts, warnings)
    engine.close()
