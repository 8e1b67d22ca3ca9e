"""Engines in processes of their own, ours and its peers': loaded all at once, measured in turns."""

import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO, Any

from bench.machine import Others
from bench.measure import Ratio, Result
from bench.peers.catalog import Peer
from runtime.bundle import Bundle, Variant

_LAST_WORDS = 800
"""Characters of what a process said last that an error shows."""
_STOP_SECONDS = 10.0
_PAUSE_SECONDS = 0.05
"""Between two turns: threads that wait actively after a step have gone to sleep by then."""
_EARLIEST = 100
"""Prompts' least token id; special tokens lie below in most vocabularies."""


class DriverError(Exception):
    """An engine's process failed; the message says whose and how."""


@dataclass(frozen=True)
class Load:
    """What every engine is asked."""

    streams: tuple[int, ...]
    """Prompts that run together, one measurement each."""
    prompt_tokens: int
    tokens: int
    repeats: int
    threads: int

    def prompts(self, streams: int, repeat: int, vocab: int) -> list[list[int]]:
        """Random ones, the same for every engine and new in every repeat, so that none can have seen them."""
        chance = random.Random(f"{streams} {repeat}")
        least = _EARLIEST if vocab > 2 * _EARLIEST else 0
        return [[chance.randrange(least, vocab) for _ in range(self.prompt_tokens)] for _ in range(streams)]


