"""`engineshed top`: what a running server does, live in the terminal."""

import argparse
import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text
from yarl import URL

from server import client_key
from server.api.admin import ServerStatus
from server.errors import ErrorBody
from server.fleet import Engine

_STATE_STYLES = {"ready": "green", "loading": "yellow", "waiting": "yellow", "restarting": "yellow", "cold": "dim"}


class TopError(Exception):
    """The server does not say; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Look:
    """What the server said, and when."""

    time: float
    """time.monotonic()."""
    status: ServerStatus

    def engine(self, model: str, device: str) -> Engine | None:
        """The engine of a model on a device."""
        return next((each for each in self.status.engines if (each.model, each.device) == (model, device)), None)


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = (
        "Show a running server's models, engines, processes and memory, live. It needs /admin: an admin key in the variable "
        f"{client_key.VARIABLE}, or the server's --admin-socket."
    )
    parser.add_argument("--url", type=URL, default=URL("http://127.0.0.1:8000"), help="the server (default: %(default)s)")
    parser.add_argument("--socket", metavar="FILE", type=Path, help="its --admin-socket, instead of --url")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=1.0, help="between two looks (default: %(default)g)")
    parser.add_argument("--once", action="store_true", help="look once, over that time, and end")


def run(args: argparse.Namespace) -> int:
    """Look until Ctrl-C; gives the exit code."""
    console = Console(highlight=False)
    try:
        asyncio.run(_watch(console, args.url, args.socket, max(0.1, args.every), args.once))
    except KeyboardInterrupt:
        return 0
    except TopError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"engineshed top: {error}", markup=False)
        return 1
    return 0


async def _watch(console: Console, url: URL, socket: Path | None, every: float, once: bool) -> None:
    connector = None if socket is None else aiohttp.UnixConnector(str(socket))
    base = url if socket is None else URL("http://admin")
    timeout = aiohttp.ClientTimeout(10)
    async with aiohttp.ClientSession(base, connector=connector, headers=client_key.headers(), timeout=timeout) as http:
        before = await _look(http, socket or url)
        if once:
            await asyncio.sleep(every)
            console.print(screen(before, await _look(http, socket or url)))
            return
        with Live(screen(before, before), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(every)
                now = await _look(http, socket or url)
                live.update(screen(before, now), refresh=True)
                before = now


async def _look(http: aiohttp.ClientSession, where: URL | Path) -> Look:
    try:
        async with http.get("/admin/status") as response:
            body = await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise TopError(
            f"no server answers at {where} ({error or 'it took too long'}); start one with: engineshed serve"
        ) from None
    try:
        if response.status != 200:
            raise TopError(msgspec.json.decode(body, type=ErrorBody).error.message)
        return Look(time.monotonic(), msgspec.json.decode(body, type=ServerStatus))
    except msgspec.DecodeError:
        raise TopError(f"what answers at {where} is no engineshed of this version") from None


def screen(before: Look, now: Look) -> RenderableType:
    """Everything, with rates since `before`."""
    return Group(
        _engines(before, now), Text(), _models(now.status), Text(), _memory(now.status), Text(), _processes(now.status)
    )


def _engines(before: Look, now: Look) -> Table:
    columns = (
        "engine",
        "state",
        "slots",
        "waiting",
        "tok/s",
        "prompt tok/s",
        "reused",
        "batch",
        "step",
        "KV tokens",
        "restarts",
    )
    table = _table(columns)
    for engine in now.status.engines:
        table.add_row(*_engine(engine, before.engine(engine.model, engine.device), now.time - before.time))
    return table


def _engine(engine: Engine, before: Engine | None, seconds: float) -> Iterable[str | Text]:
    beat, past = engine.beat, before.beat if before is not None else None
    state = "draining" if engine.draining else engine.state
    yield f"{engine.model}@{engine.device}"
    yield _state(state)
    if beat is None:
        yield from ("", "", "", "", "", "", "", "", str(engine.restarts))
        return
    if past is None or past.steps > beat.steps:  # another process than before
        past = beat
    prompt, cached = beat.prompt_tokens - past.prompt_tokens, beat.cached_tokens - past.cached_tokens
    steps, decodes = beat.steps - past.steps, beat.decode_steps - past.decode_steps
    yield f"{beat.running}/{engine.slots}"
    yield f"{beat.waiting}/{engine.queue}"
    yield f"{(beat.generated_tokens - past.generated_tokens) / max(seconds, 1e-9):,.0f}"
    yield f"{prompt / max(seconds, 1e-9):,.0f}"
    yield f"{cached / (prompt + cached):.0%}" if prompt + cached else "-"
    yield f"{(beat.rows - past.rows) / decodes:.1f}" if decodes else "-"
    yield f"{1000 * (beat.step_seconds - past.step_seconds) / steps:.1f} ms" if steps else "-"
    yield f"{beat.kv_tokens:,}"
    yield str(engine.restarts)


def _models(status: ServerStatus) -> Table:
    table = _table(("model", "state", "why"), left=3)
    for model in status.models:
        table.add_row(model.name, _state(model.state), model.reason)
    return table


def _memory(status: ServerStatus) -> Table:
    table = _table(("device", "reserved", "of"))
    for memory in status.memory:
        table.add_row(memory.device, f"{memory.reserved >> 20:,} MiB", f"{memory.budget >> 20:,} MiB")
    return table


def _processes(status: ServerStatus) -> Table:
    table = _table(("process", "pid", "resident", "restarts"))
    for process in status.processes:
        table.add_row(process.name, str(process.pid), f"{process.rss >> 20:,} MiB", str(process.restarts))
    return table


def _table(names: Sequence[str], left: int = 2) -> Table:
    columns = [Column(name, justify="left" if place < left else "right", no_wrap=place < 2) for place, name in enumerate(names)]
    return Table(*columns, box=None, padding=(0, 1, 0, 0))


def _state(state: str) -> Text:
    return Text(state, style=_STATE_STYLES.get(state, "red"))
