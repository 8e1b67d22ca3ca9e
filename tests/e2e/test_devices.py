"""Several workers behind one server, here on the CPU: they share the load, and one's death is not the others'."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp

from tests.default_model import MANY_TOKENS
from tests.e2e.conftest import serving

BODY = {"prompt": "Once upon a time", "max_tokens": MANY_TOKENS, "seed": 1, "ignore_eos": True}
HEADERS = {"Accept": "application/x-ndjson"}


def test_two_workers_share_the_requests_and_the_death_of_one_leaves_the_other() -> None:
    with serving("--device=cpu,cpu", "--slots=1", f"--context={MANY_TOKENS + 100}") as server:
        for device in ("cpu#1", "cpu#2"):
            server.wait("engineshed_ready", 1, device=device)

        async def endings() -> list[dict[str, Any]]:
            async with aiohttp.ClientSession(server.url, headers=HEADERS) as http:
                with server.held() as advance:
                    asking = asyncio.gather(*(http.post("/v1/generate", json=BODY) for _ in range(2)))
                    while not asking.done():
                        await asyncio.to_thread(advance)
                    both = await asking
                    os.kill(server.engines()[0], signal.SIGKILL)  # Both have their first token, each in an only slot.
                return [json.loads((await response.text()).splitlines()[-1]) for response in both]

        broken, whole = sorted(asyncio.run(endings()), key=lambda last: "usage" in last)
        assert broken["error"]["code"] == "engine_unavailable"
        assert whole["usage"]["completion_tokens"] == BODY["max_tokens"]
        assert server.get("/readyz")[0] == 200
        server.wait("engineshed_ready", 1, device="cpu#1")
        assert server.metric("engineshed_worker_restarts_total", device="cpu#1") == 1
        assert server.metric("engineshed_worker_restarts_total", device="cpu#2") == 0
        replaced = server.engines()
    assert not any(Path(f"/proc/{pid}").exists() for pid in replaced)