class Process:
    """A driver's process, from its start; see bench/peers/driver.py for what is said to it."""

    def __init__(self, peer: Peer, load: Load) -> None:
        setting = {
            "model": str(peer.model),
            "name": peer.name,
            "streams": max(load.streams),
            "context": load.prompt_tokens + load.tokens,
            "threads": load.threads,
        }
        self.peer = peer
        self.begun = time.perf_counter()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        try:
            self._process = subprocess.Popen(
                [peer.python, "-m", peer.module, json.dumps(setting)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=_environment(load.threads),
                start_new_session=True,  # Ctrl-C reaches the bench alone, which ends its processes in order
            )
        except OSError as error:
            self._log.close()
            raise DriverError(f"{peer.what} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def hear(self) -> dict[str, Any]:
        """The process's next line. Raises DriverError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError:
            raise DriverError(f"{self.peer.what} ended too early; the last it said:\n{self._last_words()}") from None
        if "error" in reply:
            raise DriverError(f"{self.peer.what} failed: {reply['error']}")
        return reply

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """The answer to a request. Raises DriverError."""
        assert self._process.stdin is not None
        with suppress(OSError):  # where it has ended, what it said last is the better error
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        """Ask the process to end, and end it."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()  # the end of its input is the end of a driver
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # it lives, and said something that is no JSON
            self._process.wait(_STOP_SECONDS)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()
        return said[-_LAST_WORDS:] or f"nothing (exit status {self._process.returncode})"


@dataclass
class Run:
    """One turn: the times of every stream's tokens, in seconds after the prompts were handed over."""

    times: list[list[float]]

    @property
    def first_tokens(self) -> list[float]:
        """A time a stream."""
        return [stream[0] for stream in self.times]

    @property
    def inter_tokens(self) -> list[float]:
        """Times between neighbouring tokens of a stream."""
        return [later - earlier for stream in self.times for earlier, later in pairwise(stream)]

    @property
    def rate(self) -> float:
        """Tokens a second over all streams, prefill included."""
        return sum(map(len, self.times)) / max(stream[-1] for stream in self.times)

    @property
    def figures(self) -> dict[str, float]:
        """What ratios are made of."""
        return {"TTFT p50": median(self.first_tokens), "ITL p50": median(self.inter_tokens), "tokens/s": self.rate}


@dataclass
class Measured:
    """An engine and what it has given so far."""

    process: Process
    note: str
    weights: int
    start_seconds: float
    runs: dict[int, list[Run]] = field(default_factory=dict)
    """By the number of streams."""
    rss: int | None = None
    perplexity: float | None = None

    @property
    def peer(self) -> Peer:
        """Whose figures these are."""
        return self.process.peer


def measure(
    own: Sequence[Peer], peers: Sequence[Peer], load: Load, vocab: int, windows: list[list[int]], say: Callable[[str], None]
) -> tuple[list[Result], list[Ratio], float]:
    """Every engine under every load, in turns within a repeat, so that a drift of the machine's speed meets all of them alike.

    A peer that fails is told of through `say` and left out. `windows` are the texts of perplexity, in tokens; none are scored
    where it is empty. The last of what is returned is the share of all cores' time that other processes took meanwhile.

    Raises DriverError where one of `own` fails.
    """
    with ExitStack() as stack:
        engines: list[Measured] = []
        for peer in (*own, *peers):
            with _tolerated(peer in own, say):
                process = Process(peer, load)
                stack.callback(process.close)
                engines.append(_started(process, load, vocab))
        others = Others([os.getpid(), *(engine.process.pid for engine in engines)])
        for repeat in range(-1, load.repeats):  # the first round only warms up
            for streams in load.streams:
                prompts = load.prompts(streams, repeat, vocab)
                for engine in _in_turn(engines, repeat):
                    with _tolerated(engine.peer in own, say, engines, engine):
                        run = _run(engine.process, prompts, load.tokens)
                        if repeat >= 0:
                            engine.runs.setdefault(streams, []).append(run)
                        time.sleep(_PAUSE_SECONDS)
        taken = others.share()
        for engine in list(engines):
            with _tolerated(engine.peer in own, say, engines, engine):
                engine.rss = engine.process.ask("rss")["rss"]
                if windows:
                    engine.perplexity = engine.process.ask("perplexity", windows=windows)["perplexity"]
    results = [_result(engine, streams, load) for streams in load.streams for engine in engines]
    return results, _ratios(engines, set(own), load), taken


def variants(manifest: Bundle, names: Sequence[str] | None) -> list[Variant]:
    """The bundle's variants called `names`, or all that run on a CPU. Raises BundleError."""
    return [manifest.variant(name) for name in names or [v.name for v in manifest.variants if v.target == "cpu"]]


def parameters(folder: Path, manifest: Bundle) -> int | None:
    """The weights that a prompt's token is multiplied with: all products but the LM head, which only the last token meets.

    None where onnx, which `engineshed[export]` brings, is not installed. In a quantized graph those of a step
    of many tokens are counted, which carry no rows for zero points.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        return None
    variant = max(variants(manifest, None), key=lambda variant: variant.size)
    graph = onnx.load(str(folder / variant.model), load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    many = [
        branch.g.node
        for node in graph.node
        if node.op_type == "If"
        for branch in node.attribute
        if branch.name == "then_branch"
    ]
    products: list[tuple[int, ...]] = [
        shapes[node.input[1]]
        for nodes in (graph.node, *many)
        for node in nodes
        if node.op_type in {"MatMul", "MatMulIntegerToFloat"} and len(shapes.get(node.input[1], ())) == 2
    ]
    return sum(rows * columns for rows, columns in products if columns != manifest.vocab_size)


def _environment(threads: int) -> dict[str, str]:
    """The process's: it finds this package, looks nothing up on the network, and every pool of threads has one size."""
    root = str(Path(__file__).parents[1])
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "PYTHONPATH": root, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def _started(process: Process, load: Load, vocab: int) -> Measured:
    """The engine once it has given its first token. Raises DriverError."""
    ready = process.hear()
    if ready["vocab"] != vocab:
        raise DriverError(f"{process.peer.what} has {ready['vocab']} tokens where the bundle has {vocab}; it is another model")
    asked = time.perf_counter()
    run = _run(process, load.prompts(1, -2, vocab), 2)
    return Measured(process, ready["note"], ready["weights"], asked + run.times[0][0] - process.begun)


def _run(process: Process, prompts: list[list[int]], tokens: int) -> Run:
    run = Run(process.ask("run", prompts=prompts, tokens=tokens)["times"])
    if [len(stream) for stream in run.times] != [tokens] * len(prompts):
        raise DriverError(f"{process.peer.what} did not give {tokens} tokens to each of {len(prompts)} prompts")
    return run


def _in_turn(engines: Sequence[Measured], repeat: int) -> list[Measured]:
    """All of them; who begins changes, so that nobody always follows the same neighbour."""
    first = repeat % len(engines)
    return [*engines[first:], *engines[:first]]


@contextmanager
def _tolerated(
    needed: bool, say: Callable[[str], None], engines: list[Measured] | None = None, engine: Measured | None = None
) -> Iterator[None]:
    """What fails in here is told and left out of `engines`, unless it is `needed`."""
    try:
        yield
    except DriverError as error:
        if needed:
            raise
        say(f"left out: {error}")
        if engines is not None and engine is not None:
            engines.remove(engine)


def _result(engine: Measured, streams: int, load: Load) -> Result:
    runs = engine.runs[streams]
    return Result(
        engine.peer.what,
        streams,
        first_tokens=[time for run in runs for time in run.first_tokens],
        inter_tokens=[time for run in runs for time in run.inter_tokens],
        rates=[run.rate for run in runs],
        prompt_tokens=load.prompt_tokens,
        tokens=load.tokens,
        start_seconds=engine.start_seconds,
        rss=engine.rss,
        weights=engine.weights,
        perplexity=engine.perplexity,
        note=engine.note,
    )


def _ratios(engines: Sequence[Measured], own: set[Peer], load: Load) -> list[Ratio]:
    """Our engine's figures divided by each peer's, a value a repeat; ours is the one with the nearest number of bits."""
    ours = [engine for engine in engines if engine.peer in own]
    found = []
    for other in (engine for engine in engines if engine.peer not in own):
        mine = min(ours, key=lambda engine: abs(engine.peer.bits - other.peer.bits))
        for streams in load.streams:
            pairs = [(a.figures, b.figures) for a, b in zip(mine.runs[streams], other.runs[streams], strict=True)]
            for figure in pairs[0][0]:
                values = [a[figure] / b[figure] for a, b in pairs]
                found.append(Ratio(mine.peer.what, other.peer.what, streams, figure, values))
    return found
