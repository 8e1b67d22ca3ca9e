"""This runtime, driven as its peers are: an engine bundle through the decode loop that serves it."""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from bench.peers.driver import Seen, Setting, perplexity, serve
from runtime import bundle, ort
from runtime.engine import Batch, Draw
from runtime.loop import Loop
from runtime.messages import Generate

_CHUNK = 128
"""Tokens scored a step."""


class Own:
    """`Setting.model` is a bundle's folder, `Setting.name` one of its variants."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        folder = Path(setting.model)
        manifest = bundle.read(folder)
        variant = manifest.variant(setting.name)
        slots, context = setting.streams, setting.context
        self._engine = ort.start(folder, manifest, variant, slots=slots, context=context, threads=setting.threads)
        # Guessing tokens ahead pays by what is generated, and greedy answers to random prompts repeat themselves: no measure.
        self._loop = Loop(self._engine, queue=setting.streams, speculation=False)
        self.note = f"onnxruntime {version('onnxruntime')}, the decode loop without speculation"
        self.vocab = self._engine.vocab_size
        self.weights = variant.step_bytes or sum(file.size for file in variant.files if file.path != variant.model)

    def run(self, prompts: list[list[int]], count: int, seen: Seen) -> None:
        """See `Driver.run`."""
        for number, prompt in enumerate(prompts):
            refused = self._loop.submit(b"bench", Generate(str(number), prompt, max_tokens=count))
            if refused is not None:
                raise ValueError(refused.message)
        while self._loop.busy:
            for item in self._loop.step():
                if item.row.finish == "error":
                    raise RuntimeError(item.row.message)
                for token in item.row.tokens:
                    seen.add(int(item.row.id), token)

    def perplexity(self, windows: list[list[int]]) -> float:
        """See `Driver.perplexity`; through an engine of its own, as windows are longer than the bench's prompts."""
        setting = self._setting
        engine = ort.load(Path(setting.model), setting.name, slots=1, context=max(map(len, windows)), threads=setting.threads)
        found: list[float] = []
        for window in windows:
            for at in range(0, len(window), _CHUNK):
                ids = np.array(window[at : at + _CHUNK], np.int64)
                targets = np.array(window[at + 1 : at + 1 + _CHUNK], np.int64)
                end = np.array([at + len(ids)], np.int32)
                batch = Batch(0, ids[None], end, np.arange(len(targets), dtype=np.int64), Draw.force(targets))
                found += (-engine.step(batch)[1]).tolist()
        engine.close()
        return perplexity(found)


if __name__ == "__main__":
    serve(Own)
