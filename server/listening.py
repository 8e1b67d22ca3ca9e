"""The HTTP server from the first byte that it listens for to the last that it sends."""

import asyncio
import gc
import logging
import signal
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop
from aiohttp import web
from yarl import URL

from runtime.bundle import Bundle, Variant
from runtime.text import Text
from server import app, cors, files
from server.access import Access
from server.doors import Doors, Limits
from server.keys import Keys
from server.process import EngineProcess, ServeError
from server.replicas import Replicas, in_flight
from server.service import Service
from server.tls import ssl_context
from server.workers import Worker

DRAIN_SECONDS = 10.0
"""What running answers get to finish when the server is told to stop."""

log = logging.getLogger("engineshed")


class ListenError(ServeError):
    """The address cannot be listened on."""


def run(
    doors: Doors,
    limits: Limits,
    folder: Path,
    bundle: Bundle,
    variant: Variant,
    processes: Mapping[str, EngineProcess],
    stops: Sequence[int],
) -> None:
    """Serve `variant` of the bundle in `folder` until SIGINT or SIGTERM, the first of which may be in `stops` by now.

    Its engines are `processes`, running ones by the names of their devices, and after the death of one another of its command.
    SIGHUP has the keys read again. Raises BundleError, ServeError.
    """
    try:
        origins = frozenset(map(cors.parse, doors.origins))
    except cors.OriginError as error:
        raise ServeError(f"--cors-origin: {error}") from None
    access = Access(None if doors.keys is None else Keys(doors.keys), origins, doors.protect_metrics)
    tls = None
    if doors.certificate is not None and doors.certificate_key is not None:
        tls = ssl_context(doors.certificate, doors.certificate_key)
    workers = [Worker(process.command, device=device, first=process) for device, process in processes.items()]
    text = Text.load(folder, bundle)
    files.allow_most()
    service = Service(bundle, variant, text, workers, limits.queue_seconds, limits.total_seconds)
    uvloop.run(_serve(doors, tls, access, service, workers, stops))


async def _serve(
    doors: Doors,
    tls: ssl.SSLContext | None,
    access: Access,
    service: Service,
    workers: Sequence[Worker],
    stops: Sequence[int],
) -> None:
    signals = _Signals(stops, access)
    runner = app.runner(app.build(service, access))
    await runner.setup()
    calm_collector()
    try:
        url = await _listen(runner, doors.host, doors.port, tls)
        async with Replicas(workers) as replicas:
            await _until_stopped(url, replicas, signals)
            service.draining = True
            for site in runner.sites:
                await site.stop()
            await _drain(workers, signals)
    finally:
        await runner.cleanup()


def calm_collector() -> None:
    """Leave what was imported and loaded out of garbage collection, which would go through it while answers stream."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


async def _listen(runner: web.AppRunner, host: str, port: int, tls: ssl.SSLContext | None) -> URL:
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port} ({error.strerror}); choose with --host and --port") from error
    address = runner.addresses[0]
    return URL.build(scheme="http" if tls is None else "https", host=address[0], port=address[1])


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
    """What SIGINT and SIGTERM have asked for, those in `before` among them; and SIGHUP, which is obeyed at once."""

    def __init__(self, before: Sequence[int], access: Access) -> None:
        if access.keys is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, access.keys.reload)
        self.asked = asyncio.Event()
        self.hurry = False
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._take)
        for _ in before:
            self._take()

    def _take(self) -> None:
        self.hurry = self.asked.is_set()
        self.asked.set()
