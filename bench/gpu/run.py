"""One run of the GPU bench, part by part; a part that fails or finds no time is named, and the others go on."""

import logging
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from bench.gpu import clock, machine, models
from bench.gpu.clock import WatchedCuda
from bench.gpu.compiled import Compiled, first_token
from bench.gpu.measure import Decode, Failure, FirstToken, Report, Tokens
from export import verify
from export.decoder import Survey
from runtime import ort_cuda
from runtime.engine import Int64
from runtime.gpu import GpuEngine

BATCHES = (1, 8, 64)
START, STEPS = 480, 64
"""Tokens in each slot when decoding begins, and decode steps a round: 512 tokens on average."""
PROMPTS = (128, 2048)
ROUNDS = 9
ANSWER = 64
"""Greedy tokens a prompt that are compared."""
RAGGED = (5, 33, 120, 301)
"""Lengths of the prompts whose answers are compared."""
_DTYPE, _PRECISION = torch.float16, "fp16"
_CAPTURES = 5
"""Steps of a shape before it is timed, in which its work is recorded."""
_RESERVE = 60.0
"""Seconds that the rounds and the report are left with."""
_LONGEST_FILL = 30.0
"""Seconds that filling an engine's slots may take."""
_GUESS = {"compile": 45.0, "explicit": 90.0}
"""Seconds that a part takes on a slow day; it is not begun where fewer are left."""

_Result = TypeVar("_Result")
_Written = tuple[models.Graphs, Path]


class LeftOut(Exception):
    """A part is not begun; the message says why."""


@dataclass
class Ours:
    """A loaded engine of ours."""

    what: str
    graphs: models.Graphs
    folder: Path
    engine: GpuEngine
    cuda: WatchedCuda
    last: Int64
    """The first token of each slot's answer."""


