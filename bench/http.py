"""What one HTTP process can stream, whatever the engine: `python -m bench.http`.

Three processes: a worker without an engine (`bench.replay`), the HTTP process over it, and this one, which opens the streams
and counts what comes. The worker gives every stream one token a step at a fixed pace. While the HTTP process keeps up, each
token is an event of its own; once it does not, tokens that waited share one, so fewer events than tokens say that the pace was
too much. Where the three share the cores with others, the CPU time of the HTTP process for each event is the figure to trust.
"""

import argparse
import asyncio
import contextlib
import cProfile
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import uvloop
from aiohttp import web

from bench import machine
from bench.arguments import number, writable
from runtime import bundle
from runtime.bundle import Bundle, BundleError, Variant
from runtime.messages import HEARTBEAT_SECONDS, Ready
from runtime.text import Text
from server import app, files
from server.engine_client import EngineClient
from server.fleet import Action, Outcome, Status
from server.front import calm_collector
from server.metrics import Metrics
from server.roster import Roster
from server.served import Served
from server.service import Service
from server.supervision import status as describe
from server.supervision.process import EngineProcess

WORDS = " time year people way day man thing woman life child world school state family student group country problem"
"""Of the prompt and the answer: each token of these is text that can be sent at once."""

WARM_SECONDS = 1.0
"""How long the streams run before they are measured."""

START_SECONDS = 60.0
"""How long the HTTP process may take until it listens."""


class BenchError(Exception):
    """The bench cannot be run; the message says what to do."""


@dataclass
class Direct:
    """The worker of the HTTP process, which is started and watched by the bench instead."""

    client: EngineClient | None
    device: str = "replay"


@dataclass(frozen=True)
class Result:
    """What a run showed of the HTTP process."""

    streams: int
    idle: int
    seconds: float
    tokens: int
    """That the worker sent in these seconds."""
    events: int
    user_seconds: float
    """CPU time of the HTTP process in its own code."""
    system_seconds: float
    """CPU time of the HTTP process in the kernel, most of it for sending."""
    rss: int
    """Bytes resident of it, while the streams ran."""

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"{self.streams} streams and {self.idle} idle connections for {self.seconds:.1f} s"
        yield f"{self.events / self.seconds:,.0f} events/s of {self.tokens / self.seconds:,.0f} tokens/s"
        cpu, us = self.user_seconds + self.system_seconds, 1e6 / self.events
        yield f"{us * cpu:.1f} us of CPU an event, {us * self.system_seconds:.1f} of them in the kernel"
        yield f"{self.events / cpu:,.0f} events a CPU second"
        yield f"{cpu / self.seconds:.0%} of a core, {self.rss / 2**20:.0f} MiB resident"


class Stream(asyncio.Protocol):
    """One client of `POST path`, which counts the events of the answer."""

    def __init__(self, path: str, body: bytes) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._tail = b""
        self.events = 0
        self.begun = asyncio.get_running_loop().create_future()
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by isinstance
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count; an event's first bytes may come in two parts."""
        if not self.begun.done():
            self.begun.set_result(data.partition(b"\r\n")[0].decode())
        data = self._tail + data
        self.events += data.count(_EVENT)
        self._tail = data[1 - len(_EVENT) :]

    def connection_lost(self, exc: Exception | None) -> None:
        """The answer's end."""
        if not self.begun.done():
            self.begun.set_result("no answer")
        self.ended = True


_EVENT = b"data: {"


def main() -> int:
    """Measure and show; gives the exit code."""
    args = _arguments()
    try:
        result = _measure(args)
    except (BenchError, BundleError) as error:
        print(f"bench.http: {error}", file=sys.stderr)
        return 1
    for line in [*result.lines(), f"load average {psutil.getloadavg()[0]:.1f} on {machine.cores()} cores"]:
        print(line)
    if args.json is not None:
        args.json.write_bytes(msgspec.json.encode(result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.http", description="Measure what one HTTP process can stream.")
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="bundle whose tokenizer is used (default: %(default)s)")
    add("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")
    add("--route", choices=list(_BODIES), default="chat", help="chat or completions (default: %(default)s)")
    add("--streams", type=number(int, 1), default=200, help="answers at the same time (default: %(default)s)")
    add("--idle", type=number(int, 0), default=1000, help="keep-alive connections beside them (default: %(default)s)")
    add("--rate", type=number(float, 1), default=15_000.0, help="tokens a second, all streams together (default: %(default)s)")
    add("--row-tokens", type=number(int, 1), default=1, help="tokens of an answer a step (default: %(default)s)")
    add("--seconds", type=number(float, 1), default=10.0, help="for which the streams run (default: %(default)s)")
    add("--profile", type=writable, help="write cProfile's figures of the HTTP process to this file; it slows the process down")
    add("--json", type=writable, help="write the result to this file, too")
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> Result:
    folder: Path = args.engines / args.model
    manifest = bundle.read(folder)
    tokens = int(args.rate / args.streams * (args.seconds + 60))  # no answer ends while it is measured
    needed = args.streams + args.idle + 100
    most = files.allow_most()
    if needed > most:
        raise BenchError(f"{needed} open files are needed and {most} allowed; raise the limit with: ulimit -Hn {needed}")
    worker = [sys.executable, "-m", "bench.replay", f"--model={manifest.name}", f"--vocab={manifest.vocab_size}"]
    worker += ["--tokens", *map(str, Text.load(folder, manifest).encode(WORDS, special=False))]
    worker += [f"--slots={args.streams}", f"--context={tokens + 1000}"]
    worker += [f"--row-tokens={args.row_tokens}", f"--steps={args.rate / args.streams / args.row_tokens}"]
    with EngineProcess(worker) as engine, front(manifest, folder, engine.address, args.profile) as (port, process):
        body = {**_BODIES[args.route][1], "max_tokens": tokens, "stream": True, "model": manifest.name}
        load = _Load(port, process, _BODIES[args.route][0], msgspec.json.encode(body), args)
        return uvloop.run(load.run())


_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORDS}]}),
    "completions": ("/v1/completions", {"prompt": WORDS}),
}


