"""openvino-genai: its ContinuousBatchingPipeline on the model that optimum-intel converted."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from bench.peers.driver import Seen, Setting, perplexity, serve

SETTINGS = {
    "int4": "optimum-intel int4, asymmetric groups of 32, embedding and LM head int8",
    "int8": "optimum-intel int8, asymmetric",
}
_CACHE_GIGABYTES = 1
"""Of keys and values; more than any setting of this bench fills with the default model."""


class OpenVino:
    """`Setting.name` is one of `SETTINGS`."""

    def __init__(self, setting: Setting) -> None:
        properties = {"INFERENCE_NUM_THREADS": setting.threads, "PERFORMANCE_HINT": "LATENCY"}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GIGABYTES
        scheduler.max_num_seqs = setting.streams
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(setting.model, scheduler, "CPU", properties)
        self.note = f"openvino-genai {version('openvino-genai')}, continuous batching, {SETTINGS[setting.name]}"
        self.vocab = _vocabulary(Path(setting.model))
        self.weights = (Path(setting.model) / "openvino_model.bin").stat().st_size
        self._asked = 0

    def run(self, prompts: list[list[int]], count: int, seen: Seen) -> None:
        """See `Driver.run`."""
        config = openvino_genai.GenerationConfig(max_new_tokens=count, do_sample=False, ignore_eos=True)
        handles = [self._ask(prompt, config) for prompt in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for stream, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            seen.add(stream, token)

    def perplexity(self, windows: list[list[int]]) -> float:
        """See `Driver.perplexity`; the pipeline echoes a prompt's log-probabilities."""
        config = openvino_genai.GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True, echo=True, logprobs=1)
        found: list[float] = []
        for window in windows:
            handle = self._ask(window, config)
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            (output,) = handle.read_all()
            found += [-logprob for logprob in output.generated_log_probs[1 : len(window)]]
        return perplexity(found)

    def _ask(self, prompt: list[int], config: "openvino_genai.GenerationConfig") -> Any:
        self._asked += 1
        return self._pipeline.add_request(self._asked, ov.Tensor(np.array([prompt], np.int64)), config)


def _vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


if __name__ == "__main__":
    serve(OpenVino)
