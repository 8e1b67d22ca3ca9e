"""An HTTP process from the first byte that it listens for to the last that it sends: `python -m server.front SETTINGS`."""

import asyncio
import gc
import logging
import os
import signal
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec
import uvloop
from aiohttp import web

from runtime import logs, orphan
from server import app, cors, files
from server.access import Access
from server.control import Control
from server.doors import Doors, Settings
from server.keys import Keys
from server.listen import ListenError
from server.metrics import Metrics
from server.roster import Roster
from server.service import Service
from server.supervision.fronts import HOPELESS
from server.supervision.process import ServeError
from server.tls import ssl_context

COUNT_SECONDS = 1.0
"""How often the supervisor is told what was counted."""

log = logging.getLogger("engineshed")


def main() -> int:
    """Serve until the supervisor says to stop, or is gone; gives the exit code."""
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    orphan.die_with(settings.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's, which then says what it means.
    logs.setup(settings.log_level, cast(logs.Format, settings.log_format))
    files.allow_most()
    try:
        access, tls = _access(settings.doors), _tls(settings.doors)
        uvloop.run(_serve(settings, access, tls))
    except ServeError as error:
        print(f"engineshed serve: {error}", file=sys.stderr)
        return HOPELESS
    return 0


def _access(doors: Doors) -> Access:
    try:
        origins = frozenset(map(cors.parse, doors.origins))
    except cors.OriginError as error:
        raise ServeError(f"--cors-origin: {error}") from None
    return Access(None if doors.keys is None else Keys(Path(doors.keys)), origins, doors.protect_metrics)


def _tls(doors: Doors) -> ssl.SSLContext | None:
    if doors.certificate is None or doors.certificate_key is None:
        return None
    return ssl_context(Path(doors.certificate), Path(doors.certificate_key))


async def _serve(settings: Settings, access: Access, tls: ssl.SSLContext | None) -> None:
    loop, hurry = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, hurry.set)
    if access.keys is not None:
        loop.add_signal_handler(signal.SIGHUP, access.keys.reload)
    else:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    metrics = Metrics()
    roster = Roster(metrics, lambda demand: control.send(demand), waiting=settings.waiting)
    control = Control(settings.supervisor, roster.apply, metrics.samples)
    service = Service(roster, metrics, control.status, control.command, settings.limits)
    runner = app.runner(app.build(service, access))
    await runner.setup()
    calm_collector()
    counting: asyncio.Task[None] | None = None
    try:
        control.join(settings.name)
        await _either(roster.known, hurry)  # A request that came earlier would be told of no models.
        await _listen(runner, settings, tls)
        counting = asyncio.create_task(_count(control))
        await _either(roster.draining, hurry)
        service.draining = True
        for site in list(runner.sites):
            await site.stop()
        await _drain(service, settings.drain_seconds, hurry)
    finally:
        if counting is not None:
            counting.cancel()
        await runner.cleanup()
        roster.close()
        with suppress(Exception):  # The supervisor may be gone.
            control.count()
        control.close()


def calm_collector() -> None:
    """Leave what was imported and loaded out of garbage collection, which would go through it while answers stream."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


async def _listen(runner: web.AppRunner, settings: Settings, tls: ssl.SSLContext | None) -> None:
    doors = settings.doors
    try:
        await web.TCPSite(runner, doors.host, doors.port, ssl_context=tls, reuse_port=True).start()
    except OSError as error:
        raise ListenError(f"cannot listen on {doors.host}:{doors.port} ({error.strerror})") from error
    if doors.admin_socket is not None:
        path = doors.admin_socket
        try:
            with suppress(FileNotFoundError):  # of a process that was killed
                os.unlink(path)
            mask = os.umask(0o177)  # so that it is its owner's alone from the first moment
            try:
                await web.UnixSite(runner, path).start()
            finally:
                os.umask(mask)
        except OSError as error:
            raise ListenError(f"--admin-socket: cannot listen on {path} ({error.strerror})") from error


async def _either(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def _count(control: Control) -> None:
    while True:
        control.count()
        await asyncio.sleep(COUNT_SECONDS)


async def _drain(service: Service, seconds: float, hurry: asyncio.Event) -> None:
    """Let the running answers finish, within the limit and unless the supervisor hurries."""
    deadline = asyncio.get_running_loop().time() + seconds
    if service.requests:
        log.info("stopping; %d answers get %.0f s to finish", service.requests, seconds)
    while service.requests and not hurry.is_set():
        if asyncio.get_running_loop().time() > deadline:
            log.warning("ending %d answers that did not finish in time", service.requests)
            return
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
