"""The connection to one engine worker: requests out, each one's rows back as they come.

Everything happens in the event loop's thread and nothing waits: a message is taken from the socket, and its rows are
put where their requests look for them, in one callback.
"""

import asyncio
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import msgspec
import zmq

from runtime import messages
from runtime.messages import (
    Attach,
    Cancel,
    Embed,
    Embedded,
    Generate,
    Heartbeat,
    HeartbeatAnswer,
    HeartbeatRequest,
    Progress,
    Ready,
    Refused,
    Row,
)

PENDING_TOKENS = 1024
"""Tokens that may wait for a client that reads too slowly; then its request is cancelled."""

AT_ONCE = 16
"""Messages that are taken before the answers' readers run. An engine that is quicker than this process, if only while it
catches up, would otherwise keep them from running until each is too far behind; more at once would save no time."""


class EngineUnavailableError(Exception):
    """There is no engine to ask, or the one that was asked is gone."""


class RequestRefusedError(Exception):
    """The worker did not take a request; nothing of it ran."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.reason = refused.reason


class RequestFailedError(Exception):
    """The engine failed on a request that it had taken."""


class RequestUnmetError(Exception):
    """The answer cannot keep to what the request has it keep to."""


class RequestTimedOutError(Exception):
    """The request's own limit of time, to wait or altogether, is over."""


class SlowReaderError(Exception):
    """The answer's reader fell more than PENDING_TOKENS behind."""


