"""Whether answers can keep to a constraint at all, as the process says that tries each one out (`server.compiling`).

So neither this process nor an engine's ever meets a grammar that takes minutes or gigabytes. Whoever asks waits in the row of
its client, and the clients take turns, so that one with many bombs holds up itself.
"""

import asyncio
import hashlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from aiohttp import web

from runtime.messages import Constraint
from server.compiling import AT_ONCE, Question, Verdict, Vocabulary
from server.doors import Limits
from server.errors import ApiError, bad_request, unavailable

log = logging.getLogger(__name__)

REMEMBERED = 1024
"""Constraints whose flaws, or that they have none, are remembered."""
MOST_OPEN = 256
"""Constraints that may be without a verdict."""
MOST_OF_A_CLIENT = 32
"""The same for each client that has a key. Those without one cannot be told apart, so that all of them share `MOST_OPEN`."""
_CLOSING_SECONDS = 2.0
"""That the process gets to end by itself."""
_LONGEST_LINE = 1 << 16
"""Bytes of a verdict."""
COMMAND = ("-P", "-m", "server.compiling")
"""What Python runs in the process."""
_ALONE = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
"""A process that forks has no other threads; and the address space of a second arena would count as memory that was taken."""

_Key = tuple[str, bytes, Vocabulary]
"""A constraint's kind, the hash of its source, and what answers are made of."""


@dataclass(eq=False)
class _Open:
    """A question without a verdict."""

    key: _Key
    constraint: Constraint
    client: str
    """Who asked first, for whom it counts."""
    verdict: asyncio.Future[Verdict]
    waiters: int = 0
    """Requests that want to know."""


@dataclass(eq=False)
class _Work:
    """A process, and what it is busy with."""

    process: Process
    tried: dict[int, _Open] = field(default_factory=dict)
    """By the ids of the questions."""


