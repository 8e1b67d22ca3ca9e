"""The real HTTP application on a real port, for a test to talk to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from runtime.bundle import Bundle
from runtime.messages import Generate
from runtime.text import Text
from server import app
from server.fleet import Action, Outcome, Status
from server.metrics import Metrics
from server.replicas import Replica
from server.roster import Roster
from server.served import Served
from server.service import Service
from server.supervision import status as describe
from tests.unit.server.scripted import Attached, ScriptedWorker
from tests.waiting import HANGS_SECONDS


@dataclass
class House:
    """A server with a scripted worker, and a client of it."""

    worker: ScriptedWorker
    engine: Attached
    service: Service
    http: aiohttp.ClientSession

    @property
    def text(self) -> Text:
        """The model's."""
        return self.worker.text

    async def open(
        self, path: str, body: dict[str, Any], first: str, headers: dict[str, str] | None = None
    ) -> tuple[aiohttp.ClientResponse, Generate]:
        """A stream whose first text is `first`, and the request that the worker goes on answering."""
        asking = asyncio.ensure_future(self.http.post(path, json=body, headers=headers))
        request = await self.worker.next(Generate)
        await self.worker.say(request, first)
        return await asyncio.wait_for(asking, HANGS_SECONDS), request


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[aiohttp.ClientSession]:
    """The real application on a real port, and a client for it."""
    runner = app.runner(app.build(service))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    async with aiohttp.ClientSession(f"http://{host}:{port}", timeout=aiohttp.ClientTimeout(HANGS_SECONDS)) as http:
        yield http
    await runner.cleanup()


def service_for(bundle: Bundle, text: Text, *replicas: Replica) -> Service:
    """An HTTP process's models: one, whose engines the test keeps. In the supervisor's place it asks the replicas."""
    metrics = Metrics()
    roster = Roster(metrics, lambda demand: None)
    roster.adopt("d1", Served(bundle.name, bundle, bundle.variants[0], text, replicas, metrics))

    async def status() -> Status:
        engines = tuple(
            describe.engine("tiny", each.device, "cpu-int4", each.client, state="ready" if each.client else "restarting")
            for each in replicas
        )
        return Status(0, 0.0, tuple(roster.models), engines, (), (), metrics.samples())

    async def command(action: Action, model: str) -> Outcome:
        return Outcome(0, f"{action} {model}")

    return Service(roster, metrics, status, command, patience=1.0)
