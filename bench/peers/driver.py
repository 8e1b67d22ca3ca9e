"""What a driver is: one model loaded in a process of its own, which does what JSON lines on its standard input say.

A driver is started with one argument, a JSON object with the keys of `Setting`. It answers one line to each it reads:

    (start)                                      {"note", "vocab", "weights"} once the model is loaded
    {"do": "run", "prompts": [...], "tokens": n} {"times": [[s, ...], ...], "tokens": [[id, ...], ...]}, one list a prompt
    {"do": "rss"}                                {"rss": bytes}
    {"do": "perplexity", "windows": [[...]]}     {"perplexity": p}, null where the runtime shows no probabilities
    {"do": "close"}                              nothing; the process ends

or {"error": "what is wrong"}. Times are seconds after the prompts were handed over. The standard library only: this file runs
under every peer's own Python.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Setting:
    """What to load, and for what."""

    model: str
    """Path of the file or folder that the runtime reads."""
    name: str
    """The variant, precision or quantization, in the driver's own words."""
    streams: int
    """Prompts that run together at the most."""
    context: int
    """Tokens of a prompt and its answer at the most."""
    threads: int


class Driver(Protocol):
    """A loaded model."""

    note: str
    """The runtime's version and the setting that is measured."""
    vocab: int
    weights: int
    """Bytes that a decode step reads of the weights."""

    def run(self, prompts: list[list[int]], count: int, seen: "Seen") -> None:
        """Continue every prompt greedily by `count` tokens, whatever they are, and tell `seen` each one as it comes."""

    def perplexity(self, windows: list[list[int]]) -> float | None:
        """exp of the mean negative log-probability of the windows' tokens, each after those before it in its window."""


class Seen:
    """The tokens of each stream, and when they came."""

    def __init__(self, streams: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(streams)]
        self.times: list[list[float]] = [[] for _ in range(streams)]
        self._start = time.perf_counter()

    def add(self, stream: int, token: int) -> None:
        """Stream number `stream` got `token` now."""
        self.tokens[stream].append(int(token))
        self.times[stream].append(time.perf_counter() - self._start)

    def add_each(self, tokens: Iterable[int]) -> None:
        """Every stream got one token of `tokens` now."""
        now = time.perf_counter() - self._start
        for stream, token in enumerate(tokens):
            self.tokens[stream].append(int(token))
            self.times[stream].append(now)


def serve(load: Callable[[Setting], Driver]) -> None:
    """Load, then answer until `close` or the end of the input. What libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        driver = load(Setting(**json.loads(sys.argv[1])))
    except Exception as error:  # the bench shows the sentence and goes on without this peer
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"note": driver.note, "vocab": driver.vocab, "weights": driver.weights})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "close":
            return
        try:
            reply(_answer(driver, request))
        except Exception as error:  # as above
            reply({"error": f"{type(error).__name__}: {error}"})


def _answer(driver: Driver, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "run":
            seen = Seen(len(request["prompts"]))
            driver.run(request["prompts"], request["tokens"], seen)
            return {"times": seen.times, "tokens": seen.tokens}
        case "rss":
            return {"rss": resident()}
        case "perplexity":
            return {"perplexity": driver.perplexity(request["windows"])}
        case other:
            raise ValueError(f"no such request: {other!r}")


def resident() -> int:
    """Bytes of this process that are in memory, file mappings included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def losses(logits: Any, targets: Sequence[int]) -> list[float]:
    """Negative log-probabilities of `targets` under the rows of `logits`, a numpy array [len(targets), vocab]."""
    top = logits.max(1)
    sums = [float(math.log(row.sum())) for row in _exponentials(logits, top)]
    chosen = logits[range(len(targets)), list(targets)]
    return [total + float(most) - float(one) for total, most, one in zip(sums, top, chosen, strict=True)]


def _exponentials(logits: Any, top: Any) -> Iterable[Any]:
    """e to the power of each row, less its greatest value, in double precision."""
    return (math.e ** (row.astype("float64") - most) for row, most in zip(logits, top, strict=True))


def perplexity(found: Sequence[float]) -> float:
    """exp of the mean of negative log-probabilities."""
    return math.exp(sum(found) / len(found))
