"""llama.cpp: the batch API of llama-cpp-python, one sequence a stream."""

import ctypes
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np
import numpy.typing as npt

from bench.peers.driver import Seen, Setting, losses, perplexity, serve

_BATCH = 2048
"""Tokens handed over at once, as llama-server does: the prompts of all streams, then a token of each."""


class Llama:
    """`Setting.model` is a GGUF file, `Setting.name` its quantization."""

    def __init__(self, setting: Setting) -> None:
        llama.llama_backend_init()
        self._setting = setting
        self._model = llama.llama_model_load_from_file(setting.model.encode(), llama.llama_model_default_params())
        if self._model is None:
            raise RuntimeError(f"llama.cpp cannot load {setting.model}")
        self._context = self._new_context(setting.streams, setting.context)
        self.note = f"llama-cpp-python {llama.__version__}, built for this processor, {setting.name}, keys and values in fp16"
        self.vocab = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        self.weights = int(llama.llama_model_size(self._model))
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)

    def run(self, prompts: list[list[int]], count: int, seen: Seen) -> None:
        """See `Driver.run`."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        tokens = self._prefill(prompts)
        seen.add_each(tokens)
        length = len(prompts[0])
        streams = np.arange(len(prompts))
        for step in range(1, count):
            position = np.full(len(prompts), length + step - 1)
            logits = self._decode(self._context, tokens, position, streams, streams == streams)
            tokens = logits.argmax(1)
            seen.add_each(tokens)

    def perplexity(self, windows: list[list[int]]) -> float:
        """See `Driver.perplexity`; through a context of its own, as windows are longer than the bench's prompts."""
        context = self._new_context(1, max(map(len, windows)), every_logit=True)
        found: list[float] = []
        for window in windows:
            llama.llama_memory_clear(llama.llama_get_memory(context), False)
            for at in range(0, len(window), 256):
                ids = np.array(window[at : at + 256])
                positions = np.arange(at, at + len(ids))
                logits = self._decode(context, ids, positions, np.zeros_like(ids), np.ones_like(ids))
                targets = window[at + 1 : at + 257]
                found += losses(logits[: len(targets)], targets)
        llama.llama_free(context)
        return perplexity(found)

    def _new_context(self, streams: int, length: int, every_logit: bool = False) -> Any:
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = streams * length
        parameters.n_batch = _BATCH
        parameters.n_seq_max = streams
        if every_logit:
            parameters.n_outputs_max_per_seq = _BATCH
        parameters.n_threads = parameters.n_threads_batch = self._setting.threads
        context = llama.llama_init_from_model(self._model, parameters)
        if context is None:
            raise RuntimeError(f"llama.cpp cannot make a context of {streams} x {length} tokens")
        return context

    def _prefill(self, prompts: list[list[int]]) -> npt.NDArray[np.int64]:
        """Every prompt's first token, computed for as many prompts at once as fit a batch."""
        together = max(1, _BATCH // len(prompts[0]))
        firsts = []
        for start in range(0, len(prompts), together):
            part = prompts[start : start + together]
            length = len(part[0])
            positions = np.tile(np.arange(length), len(part))
            streams = np.repeat(np.arange(start, start + len(part)), length)
            firsts.append(
                self._decode(self._context, np.concatenate(part), positions, streams, positions == length - 1).argmax(1)
            )
        return np.concatenate(firsts)

    def _decode(
        self, context: Any, tokens: npt.ArrayLike, positions: npt.ArrayLike, streams: npt.ArrayLike, wanted: npt.ArrayLike
    ) -> npt.NDArray[np.float32]:
        """One llama_decode; the logits [rows, vocab] of the wanted tokens, valid until the next."""
        count = len(np.asarray(tokens))
        np.ctypeslib.as_array(self._batch.token, (count,))[:] = tokens
        np.ctypeslib.as_array(self._batch.pos, (count,))[:] = positions
        np.ctypeslib.as_array(self._batch.n_seq_id, (count,))[:] = 1
        np.ctypeslib.as_array(self._batch.logits, (count,))[:] = wanted
        for i, stream in enumerate(np.asarray(streams).tolist()):
            self._batch.seq_id[i][0] = stream
        self._batch.n_tokens = count
        status = llama.llama_decode(context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status} for {count} tokens")
        rows = int(np.count_nonzero(wanted))
        pointer = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (rows, self.vocab))


if __name__ == "__main__":
    serve(Llama)