class _Load:
    """The clients."""

    def __init__(self, port: int, process: psutil.Process, path: str, body: bytes, args: argparse.Namespace) -> None:
        self._port, self._process = port, process
        self._path, self._body = path, body
        self._args = args

    async def run(self) -> Result:
        loop = asyncio.get_running_loop()
        idle = [await self._idle() for _ in range(self._args.idle)]
        streams = []
        for _ in range(self._args.streams):
            _, stream = await loop.create_connection(lambda: Stream(self._path, self._body), "127.0.0.1", self._port)
            streams.append(stream)
        for status in await asyncio.gather(*(stream.begun for stream in streams)):
            if not status.startswith("HTTP/1.1 200"):
                raise BenchError(f"the server answered a stream with {status}; its log says why")
        await asyncio.sleep(WARM_SECONDS)
        before, begin = self._process.cpu_times(), time.perf_counter()
        events = -sum(stream.events for stream in streams)
        await asyncio.sleep(self._args.seconds)
        after, end = self._process.cpu_times(), time.perf_counter()
        events += sum(stream.events for stream in streams)
        rss = self._process.memory_info().rss
        if any(stream.ended for stream in streams):
            raise BenchError("a stream ended before its time; the server's log says why")
        for transport in [*idle, *(stream.transport for stream in streams)]:
            transport.close()
        return Result(
            streams=len(streams),
            idle=len(idle),
            seconds=end - begin,
            tokens=round(self._args.rate * (end - begin)),
            events=events,
            user_seconds=after.user - before.user,
            system_seconds=after.system - before.system,
            rss=rss,
        )

    async def _idle(self) -> asyncio.WriteTransport:
        """A connection that has had its answer and stays."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: bench\r\n\r\n")
        await reader.readuntil(b"}")
        return writer.transport


@contextlib.contextmanager
def front(manifest: Bundle, folder: Path, address: str, profile: Path | None = None) -> Iterator[tuple[int, psutil.Process]]:
    """The HTTP process over the worker at `address`, from its readiness to its end; gives its port.

    It serves the bundle in `folder`, of which the tokenizer suffices; with `profile`, it leaves cProfile's figures there.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, manifest, folder, address, profile))
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_SECONDS):
            raise BenchError(f"the HTTP process does not listen after {START_SECONDS:.0f} s; does its worker run?")
        yield ours.recv(), psutil.Process(process.pid)
    except EOFError:
        raise BenchError("the HTTP process ended before it listened; it has said why above") from None
    finally:
        process.terminate()
        process.join()


def _serve(listening: Connection, manifest: Bundle, folder: Path, address: str, profile: Path | None) -> None:
    """The HTTP process: serve until SIGTERM."""
    files.allow_most()
    text = Text.load(folder, manifest)
    profiler = cProfile.Profile(time.process_time)  # the cores are shared
    if profile is not None:
        profiler.enable()
    uvloop.run(_listen(listening, manifest, manifest.variants[0], text, address))
    if profile is not None:
        profiler.disable()
        profiler.dump_stats(profile)


async def _listen(listening: Connection, manifest: Bundle, variant: Variant, text: Text, address: str) -> None:
    client = EngineClient(address)
    ready: Ready = await client.attach()
    assert ready.model == manifest.name
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    runner = app.runner(app.build(_service(manifest, variant, text, client)))
    await runner.setup()
    calm_collector()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    listening.send(runner.addresses[0][1])
    await stop.wait()
    client.close(ConnectionError("the bench is over"))
    await runner.cleanup()


def _service(manifest: Bundle, variant: Variant, text: Text, client: EngineClient) -> Service:
    """What an HTTP process serves, without a supervisor: the one model, whose worker the bench keeps."""
    metrics = Metrics()
    roster = Roster(metrics, lambda demand: None)
    roster.adopt("replay", Served(manifest.name, manifest, variant, text, [Direct(client)], metrics))

    async def told() -> Status:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await client.beat()
        engine = describe.engine(manifest.name, "replay", variant.name, client, state="ready")
        return Status(0, 0.0, tuple(roster.models), (engine,), (), (), metrics.samples())

    async def command(action: Action, model: str) -> Outcome:
        return Outcome(0, f"the bench keeps its one worker; it does not {action} {model}")

    return Service(roster, metrics, told, command)


if __name__ == "__main__":
    sys.exit(main())