class Checker:
    """Asks the process, which is started at the first question, and remembers what it has said. Of one event loop."""

    def __init__(self) -> None:
        self._known: OrderedDict[_Key, str] = OrderedDict()
        """Flaws, those that were asked for last at the end."""
        self._open: dict[_Key, _Open] = {}
        self._rows: OrderedDict[str, dict[_Key, _Open]] = OrderedDict()
        """Of `_open` those whose turn comes later, by clients; the first client is the next."""
        self._work: _Work | None = None
        self._working: asyncio.Task[None] | None = None
        self._asked = 0
        self._closing = False

    async def check(self, constraint: Constraint, tokens: Vocabulary, *, of: str, client: str, limits: Limits) -> None:
        """Return once it is known that answers of `tokens` can keep to `constraint`, from the body's field `of`, for `client`,
        within `limits`.

        Takes milliseconds, or none where it is known already. Raises ApiError 400 where they cannot, or where that cannot be
        told with `compiling.CPU_SECONDS` and `compiling.MEMORY`; 429 where `client` has too many questions open; 503 where too
        many are open or the machine is at fault; 504.
        """
        seconds = min((limit for limit in (limits.queue_seconds, limits.total_seconds) if limit), default=None)
        try:
            async with asyncio.timeout(seconds):
                flaw = await self._flaw(constraint, tokens, client)
        except TimeoutError:
            raise ApiError(
                504,
                f"The value of {of!r} could not be checked within the {seconds:.2f} s that the request's limits of time left.",
                code="timeout",
            ) from None
        if flaw:
            raise bad_request(f"The value of {of!r} cannot be kept to: {flaw}.", of)

    async def close(self) -> None:
        """End the process; who still waits is told to come again."""
        self._closing = True
        if self._work is not None and self._work.process.stdin is not None:
            self._work.process.stdin.close()
        if self._working is not None:
            done, _ = await asyncio.wait([self._working], timeout=_CLOSING_SECONDS)
            if not done:
                self._working.cancel()
                await asyncio.wait([self._working])

    async def _flaw(self, constraint: Constraint, tokens: Vocabulary, client: str) -> str:
        """Why no answer can keep to `constraint`; empty where some can. Raises ApiError 429, 503."""
        key = constraint.kind, hashlib.sha256(constraint.source.encode()).digest(), tokens
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        question = self._open.get(key) or self._ask(key, constraint, client)
        question.waiters += 1
        try:
            verdict = await asyncio.shield(question.verdict)  # others may wait for the same
        finally:
            question.waiters -= 1
            if not question.waiters:
                self._leave(question)
        if not verdict.final:
            raise unavailable(f"What the answer is to keep to could not be checked: {verdict.flaw}. Try again in a moment.")
        return verdict.flaw

    def _ask(self, key: _Key, constraint: Constraint, client: str) -> _Open:
        if len(self._open) >= MOST_OPEN:
            raise unavailable(f"What the answer is to keep to cannot be checked now: {len(self._open)} others wait for that.")
        if client and sum(question.client == client for question in self._open.values()) >= MOST_OF_A_CLIENT:
            raise ApiError(
                429,
                f"{MOST_OF_A_CLIENT} constraints of this key wait to be checked already; send the next when they have been.",
                code="too_many_constraints",
                headers={"Retry-After": "1"},
            )
        question = _Open(key, constraint, client, asyncio.get_running_loop().create_future())
        self._open[key] = question
        self._rows.setdefault(client, {})[key] = question
        if self._working is None:
            self._working = asyncio.create_task(self._run())
        self._send()
        return question

    def _leave(self, question: _Open) -> None:
        """Nobody waits for `question` any more: it has no turn, unless it has it already."""
        row = self._rows.get(question.client, {})
        if row.pop(question.key, None) is not None:
            del self._open[question.key]
            if not row:
                del self._rows[question.client]

    def _next(self) -> _Open | None:
        if not self._rows:
            return None
        client, row = next(iter(self._rows.items()))
        question = row.pop(next(iter(row)))
        self._rows.move_to_end(client)
        if not row:
            del self._rows[client]
        return question

    def _send(self) -> None:
        """Give the process what it has room for, if it runs."""
        work = self._work
        if work is None or work.process.stdin is None or work.process.stdin.is_closing():
            return
        while len(work.tried) < AT_ONCE and (question := self._next()) is not None:
            self._asked += 1
            work.tried[self._asked] = question
            asked = Question(self._asked, question.constraint, question.key[2])
            work.process.stdin.write(msgspec.json.encode(asked) + b"\n")

    async def _run(self) -> None:
        """One process, from its first question to its end; then nobody waits any more."""
        reason = "the process that does it has ended"
        try:
            self._work = _Work(await _start())
            self._send()
            await self._listen(self._work)
        except Exception as error:
            log.exception("the process that checks constraints cannot be worked with")
            reason = str(error)
        finally:
            work, self._work, self._working = self._work, None, None
            left, self._open = self._open, {}
            self._rows.clear()
            for question in left.values():
                question.verdict.set_result(Verdict(0, reason, final=False))
            if work is not None:
                await _end(work.process, asked_for=self._closing)

    async def _listen(self, work: _Work) -> None:
        assert work.process.stdout is not None
        async for line in work.process.stdout:
            verdict = msgspec.json.decode(line, type=Verdict)
            question = work.tried.pop(verdict.id)
            del self._open[question.key]
            question.verdict.set_result(verdict)
            if verdict.final:
                self._known[question.key] = verdict.flaw
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            self._send()


async def _start() -> Process:
    environment = {**os.environ, **_ALONE, "PYTHONPATH": _path()}
    return await asyncio.create_subprocess_exec(
        sys.executable, *COMMAND, stdin=PIPE, stdout=PIPE, env=environment, limit=_LONGEST_LINE
    )


async def _end(process: Process, *, asked_for: bool) -> None:
    """Have it end, which it does by itself when its stdin does; an end that nobody `asked_for` is told of."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_CLOSING_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
    code = await process.wait()
    if not asked_for:
        log.warning("the process that checks constraints has ended with status %d; another is started when it is needed", code)


def _path() -> str:
    """Where the process has its code from: where this one has it."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


CHECKER = web.AppKey("checker", Checker)
"""Of the process's application."""


async def checking(app: web.Application) -> AsyncIterator[None]:
    """For `cleanup_ctx`: the checker lives as long as the application."""
    app[CHECKER] = Checker()
    yield
    await app[CHECKER].close()