class Answer:
    """The rows of one request, as they come."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._pending = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def rows(self) -> list[Row]:
        """Every row that came since the last call, at least one; raises what ended the request other than a finish.

        To be called until a row has a finish, and not again after.
        """
        if not self._rows and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._rows and self._error is not None:
            raise self._error
        rows, self._rows, self._pending = self._rows, [], 0
        return rows

    @property
    def overfull(self) -> bool:
        """Whether the reader has fallen too far behind."""
        return self._pending > PENDING_TOKENS

    def push(self, row: Row) -> None:
        """Give the reader a row."""
        self._pending += len(row.tokens)
        self._rows.append(row)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the request with `error`, after the rows that are already there."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Vectors:
    """The embeddings of one request, once they are there."""

    def __init__(self) -> None:
        self._came: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()

    async def embedded(self) -> Embedded:
        """Wait for them; raises what ended the request instead. To be called once."""
        return await self._came

    def take(self, embedded: Embedded) -> None:
        """Give them to who waits."""
        if not self._came.done():
            self._came.set_result(embedded)

    def fail(self, error: Exception) -> None:
        """End the request with `error`."""
        if not self._came.done():
            self._came.set_exception(error)


class EngineSource(Protocol):
    """Where the HTTP code finds a worker that takes requests."""

    @property
    def client(self) -> "EngineClient | None":
        """The connection to a worker that is ready, or None while there is none."""
        ...


class EngineClient:
    """One front end's DEALER socket to the worker at `address`; to be made inside the event loop that runs it."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # The worker's ROUTER would silently drop what is over a limit.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(address)
        self._descriptor: int = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._descriptor, self.receive)
        self._receiving_soon = False
        self._answers: dict[str, Answer | Vectors] = {}
        self._ids = (f"{os.getpid()}-{count}" for count in itertools.count())
        self._beats: dict[int, asyncio.Future[Heartbeat]] = {}
        """Heartbeats that were asked for, by their numbers."""
        self._beat_numbers = itertools.count(1)
        self._attached: asyncio.Future[Ready] = self._loop.create_future()
        self.heartbeat: Heartbeat | None = None
        """The worker's last."""
        self.heard = self._loop.time()
        """The event loop's time at the worker's last message."""
        self._others = 0
        """Requests of other front ends, as of the last heartbeat."""

    @property
    def ready(self) -> Ready | None:
        """What the worker said of itself once it had loaded its engine; None until then and after `close`."""
        return self._attached.result() if self._attached.done() and not self._socket.closed else None

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._answers)

    @property
    def outstanding(self) -> int:
        """Requests that have not ended, those of other front ends among them as far as they are known of."""
        return len(self._answers) + self._others

    async def attach(self) -> Ready:
        """Announce this front end and wait, for as long as it takes, until the worker has loaded its engine."""
        self._send(Attach())
        return await asyncio.shield(self._attached)

    async def beat(self) -> Heartbeat:
        """What the worker holds now, which it says between two of its steps. Raises what the connection ends with."""
        number = next(self._beat_numbers)
        beat: asyncio.Future[Heartbeat] = self._loop.create_future()
        self._beats[number] = beat
        try:
            self._send(HeartbeatRequest(number))
            return await beat
        finally:
            del self._beats[number]

    @contextmanager
    def generate(self, request: Generate) -> Iterator[Answer]:
        """Start a request, whose id is this connection's matter; leaving the context before its end cancels it at once."""
        answer = Answer()
        with self._asking(request, answer):
            yield answer

    async def embed(self, request: Embed) -> Embedded:
        """The embeddings that `request` asks for, whose id is this connection's matter; cancelled, so is the request."""
        vectors = Vectors()
        with self._asking(request, vectors):
            return await vectors.embedded()

    @contextmanager
    def _asking(self, request: Generate | Embed, answer: Answer | Vectors) -> Iterator[None]:
        id_ = next(self._ids)
        self._answers[id_] = answer
        self._send(msgspec.structs.replace(request, id=id_))
        try:
            yield
        finally:
            if self._answers.pop(id_, None) is not None:
                self._send(Cancel(id_))

    def receive(self) -> None:
        """Take the messages that have arrived, and come back for what is left once the answers' readers have run."""
        for _ in range(AT_ONCE):
            if self._socket.closed:
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.heard = self._loop.time()
            self._dispatch(messages.decode_reply(frame))
        self._receive_soon()

    def close(self, error: Exception) -> None:
        """End every request with `error` and let the connection go."""
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer.fail(error)
        for beat in self._beats.values():
            if not beat.done():
                beat.set_exception(error)
        self._attached.cancel()
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._socket.close()

    def _send(self, message: messages.Request) -> None:
        self._socket.send(messages.encode(message), zmq.NOBLOCK)
        # The descriptor only signals a change, and sending may have taken note of a message that arrived meanwhile.
        if self._socket.poll(0):
            self._receive_soon()

    def _receive_soon(self) -> None:
        if not self._receiving_soon:  # Two in one turn would take twice what a turn may.
            self._receiving_soon = True
            self._loop.call_soon(self._receive_now)

    def _receive_now(self) -> None:
        self._receiving_soon = False
        self.receive()

    def _dispatch(self, reply: messages.Reply) -> None:
        match reply:
            case Progress(rows):
                for row in rows:
                    self._deliver(row)
            case Embedded(id_):
                asked = self._answers.pop(id_, None)
                if isinstance(asked, Vectors):
                    asked.take(reply)
            case Heartbeat():
                self._take(reply)
            case HeartbeatAnswer(number, heartbeat):
                self._take(heartbeat)
                beat = self._beats.get(number)
                if beat is not None and not beat.done():
                    beat.set_result(heartbeat)
            case Refused(id_):
                answer = self._answers.pop(id_, None)
                if answer is not None:
                    answer.fail(RequestRefusedError(reply))
            case Ready() if not self._attached.done():
                self._attached.set_result(reply)

    def _take(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self._others = max(0, heartbeat.running + heartbeat.waiting - len(self._answers))

    def _deliver(self, row: Row) -> None:
        answer = self._answers.get(row.id)
        if answer is None:
            return
        if row.finish is not None:
            del self._answers[row.id]
        match row.finish:
            case "error":
                answer.fail(RequestFailedError(row.message))
            case "unmet":
                answer.fail(RequestUnmetError(row.message))
            case "timeout":
                answer.fail(RequestTimedOutError(row.message))
            case "cancelled":
                answer.fail(EngineUnavailableError("the engine stopped before the answer was complete"))
            case _ if isinstance(answer, Answer):
                answer.push(row)
        if isinstance(answer, Answer) and answer.overfull and row.id in self._answers:
            del self._answers[row.id]
            self._send(Cancel(row.id))
            answer.fail(SlowReaderError(f"the client reads too slowly: {PENDING_TOKENS} tokens waited for it"))
