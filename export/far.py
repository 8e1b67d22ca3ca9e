"""An engine's tokens in rows that are too long to be computed from their first token: over a past that was made up."""

import numpy as np
import torch
from transformers import PreTrainedModel

from export import positions
from export.positions import NEW, SHORT
from export.step import Survey
from export.verify import Agreement, judge
from runtime.engine import Batch, Draw, Int32, Int64
from runtime.ort import OrtEngine


@torch.no_grad()
def compare(engine: OrtEngine, model: PreTrainedModel, seen: Survey, length: int, tie: float) -> Agreement | None:
    """The engine's greedy tokens at the end of a row of `length` tokens, in a chunk and in a batch with a short row, judged by
    transformers' own over the same past; None where transformers does not decode `model` over one.

    Slots 0 and 1 of `engine` are overwritten. Raises EngineError.
    """
    prompts = positions.prompts_of(engine.vocab_size, length, seed=2)
    long, short = prompts
    shapes = {x.index: (2, x.kv_heads, length) for x in seen.layers}
    keys = {x.index: torch.zeros(*shapes[x.index], x.key_dim) for x in seen.layers}
    values = {x.index: torch.zeros(*shapes[x.index], x.value_dim) for x in seen.layers}
    for buffers in (keys, values):
        for buffer in buffers.values():
            buffer[1, :, :SHORT] = torch.randn(buffer[1, :, :SHORT].shape, generator=torch.Generator().manual_seed(0))
    own = positions.own_logits(model, seen, prompts, keys, values)
    if own is None:
        return None
    for layer in seen.layers:
        for part, buffers in (("key", keys), ("value", values)):
            engine.fill(0, f"{layer.index}.{part}", buffers[layer.index][0, :, : length - NEW].numpy())
    whole = np.array([length], np.int32)
    _step(engine, 1, short[None, :-1], [SHORT - 1], np.array([SHORT], np.int32))
    chunk = _step(engine, 0, long[None, -NEW:-1], [length - 1], whole, NEW - 1)
    ends = [length, SHORT]
    both = _step(engine, 0, torch.stack([long[-1:], short[-1:]]), ends, np.array(ends, np.int32), 2)
    return judge(own, torch.tensor([*chunk, *both]), tie)


def _step(engine: OrtEngine, slot: int, ids: torch.Tensor, ends: list[int], lengths: Int32, rows: int = 0) -> list[int]:
    chosen: Int64 = np.arange(rows, dtype=np.int64)
    batch = Batch(slot, ids.numpy(), np.array(ends, np.int32), chosen, Draw.greedy(rows), lengths)
    tokens: list[int] = engine.step(batch)[0].tolist()
    return tokens
