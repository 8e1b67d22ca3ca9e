"""What a client wants its answer to keep to: as a `Constraint`, and whether it is possible at all.

What is built here is only well-formed. `check` has it compiled by a process that can be killed (`server.compiling`), so that
neither this process nor an engine's ever meets a grammar that takes minutes or gigabytes.
"""

import asyncio
import hashlib
import itertools
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec

from runtime.bundle import TOKENIZER, Bundle
from runtime.messages import Constraint
from server.closing import closed
from server.compiling import Question, Verdict, Vocabulary
from server.errors import bad_request, unavailable

LONGEST = 256 << 10
"""Bytes of a schema, a regular expression or a grammar. OpenAI's limit for schemas comes to less."""
REMEMBERED = 1024
"""Constraints whose verdict is remembered."""
MOST_WAITING = 256
"""Constraints that may wait for theirs."""
_LONGEST_LINE = 1 << 16
"""Bytes of a verdict."""
_ALONE = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
"""A process that forks has no other threads; and the address space of a second arena would count as memory that was taken."""


def json_object() -> Constraint:
    """Any JSON object."""
    return Constraint("json_schema", '{"type":"object"}')


def json_schema(schema: Any, *, of: str) -> Constraint:
    """JSON that `schema` describes: a dictionary or True, from the body's field `of`. Raises ApiError 400.

    Objects have no properties but those that are named, where some are; see `closing`.
    """
    if not isinstance(schema, dict) and schema is not True:
        raise bad_request(f"The value of {of!r} must be a JSON schema, which is an object.", of)
    try:
        source = msgspec.json.encode({} if schema is True else closed(schema)).decode()
    except RecursionError:
        raise bad_request(f"The JSON schema in {of!r} is nested too deeply.", of) from None
    return _bounded(Constraint("json_schema", source), of)


def regex(pattern: str, *, of: str) -> Constraint:
    """Text that `pattern`, a regular expression of Rust's `regex`, matches as a whole, from field `of`. Raises ApiError 400."""
    return _bounded(Constraint("regex", pattern), of)


def choice(options: list[str], *, of: str) -> Constraint:
    """One of `options`, as it stands, from the field `of`. Raises ApiError 400."""
    if not options or not all(options):
        raise bad_request(f"{of!r} must name one option at least, and none that is empty.", of)
    # One terminal, not a rule: thousands of alternatives are then one automaton.
    return _bounded(Constraint("lark", "start: OPTION\nOPTION: " + " | ".join(map(json.dumps, options))), of)


def lark(grammar: str, *, of: str) -> Constraint:
    """Text of `grammar`, in llguidance's Lark, from the field `of`. Raises ApiError 400."""
    return _bounded(Constraint("lark", grammar), of)


def vocabulary(folder: Path, bundle: Bundle) -> Vocabulary:
    """What the answers of the bundle in `folder` are made of, for `check`."""
    return Vocabulary(str((folder / TOKENIZER).absolute()), bundle.tokenizer or "", bundle.vocab_size, bundle.stop_ids)


async def check(constraint: Constraint, tokens: Vocabulary, *, of: str) -> None:
    """Raise ApiError 400 where no answer of `tokens` can keep to `constraint`, which came in the body's field `of`; 503 where
    too many wait to be told.

    Takes milliseconds, or none where it is known already; what cannot be told within `compiling.CPU_SECONDS` is refused.
    """
    flaw = await _here().flaw(constraint, tokens)
    if flaw:
        raise bad_request(f"The value of {of!r} cannot be kept to: {flaw}.", of)


async def close() -> None:
    """End the process that compiles."""
    global _checker
    if _checker is not None:
        checker, _checker = _checker, None
        await checker.close()


class Checker:
    """The process that tries constraints out, started at the first question, and what it has said. It is of one event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._process: Process | None = None
        self._starting = asyncio.Lock()
        self._listening: asyncio.Task[None] | None = None
        self._ids = itertools.count()
        self._asked: dict[int, asyncio.Future[str]] = {}
        self._known: OrderedDict[tuple[str, bytes, Vocabulary], asyncio.Future[str]] = OrderedDict()
        """Flaws, those that were asked for last at the end."""

    async def flaw(self, constraint: Constraint, tokens: Vocabulary) -> str:
        """Why no answer can keep to `constraint`; empty where some can. Raises ApiError 503."""
        key = constraint.kind, hashlib.sha256(constraint.source.encode()).digest(), tokens
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = asyncio.ensure_future(self._ask(constraint, tokens))
            known.add_done_callback(lambda done: self._forget(key, done))
        self._known.move_to_end(key)
        try:
            return await asyncio.shield(known)  # others may wait for the same
        except (OSError, EOFError) as error:
            raise unavailable(f"What the answer is to keep to could not be checked ({error}). Try again in a moment.") from None

    async def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
        if self._listening is not None:
            await self._listening

    async def _ask(self, constraint: Constraint, tokens: Vocabulary) -> str:
        if len(self._asked) >= MOST_WAITING:
            raise OSError(f"{len(self._asked)} others wait for that")
        id_ = next(self._ids)
        verdict = self._asked[id_] = self.loop.create_future()
        try:
            process = await self._running()
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(Question(id_, constraint, tokens)) + b"\n")
            flaw: str = await verdict
        finally:
            self._asked.pop(id_, None)
        return flaw

    def _forget(self, key: tuple[str, bytes, Vocabulary], done: asyncio.Future[str]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._known.pop(key, None)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    async def _running(self) -> Process:
        async with self._starting:
            if self._process is None:
                environment = {**os.environ, **_ALONE, "PYTHONPATH": _path()}
                command = [sys.executable, "-P", "-m", "server.compiling"]
                self._process = await asyncio.create_subprocess_exec(
                    *command, stdin=PIPE, stdout=PIPE, env=environment, limit=_LONGEST_LINE
                )
                self._listening = self.loop.create_task(self._listen(self._process))
            return self._process

    async def _listen(self, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            verdict = msgspec.json.decode(line, type=Verdict)
            future = self._asked.get(verdict.id)
            if future is not None and not future.done():
                future.set_result(verdict.flaw)
        self._process = None
        for future in self._asked.values():
            if not future.done():
                future.set_exception(EOFError("the process that does it has ended"))


def _bounded(constraint: Constraint, of: str) -> Constraint:
    try:
        size = len(constraint.source.encode())
    except UnicodeEncodeError:
        raise bad_request(f"The value of {of!r} has half of a surrogate pair; send whole characters.", of) from None
    if size > LONGEST:
        raise bad_request(f"The value of {of!r} has {size} bytes; at most {LONGEST} are taken.", of)
    return constraint


def _here() -> Checker:
    """The checker of this process and the running event loop."""
    global _checker
    if _checker is None or _checker.loop is not asyncio.get_running_loop():
        _checker = Checker()
    return _checker


def _path() -> str:
    """Where the process has its code from: where this one has it."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


_checker: Checker | None = None
