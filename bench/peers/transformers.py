"""transformers: `generate` in float32 with PyTorch's fused attention, prompts in one batch."""

from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.peers.driver import Seen, Setting, losses, perplexity, serve


class _Told(BaseStreamer):  # type: ignore[misc,unused-ignore]
    """Passes each step's tokens on to a `Seen`; the prompts, which `generate` gives first, it leaves out."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._prompts_to_come = True

    def put(self, value: torch.Tensor) -> None:
        """`value` is [batch, seq] for the prompts, [batch] for a step."""
        if self._prompts_to_come:
            self._prompts_to_come = False
        else:
            self._seen.add_each(value.flatten().tolist())

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    """`Setting.model` is a Hugging Face folder."""

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            setting.model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None
        self.note = f"transformers {version('transformers')}, torch {torch.__version__}, float32, generate, sdpa"
        self.vocab = int(self._model.config.vocab_size)
        self.weights = sum(weight.numel() * weight.element_size() for weight in self._model.parameters())

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], count: int, seen: Seen) -> None:
        """See `Driver.run`."""
        ids = torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            streamer=_Told(seen),
            pad_token_id=0,
        )

    @torch.inference_mode()
    def perplexity(self, windows: list[list[int]]) -> float:
        """See `Driver.perplexity`."""
        found: list[float] = []
        for window in windows:
            logits = self._model(input_ids=torch.tensor([window]), use_cache=False).logits[0, :-1]
            found += losses(logits.numpy(), window[1:])
        return perplexity(found)


if __name__ == "__main__":
    serve(Transformers)