class Bench:
    """A run that is over after `seconds`, so far as that lies in its hands."""

    def __init__(self, report: Report, seconds: float, layers: int, folder: Path) -> None:
        """Build a model of `layers` layers, and its graphs in `folder`."""
        self.report, self._layers, self._folder = report, layers, folder
        self._begun, self._deadline = time.perf_counter(), time.perf_counter() + seconds
        chance = np.random.default_rng(0)
        self._vocab = models.llama_1b(layers).vocab_size
        self._prompts: Int64 = chance.integers(0, self._vocab, (max(BATCHES), max(PROMPTS)))
        self._ours: list[Ours] = []
        self._compiled: dict[int, Compiled] = {}

    def run(self) -> None:
        """Measure everything there is time for, into `report`."""
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.report.notes.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("runtime").addHandler(handler)
        self.report.bandwidth = self._part("the memory's bandwidth", machine.bandwidth)
        model = self._part(f"drawing a model of {self._layers} layers", self._draw)
        if model is not None:
            with ExitStack() as stack:
                self._measure(model, stack)
        self.report.seconds = time.perf_counter() - self._begun

    def _measure(self, model: PreTrainedModel, stack: ExitStack) -> None:
        self._model = models.on_gpu(model)
        stack.callback(self._close)
        seen = self._part("watching it run in float32", lambda: models.survey(model))
        quantized: Future[_Written] | None = None
        began = time.perf_counter()
        if seen is not None:
            traced = self._part("tracing its step", lambda: models.trace(model, seen))
            if traced is not None:
                # A clone, because writing changes the graph; numpy's part of it leaves the interpreter to others.
                clone = traced.clone()
                self._part("ours: fp16", lambda: self._open("ours fp16", self._write(traced, seen, "fp16")))
                quantized = _in_background(partial(self._write, clone, seen, "int4"))
        export_seconds = time.perf_counter() - began
        for batch in BATCHES:
            self._part(f"transformers: compiling for batch {batch}", partial(self._compile, batch), _GUESS["compile"])
        if seen is not None:
            needed = max(export_seconds, _GUESS["explicit"])
            self._part("ours: fp16 with TensorScatter and Attention", lambda: self._open_explicit(model, seen), needed)
        if quantized is not None:
            self._part("ours: int4", partial(self._open_int4, quantized))
        self._part("decoding, in rounds", self._decode, needed=None)
        self._part("first tokens", self._first_tokens, needed=None)

    # Parts ---------------------------------------------------------------------------------------------------------

    def _draw(self) -> PreTrainedModel:
        config = models.llama_1b(self._layers)
        return models.random_model(config, _DTYPE, spread=config.hidden_size**-0.5, device="cuda")

    def _write(self, traced: Any, seen: Survey, name: str) -> _Written:
        folder = self._folder / name
        return models.write(traced, seen, folder, dtype=_DTYPE, vocab=self._vocab, int4=name == "int4"), folder

    def _open(self, what: str, written: _Written) -> None:
        """Load an engine, compare its tokens and fill its slots."""
        graphs, folder = written
        engine, cuda = self._load(graphs, folder, max(BATCHES), START + 2 * STEPS)
        ours = Ours(what, graphs, folder, engine, cuda, np.zeros(0, np.int64))
        self._ours.append(ours)
        self._compare(ours)
        begun = time.perf_counter()
        clock.prefill(engine, 0, self._prompts[0, :START])
        if (taken := time.perf_counter() - begun) * max(BATCHES) > _LONGEST_FILL:  # as where a provider leaves work to the CPU
            raise LeftOut(f"a prompt of {START} tokens takes {taken:.2f} s, so {max(BATCHES)} of them too long")
        ours.last = np.array([clock.prefill(engine, slot, prompt[:START]) for slot, prompt in enumerate(self._prompts)])

    def _open_int4(self, quantized: "Future[_Written]") -> None:
        left = self._deadline - time.perf_counter() - _RESERVE
        try:
            written = quantized.result(timeout=max(left, 1.0))
        except TimeoutError as error:
            raise LeftOut(
                "quantizing was not done in time, and went on beside what was measured; give it more --seconds"
            ) from error
        self._open("ours int4", written)

    def _open_explicit(self, model: PreTrainedModel, seen: Survey) -> None:
        traced = models.trace(model, seen, "tensorrt")
        self._open("ours fp16, explicit", self._write(traced, seen, "explicit"))

    def _compare(self, ours: Ours) -> None:
        prompts = [prompt[:length].tolist() for prompt, length in zip(self._prompts, RAGGED, strict=False)]
        answers = verify.continue_prompts(ours.engine, prompts, ANSWER, ours.engine.chunk)
        found = models.judge(self._model, prompts, answers, verify.TIES[_PRECISION])
        distinct = len({token for answer in answers for token in answer})
        tokens = Tokens(ours.what, found.compared, found.equal, found.ties, distinct, found.first)
        self.report.tokens.append(tokens)
        self._say(f"  {tokens.equal} of {tokens.compared} greedy tokens are transformers', {tokens.ties} tied; {tokens.first}")

    def _compile(self, batch: int) -> None:
        prompts = torch.from_numpy(self._prompts[:batch, :START]).to("cuda")
        compiled = Compiled(self._model, prompts, START + 2 * STEPS)
        compiled.warm_up()
        self._compiled[batch] = compiled

    def _decode(self) -> None:
        """In turns, so that what changes meanwhile changes for all."""
        if not self._compiled and not any(len(ours.last) for ours in self._ours):
            raise LeftOut("nothing is loaded that could decode")
        figures = {(ours.what, batch): self._figure(ours, batch) for ours in self._ours if len(ours.last) for batch in BATCHES}
        self.report.decode.extend(figures.values())
        theirs = {batch: Decode("transformers, compiled", batch, START + STEPS / 2) for batch in self._compiled}
        self.report.decode.extend(theirs.values())
        for number in range(ROUNDS):
            if number and time.perf_counter() > self._deadline - _RESERVE / 2:
                self.report.notes.append(f"{number} rounds of {ROUNDS}: --seconds were over")
                break
            for batch in BATCHES:
                for ours in self._ours:
                    if (ours.what, batch) in figures:
                        self._round(ours, figures[ours.what, batch], first=number == 0)
                if batch in theirs:
                    theirs[batch].steps.append(self._compiled[batch].decode(STEPS))
            self._say(f"  round {number + 1} of {ROUNDS}")

    def _figure(self, ours: Ours, batch: int) -> Decode:
        tokens = START + (STEPS + 1) / 2
        read = ours.graphs.step_bytes + int(batch * tokens * ours.graphs.kv_bytes_per_token)
        return Decode(ours.what, batch, tokens, read)

    def _round(self, ours: Ours, figure: Decode, *, first: bool) -> None:
        last = ours.last[: figure.batch]
        if first:
            clock.decode(ours.engine, ours.cuda, last, START, _CAPTURES, ahead=True)
        timed = clock.decode(ours.engine, ours.cuda, last, START, STEPS, ahead=True)
        figure.steps.append(timed.step)
        figure.host.append(timed.host)
        figure.alone.append(clock.decode(ours.engine, ours.cuda, last, START, STEPS, ahead=False).step)
        # In the middle of what was timed, whose attention is that of an average step.
        figure.gpu.extend(clock.gpu_seconds(ours.engine, ours.cuda, last, START + STEPS // 2))

    def _first_tokens(self) -> None:
        opened = [ours for ours in self._ours if len(ours.last) and ours.what != "ours fp16, explicit"]
        self._close()
        for ours in opened:
            with self._alone(ours) as engine:
                for prompt in PROMPTS:
                    figure = FirstToken(ours.what, prompt)
                    self.report.first_tokens.append(figure)
                    for number in range(ROUNDS):
                        begun = time.perf_counter()
                        clock.prefill(engine, 0, self._prompts[number, :prompt])
                        figure.seconds.append(time.perf_counter() - begun)
                    del figure.seconds[:2]  # in which libraries choose their kernels
        for prompt in PROMPTS:
            theirs = FirstToken("transformers, not compiled", prompt)
            self.report.first_tokens.append(theirs)
            for number in range(ROUNDS):
                ids = torch.from_numpy(self._prompts[number : number + 1, :prompt]).to("cuda")
                theirs.seconds.append(first_token(self._model, ids))
            del theirs.seconds[:2]

    # Engines -------------------------------------------------------------------------------------------------------

    def _load(self, graphs: models.Graphs, folder: Path, slots: int, context: int) -> tuple[GpuEngine, WatchedCuda]:
        torch.cuda.empty_cache()
        cuda = WatchedCuda()
        variant: Any = graphs
        try:
            return ort_cuda.load(folder, variant, self._vocab, slots=slots, context=context, cuda=cuda), cuda
        except Exception:
            cuda.close()
            raise

    @contextmanager
    def _alone(self, ours: Ours) -> Iterator[GpuEngine]:
        """The same graphs with one slot for the longest prompt."""
        engine, _ = self._load(ours.graphs, ours.folder, 1, max(PROMPTS) + 1)
        try:
            yield engine
        finally:
            engine.close()

    def _close(self) -> None:
        while self._ours:
            self._ours.pop().engine.close()

    # Time ----------------------------------------------------------------------------------------------------------

    def _part(self, name: str, work: Callable[[], _Result], needed: float | None = 0.0) -> _Result | None:
        """What `work` gives; None where it fails, or where fewer than the `needed` seconds are left.

        Where nothing says how many are `needed` it begins in any case.
        """
        left = self._deadline - time.perf_counter() - _RESERVE
        if needed is not None and needed > left:
            self._fail(name, f"left out: it may take {needed:.0f} s, and --seconds had {max(left, 0):.0f} s to spare")
            return None
        self._say(name)
        try:
            return work()
        except Exception as error:  # whatever stops one part says nothing of the others
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            self._fail(name, f"{type(error).__name__}: {error}")
            return None

    def _fail(self, name: str, reason: str) -> None:
        self.report.failures.append(Failure(name, reason))
        self._say(f"  {name}: {reason}")

    def _say(self, text: str) -> None:
        print(f"{time.perf_counter() - self._begun:5.0f} s  {text}", flush=True)


def run(report: Report, seconds: float, layers: int) -> None:
    """Fill `report`. The model's graphs, 6 GB, lie in a new folder of the system's own for such files meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="engineshed-"))
    try:
        Bench(report, seconds, layers, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_background(work: Callable[[], _Result]) -> "Future[_Result]":
    """Do `work` in a thread that does not keep the process from ending."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # whoever waits for the result is told
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
