"""An engine in this process, through the decode loop that serves it."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.measure import Result
from runtime import bundle, ort
from runtime.engine import EngineError
from runtime.loop import Loop
from runtime.messages import Generate

_BUFFER = 1 << 28
"""Bytes read to measure bandwidth: many times any cache."""


def measure(
    folder: Path,
    variants: list[str] | None,
    streams: list[int],
    prompt_tokens: int,
    tokens: int,
    repeats: int,
    bandwidth: float,
) -> list[Result]:
    """Each variant at each number of streams; `bandwidth` is the memory's, in bytes a second.

    Raises BundleError or EngineError.
    """
    manifest = bundle.read(folder)
    chosen = [manifest.variant(name) for name in variants or [v.name for v in manifest.variants if v.target == "cpu"]]
    if prompt_tokens + tokens > manifest.max_length:
        raise EngineError(f"{prompt_tokens} + {tokens} tokens are more than the model's {manifest.max_length}")
    loops = {}
    for variant in chosen:
        engine = ort.load(folder, variant.name, slots=max(streams), context=prompt_tokens + tokens)
        loops[variant.name] = Loop(engine, queue=max(streams))
        answer(loops[variant.name], 1, prompt_tokens, 2, Result("warm-up", 1))
    results = [
        Result(
            variant.name,
            count,
            limit=variant.size / bandwidth if count == 1 else None,
            perplexity=variant.perplexity.value if variant.perplexity else None,
        )
        for variant in chosen
        for count in streams
    ]
    for _ in range(repeats):
        for result in results:
            answer(loops[result.what], result.streams, prompt_tokens, tokens, result)
    return results


def answer(loop: Loop, streams: int, prompt_tokens: int, tokens: int, result: Result) -> None:
    """Let `streams` random prompts be answered together and add the times to `result`."""
    chance = random.Random(prompt_tokens)
    start = time.perf_counter()
    for i in range(streams):
        prompt = [chance.randrange(loop.engine.vocab_size) for _ in range(prompt_tokens)]
        loop.submit(b"bench", Generate(str(i), prompt, max_tokens=tokens))
    seen: dict[str, float] = {}
    while loop.busy:
        news = loop.step()
        now = time.perf_counter()
        for item in news:
            last = seen.get(item.row.id)
            if last is None:
                result.first_tokens.append(now - start)
            elif last != now:
                result.inter_tokens.append(now - last)
            seen[item.row.id] = now
    result.rates.append(streams * tokens / (time.perf_counter() - start))


def read_bandwidth() -> float:
    """Bytes a second that all cores together read from memory; the best of a few passes."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(_BUFFER // 8, np.int64), cores)
    times = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - start)
    return _BUFFER / min(times)
