"""transformers' own fast way to decode: a static cache, and the model compiled into CUDA graphs."""

import time
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache


class Compiled:
    """Decode steps of `prompts` [batch, tokens] with a cache of `context` tokens, compiled by `warm_up`.

    The next token is chosen on the GPU and stays there, and nobody looks for an answer's end: `generate` does both at every
    step, so this is kinder to transformers than its users know it.
    """

    def __init__(self, model: PreTrainedModel, prompts: torch.Tensor, context: int, *, mode: str = "reduce-overhead") -> None:
        """Compute the prompts, not compiled. `mode` is `torch.compile`'s."""
        self._model, self.start = model, prompts.shape[1]
        self._cache: Any = StaticCache(config=model.config, max_cache_len=context)
        with torch.no_grad():
            output = model(input_ids=prompts, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._first = output.logits[:, -1].argmax(-1, keepdim=True)
        self._step: Any = torch.compile(self._decode, mode=mode, dynamic=False)

    def warm_up(self) -> None:
        """Compile, and run often enough that CUDA graphs are recorded."""
        self.decode(6)

    def decode(self, steps: int) -> float:
        """Seconds a step of `steps` steps, which begin behind the prompts."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self.start)
        begin_step: Any = torch.compiler.cudagraph_mark_step_begin
        torch.cuda.synchronize()
        tokens, begun = self._first, time.perf_counter()
        with torch.no_grad():
            for _ in range(steps):
                begin_step()
                tokens = self._step(tokens).clone()  # what a CUDA graph gave is overwritten by the next one
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / steps

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)


@torch.no_grad()
def first_token(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Seconds to the first token after `prompt` [1, tokens], not compiled."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
    return time.perf_counter() - begun
