"""A server over HTTP: any that streams OpenAI's completions."""

import asyncio
import json
import time

import aiohttp
from yarl import URL

from bench.measure import Result


class ServerError(Exception):
    """The server cannot be measured; the message says why."""


async def measure(url: str, model: str, streams: list[int], prompt_tokens: int, tokens: int, repeats: int) -> list[Result]:
    """Closed loop: at each number of streams, every stream asks once, all at the same time, `repeats` times over."""
    results = [Result(f"{model} at {url}", count) for count in streams]
    if not URL(url).absolute:
        raise ServerError(f"{url} is no address; give one as http://127.0.0.1:8000")
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session:
        await _ask(session, model, prompt_tokens, 2, 0, Result("warm-up", 1))
        for repeat in range(repeats):
            for result in results:
                start = time.perf_counter()
                counts = await asyncio.gather(
                    *(_ask(session, model, prompt_tokens, tokens, repeat * 1000 + i, result) for i in range(result.streams))
                )
                result.rates.append(sum(counts) / (time.perf_counter() - start))
    if any(not result.first_tokens or not result.inter_tokens for result in results):
        raise ServerError(f"{url} gave too little text to measure; ask for more --tokens")
    return results


async def _ask(session: aiohttp.ClientSession, model: str, prompt_tokens: int, tokens: int, number: int, result: Result) -> int:
    """Stream one completion of a prompt that no other request has; returns the tokens that came."""
    prompt = [100 + (number * 7919 + i * 31) % 1000 for i in range(prompt_tokens)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    start = last = time.perf_counter()
    count, first = 0, True
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise ServerError(f"the server answered {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                count = (event.get("usage") or {}).get("completion_tokens", count)
                if not event.get("choices") or not event["choices"][0].get("text"):
                    continue
                now = time.perf_counter()
                (result.first_tokens if first else result.inter_tokens).append(now - (start if first else last))
                first, last = False, now
    except aiohttp.ClientError as error:
        raise ServerError(f"no server answers: {error}") from error
    return count
