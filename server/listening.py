"""The HTTP server from the first byte that it listens for to the last that it sends."""

import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

import uvloop
from aiohttp import web
from yarl import URL

from runtime.bundle import Bundle, Variant
from runtime.messages import Ready
from runtime.text import Text
from server import app
from server.process import EngineProcess, ServeError
from server.service import Service
from server.workers import Worker

DRAIN_SECONDS = 10.0
"""What running answers get to finish when the server is told to stop."""

log = logging.getLogger("engineshed")


class ListenError(ServeError):
    """The address cannot be listened on."""


def run(
    host: str,
    port: int,
    folder: Path,
    bundle: Bundle,
    variant: Variant,
    command: Sequence[str],
    first: EngineProcess,
    stops: Sequence[int],
) -> None:
    """Serve `variant` of the bundle in `folder` until SIGINT or SIGTERM, the first of which may be in `stops` by now.

    Its engine is `first`, a running process of `command`, and after that one's death another. Raises BundleError, ServeError.
    """
    worker = Worker(command, first=first)
    uvloop.run(_serve(host, port, Service(bundle, variant, Text.load(folder, bundle), worker), worker, stops))


async def _serve(host: str, port: int, service: Service, worker: Worker, stops: Sequence[int]) -> None:
    signals = _Signals(stops)
    runner = app.runner(app.build(service))
    await runner.setup()
    try:
        url = await _listen(runner, host, port)
        async with worker:
            await _until_stopped(url, worker, signals)
            service.draining = True
            for site in runner.sites:
                await site.stop()
            await _drain(worker, signals)
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int) -> URL:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port} ({error.strerror}); choose with --host and --port") from error
    address = runner.addresses[0]
    return URL.build(scheme="http", host=address[0], port=address[1])


async def _until_stopped(url: URL, worker: Worker, signals: "_Signals") -> None:
    async def watch() -> None:
        _announce(url, await worker.loaded())
        await worker.hopeless()

    watching, asked = asyncio.create_task(watch()), asyncio.create_task(signals.asked.wait())
    await asyncio.wait({watching, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if watching.done():
        watching.result()
    watching.cancel()


async def _drain(worker: Worker, signals: "_Signals") -> None:
    """Let the running answers finish, within the limit and unless a second signal came."""
    deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
    if worker.client is not None and worker.client.in_flight:
        log.info("stopping; %d answers get %.0f s to finish", worker.client.in_flight, DRAIN_SECONDS)
    while worker.client is not None and worker.client.in_flight and not signals.hurry:
        if asyncio.get_running_loop().time() > deadline:
            log.warning("ending %d answers that did not finish in time", worker.client.in_flight)
            return
        await asyncio.sleep(0.02)


def _announce(url: URL, ready: Ready) -> None:
    log.info("ready at %s with %s (%s): %d slots of %d tokens", url, ready.model, ready.variant, ready.slots, ready.context)
    log.info('try: curl -N %s -d \'{"prompt": "The capital of France is", "max_tokens": 32}\'', url / "v1/generate")


class _Signals:
    """What SIGINT and SIGTERM have asked for, those in `before` among them."""

    def __init__(self, before: Sequence[int]) -> None:
        self.asked = asyncio.Event()
        self.hurry = False
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._take)
        for _ in before:
            self._take()

    def _take(self) -> None:
        self.hurry = self.asked.is_set()
        self.asked.set()
