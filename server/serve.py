"""`engineshed serve`: an engine behind HTTP."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop
from aiohttp import web
from yarl import URL

from runtime import bundle as bundles
from runtime.bundle import MANIFEST, Bundle, BundleError, Variant
from runtime.text import Text
from server import app
from server.service import Service
from server.workers import Worker, WorkerHopelessError, command

CONTEXT = 4096
"""Tokens a slot holds unless the model has fewer or the command line says otherwise: memory grows with it."""
DRAIN_SECONDS = 10.0
"""What running answers get to finish when the server is told to stop."""

log = logging.getLogger("engineshed")


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = "Serve an engine bundle over HTTP, with OpenAI's API and a plainer one of its own."
    parser.epilog = "Stop it with Ctrl-C or SIGTERM: running answers get 10 seconds to finish, a second signal ends them."
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 takes a free one (default: %(default)s)")
    parser.add_argument("--model", help="a bundle's name, or its folder (default: the first in --engines)")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")
    parser.add_argument("--variant", help="engine to run, e.g. cpu-int4 (default: the smallest for this machine's CPU)")
    parser.add_argument("--slots", type=_positive, default=8, help="requests that run at once (default: %(default)s)")
    parser.add_argument(
        "--context", type=_positive, help=f"tokens of prompt and answer together (default: the model's own, at most {CONTEXT})"
    )
    parser.add_argument(
        "--queue",
        type=_not_negative,
        default=64,
        help="requests that may wait for a slot; more get status 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="least important line to log (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; gives the exit code."""
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        uvloop.run(_serve(args))
    except (BundleError, WorkerHopelessError, ListenError) as error:
        print(f"engineshed serve: {error}", file=sys.stderr)
        return 1
    return 0


class ListenError(Exception):
    """The address cannot be listened on."""


def choose(engines: Path, model: str | None) -> tuple[Path, Bundle]:
    """The bundle that is meant by `model`, a folder or a name in `engines`; None takes the first. Raises BundleError."""
    if model is not None and (Path(model) / MANIFEST).is_file():
        folder = Path(model)
    else:
        found = bundles.scan(engines)
        if not found:
            raise BundleError(f"there is no engine bundle in {engines}; build one with: engineshed export")
        name = next(iter(found)) if model is None else model
        if name not in found:
            raise BundleError(
                f"there is no bundle {name!r} in {engines}, which has {', '.join(found)}; see: engineshed engines"
            )
        folder = engines / name
    return folder, bundles.read(folder)


async def _serve(args: argparse.Namespace) -> None:
    folder, bundle = choose(args.engines, args.model)
    variant = bundle.variant(args.variant)
    context = args.context or min(CONTEXT, bundle.max_length)
    if context > bundle.max_length:
        raise BundleError(f"bundle {bundle.name!r} is made for {bundle.max_length} tokens; --context {context} is more")
    process = command(folder, variant.name, slots=args.slots, context=context, queue=args.queue, log_level=args.log_level)
    worker = Worker(process)
    service = Service(bundle, variant, Text.load(folder, bundle), worker)
    runner = app.runner(app.build(service))
    signals = _Signals()
    await runner.setup()
    try:
        url = await _listen(runner, args.host, args.port)
        log.info("loading %s (%s)", bundle.name, variant.name)
        async with worker:
            await _until_stopped(worker, signals, lambda: _announce(url, bundle, variant, args.slots, context))
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


async def _until_stopped(worker: Worker, signals: "_Signals", announce: Callable[[], None]) -> None:
    async def watch() -> None:
        await worker.loaded()
        announce()
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


def _announce(url: URL, bundle: Bundle, variant: Variant, slots: int, context: int) -> None:
    log.info("ready at %s with %s (%s): %d slots of %d tokens", url, bundle.name, variant.name, slots, context)
    log.info('try: curl -N %s -d \'{"prompt": "The capital of France is", "max_tokens": 32}\'', url / "v1/generate")


class _Signals:
    """What SIGINT and SIGTERM have asked for."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = False
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._take)

    def _take(self) -> None:
        self.hurry = self.asked.is_set()
        self.asked.set()


def _positive(text: str) -> int:
    return _between(text, 1)


def _not_negative(text: str) -> int:
    return _between(text, 0)


def _port(text: str) -> int:
    return _between(text, 0, 65535)


def _between(text: str, least: int, most: int | None = None) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    if most is not None and number > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}")
    return number
