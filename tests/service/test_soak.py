"""Thousands of requests that stop, break off and are wrong, after which every process is as large as it was.

`make soak` does the same for longer, with the default model.
"""

import asyncio
import os
import random
from pathlib import Path
from statistics import median

from tests.service.conftest import Running, serve

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "5000"))
FLAT = 0.02
"""By how much a process may be larger in the last quarter than in the second."""
WRONG = [("prompt", []), ("max_tokens", 0), ("model", "nobody"), ("prompt", [10**6]), ("top_p", 7)]
NOISE = 1 << 20
"""Bytes below which a difference is an allocator's own business."""


async def test_memory_stays_flat_over_thousands_of_requests(engines: Path) -> None:
    async with serve(engines, "--model=alpha", "--log-level=info", seconds=60 + REQUESTS / 20) as running:
        chance = random.Random(7)
        sizes: list[dict[str, int]] = []
        left = iter(range(REQUESTS))

        async def client() -> None:
            for number in left:
                await _request(running, chance)
                if number % (REQUESTS // 100) == 0:
                    sizes.append({each["name"]: each["rss"] for each in (await running.status())["processes"]})

        await asyncio.gather(*(client() for _ in range(16)))
        await running.settled()
        quarter = len(sizes) // 4
        for name in sizes[-1]:
            second = median(size[name] for size in sizes[quarter : 2 * quarter])
            last = median(size[name] for size in sizes[-quarter:])
            assert last - second < max(FLAT * second, NOISE), f"{name} grew from {second / 2**20:.1f} to {last / 2**20:.1f} MiB"


async def _request(running: Running, chance: random.Random) -> None:
    """One request of any kind: whole, streamed, cut off, stopped by a string, or wrong."""
    prompt = [chance.randrange(3, 512) for _ in range(chance.randint(1, 40))]
    body = {"model": "alpha", "prompt": prompt, "max_tokens": chance.randint(1, 24), "seed": chance.randrange(100)}
    match chance.randrange(6):
        case 0:
            body["stop"] = ["e", " the"]
        case 1 | 2:
            async with running.http.post("/v1/completions", json={**body, "stream": True}) as response:
                if chance.random() < 0.5:
                    await response.content.readline()  # and away
                else:
                    await response.text()
            return
        case 3:
            field, value = chance.choice(WRONG)
            async with running.http.post("/v1/completions", json={**body, field: value}) as response:
                assert response.status in (400, 404)
            return
    async with running.http.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
