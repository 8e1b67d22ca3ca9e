"""Load for a while, with everything that goes wrong on the way; afterwards all is as it was.

With the variable SOAK the same over the default model, for as many seconds as it says: `make soak`.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from tests.service.conftest import ROOT, Running, events, serve

FLAT = 0.02
"""By how much a process may be larger in the last quarter than in the second."""
WRONG = [("prompt", []), ("max_tokens", 0), ("model", "nobody"), ("prompt", [10**6]), ("top_p", 7)]


@dataclass(frozen=True)
class Load:
    """What is soaked, and for how long."""

    engines: Path
    model: str
    vocab: int
    requests: int
    seconds: float
    between_deaths: float
    """Seconds."""
    tokens: int
    """Of an answer while engines are killed."""


@pytest.fixture
def load(engines: Path, tmp_path: Path) -> Load:
    seconds = int(os.environ.get("SOAK") or 0)
    if not seconds:
        return Load(engines, "alpha", 512, requests=5000, seconds=12, between_deaths=1.5, tokens=150)
    (tmp_path / "real").mkdir()
    (tmp_path / "real/engines").symlink_to(ROOT / "engines")
    return Load(
        tmp_path / "real/engines",
        "smollm2-135m-instruct",
        49152,
        requests=10 * seconds,
        seconds=seconds,
        between_deaths=8,
        tokens=30,
    )


async def test_streams_requests_deaths_and_hang_ups_leave_everything_as_it_was(load: Load) -> None:
    """64 streams at once of random prompts, a third of them cut off, and an engine killed every second or so."""
    chance = random.Random(3)
    prompts = [[chance.randrange(3, load.vocab) for _ in range(chance.randint(1, 60))] for _ in range(64)]
    options = [f"--model={load.model}", "--variant=cpu-fp32", "--device=cpu,cpu", "--queue=200", "--http-processes=2"]
    async with serve(load.engines, *options, seconds=300 + 2 * load.seconds) as running:
        alone = [(await running.answer(load.model, prompt, load.tokens))[1] for prompt in prompts]
        outcomes: Counter[str] = Counter()
        stop = asyncio.get_running_loop().time() + load.seconds

        def goes_on() -> bool:
            """Until the time is up, and all that is to happen has: a busy machine takes longer."""
            enough = outcomes["whole"] > 64 and outcomes["cut off"] > 16 and outcomes["death"] > 3
            return not enough or asyncio.get_running_loop().time() < stop

        async def client(number: int) -> None:
            own = random.Random(number)
            while goes_on():
                outcomes[await _one(running, load, prompts[number], alone[number], own)] += 1

        async def killer() -> None:
            while goes_on():
                await running.until(running.all_ready)  # One that dies before it has answered would get the model quarantined.
                await asyncio.sleep(load.between_deaths)
                os.kill(chance.choice(await running.pids(f"{load.model}@")), signal.SIGKILL)
                outcomes["death"] += 1

        await asyncio.gather(killer(), *(client(number) for number in range(64)))
        del outcomes["death"]
        assert set(outcomes) <= {"whole", "cut off", "broken", "refused"}, outcomes
        await running.until(running.all_ready)
        await running.settled()
        assert await running.metric("engineshed_worker_restarts_total") >= 3
        names = [process["name"] for process in (await running.status())["processes"]]
        assert sorted(names) == sorted([f"{load.model}@cpu#1", f"{load.model}@cpu#2", "http-0", "http-1", "supervisor"])
        assert [(await running.answer(load.model, prompt, load.tokens))[1] for prompt in prompts[:8]] == alone[:8]


async def _one(running: Running, load: Load, prompt: list[int], alone: str, own: random.Random) -> str:
    """One stream: how it ended. What came of it must be how the answer begins, and all of it if it ended as it should."""
    body = {"model": load.model, "prompt": prompt, "max_tokens": load.tokens, "temperature": 0, "ignore_eos": True}
    async with running.http.post("/v1/completions", json={**body, "stream": True}) as response:
        if response.status != 200:
            assert response.status in (429, 503), await response.text()
            return "refused"
        if own.random() < 1 / 3:
            await response.content.readline()
            return "cut off"
        text, whole = events(await response.text())
        assert text == alone if whole else alone.startswith(text)
        return "whole" if whole else "broken"


async def test_memory_stays_flat_over_thousands_of_requests(load: Load) -> None:
    options = [f"--model={load.model}", "--variant=cpu-fp32"]
    async with serve(load.engines, *options, seconds=60 + load.requests / 4) as running:
        chance = random.Random(7)
        sizes: list[dict[str, int]] = []
        left = iter(range(load.requests))

        async def client() -> None:
            for number in left:
                await _request(running, load, chance)
                if number % (load.requests // 100) == 0:
                    sizes.append({each["name"]: each["rss"] for each in (await running.status())["processes"]})

        await asyncio.gather(*(client() for _ in range(16)))
        await running.settled()
        quarter = len(sizes) // 4
        for name in sizes[-1]:
            second = median(size[name] for size in sizes[quarter : 2 * quarter])
            last = median(size[name] for size in sizes[-quarter:])
            assert last < (1 + FLAT) * second, f"{name} grew from {second / 2**20:.1f} to {last / 2**20:.1f} MiB"


async def _request(running: Running, load: Load, chance: random.Random) -> None:
    """One request of any kind: whole, streamed, cut off, stopped by a string, or wrong."""
    prompt = [chance.randrange(3, load.vocab) for _ in range(chance.randint(1, 40))]
    body = {"model": load.model, "prompt": prompt, "max_tokens": chance.randint(1, 24), "seed": chance.randrange(100)}
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
