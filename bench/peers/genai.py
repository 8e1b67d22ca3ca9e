"""onnxruntime-genai: the folder that its own model builder wrote, prompts in one batch.

Its continuous-batching Engine runs on CUDA only; on the CPU a batch starts and ends together.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]

from bench.peers.driver import Seen, Setting, losses, perplexity, serve

SETTINGS = {
    "int4": "builder -p int4, algo_config=k_quant_last (asymmetric blocks of 32, 8-bit LM head), accuracy_level=4",
    "fp32": "builder -p fp32",
}


class Genai:
    """`Setting.name` is one of `SETTINGS`."""

    def __init__(self, setting: Setting) -> None:
        config = og.Config(setting.model)
        options = {"session_options": {"intra_op_num_threads": setting.threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = og.Model(config)
        self.note = f"onnxruntime-genai {version('onnxruntime-genai')}, {SETTINGS[setting.name]}"
        self.vocab = json.loads((Path(setting.model) / "genai_config.json").read_text())["model"]["vocab_size"]
        self.weights = (Path(setting.model) / "model.onnx.data").stat().st_size

    def run(self, prompts: list[list[int]], count: int, seen: Seen) -> None:
        """See `Driver.run`; `min_length` keeps the end-of-sequence token from being chosen."""
        length = len(prompts[0]) + count
        generator = self._generator(len(prompts), max_length=length, min_length=length)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            seen.add_each(generator.get_next_tokens())

    def perplexity(self, windows: list[list[int]]) -> float:
        """See `Driver.perplexity`."""
        found: list[float] = []
        for window in windows:
            generator = self._generator(1, max_length=len(window) + 1)
            generator.append_tokens(np.array([window], np.int32))
            found += losses(np.asarray(generator.get_output("logits"))[0, :-1], window[1:])
        return perplexity(found)

    def _generator(self, batch: int, **options: int) -> "og.Generator":
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, do_sample=False, **options)
        return og.Generator(self._model, parameters)


if __name__ == "__main__":
    serve(Genai)
