"""What an engine takes of the GPU's memory, and what it says when there is too little."""

from typing import TYPE_CHECKING

import pytest
import torch

from export.verify import continue_prompts
from runtime.cuda import Cuda
from runtime.engine import EngineError

if TYPE_CHECKING:
    from tests.gpu.conftest import Exporter

SLACK = 256 << 20
"""Bytes that CUDA's libraries take for handles and kernels, out of no allocator's hands."""


def test_slots_beyond_the_limit_are_refused_with_the_sum(export: "Exporter") -> None:
    exported, cuda = export("llama", "fp16"), Cuda(limit=64 << 20)
    with pytest.raises(
        EngineError, match=r"4096 slots of 512 tokens of 256 bytes needs 512 MiB; of the 64 MiB .* 64 MiB are left"
    ):
        exported.load(cuda, slots=4096, context=500)
    cuda.close()


def test_slots_beyond_the_gpu_are_refused_with_the_sum_and_a_smaller_engine_runs(export: "Exporter") -> None:
    exported, cuda = export("llama", "fp16"), Cuda(limit=1 << 50)
    per_slot = 512 * 256
    slots = cuda.free // per_slot + 1024
    with pytest.raises(EngineError, match=rf"{slots} slots of 512 tokens of 256 bytes needs \d+ MiB .* \d+ MiB are free"):
        exported.load(cuda, slots=slots, context=500)
    cuda.close()
    engine = exported.load(Cuda())
    assert len(continue_prompts(engine, [[1, 2, 3]], 4)[0]) == 4
    engine.close()


def test_the_limit_is_kept_to(export: "Exporter") -> None:
    exported, limit = export("llama", "fp16"), 512 << 20
    prompts = [[1, 2, 3], list(range(100)), [5] * 40]
    engine = exported.load(Cuda(limit))
    continue_prompts(engine, prompts, 8)  # kernels and libraries are loaded now, which count for no engine
    engine.close()
    torch.cuda.empty_cache()
    cuda = Cuda(limit)
    free = cuda.free
    engine = exported.load(cuda)
    continue_prompts(engine, prompts, 8)
    assert 0 < cuda.taken <= limit
    assert free - cuda.free <= limit + SLACK
    engine.close()
