"""The HTTP server from the first byte that it listens for to the last that it sends."""

import asyncio
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop
from aiohttp import web
from yarl import URL

from runtime.bundle import Bundle, Variant
from runtime.text import Text
from server import app
from server.process import EngineProcess, ServeError
from server.replicas import Replicas, in_flight
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
    processes: Mapping[str, EngineProcess],
    stops: Sequence[int],
) -> None:
    """Serve `variant` of the bundle in `folder` until SIGINT or SIGTERM, the first of which may be in `stops` by now.

    Its engines are `processes`, running ones by the names of their devices, and after the death of one another of its command.
    Raises BundleError, ServeError.
    """
    workers = [Worker(process.command, device=device, first=process) for device, process in processes.items()]
    uvloop.run(_serve(host, port, Service(bundle, variant, Text.load(folder, bundle), workers), workers, stops))


async def _serve(host: str, port: int, service: Service, workers: Sequence[Worker], stops: Sequence[int]) -> None:
    signals = _Signals(stops)
    runner = app.runner(app.build(service))
    await runner.setup()
    try:
        url = await _listen(runner, host, port)
        async with Replicas(workers) as replicas:
            await _until_stopped(url, replicas, signals)
            service.draining = True
            for site in runner.sites:
                await site.stop()
            await _drain(workers, signals)
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int) -> URL:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port} ({error.strerror}); choose with --host and --port") from error
    address = runner.addresses[0]
    return URL.build(scheme="http", host=address[0], port=address[1])


async def _until_stopped(url: URL, replicas: Replicas, signals: "_Signals") -> None:
    announcing = asyncio.create_task(_announce(url, replicas))
    failing, asked = asyncio.create_task(replicas.hopeless()), asyncio.create_task(signals.asked.wait())
    await asyncio.wait({failing, asked}, return_when=asyncio.FIRST_COMPLETED)
    announcing.cancel()
    asked.cancel()
    if failing.done():
        failing.result()
    failing.cancel()


async def _drain(workers: Sequence[Worker], signals: "_Signals") -> None:
    """Let the running answers finish, within the limit and unless a second signal came."""
    deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
    if in_flight(workers):
        log.info("stopping; %d answers get %.0f s to finish", in_flight(workers), DRAIN_SECONDS)
    while in_flight(workers) and not signals.hurry:
        if asyncio.get_running_loop().time() > deadline:
            log.warning("ending %d answers that did not finish in time", in_flight(workers))
            return
        await asyncio.sleep(0.02)


async def _announce(url: URL, replicas: Replicas) -> None:
    ready = await replicas.loaded()
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
