"""The HTTP process's line to the supervisor."""

import asyncio
import itertools
from collections.abc import Callable
from typing import TypeVar

import zmq

from server import fleet
from server.fleet import Action, Ask, Command, Counts, CountsRequest, Demand, Down, Fleet, Join, Outcome, Sample, Status, Up

ANSWER_SECONDS = 10.0
"""How long the supervisor gets to tell its status."""
Reply = TypeVar("Reply", Outcome, Status)


class Control:
    """A DEALER socket to the supervisor at `address`; to be made inside the event loop that runs it.

    `tell` is called with each `Fleet`; `samples` gives what this process has counted so far.
    """

    def __init__(self, address: str, tell: Callable[[Fleet], None], samples: Callable[[], tuple[Sample, ...]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._tell = tell
        self._samples = samples
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._descriptor: int = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._descriptor, self._receive)
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Outcome] | asyncio.Future[Status]] = {}

    def join(self, name: str) -> None:
        """Say that this process takes requests, and want to know the fleet."""
        self.send(Join(name))

    def send(self, message: Join | Demand) -> None:
        """Say what needs no answer."""
        self._send(message)

    def count(self, id_: int = 0) -> None:
        """Say what this process has counted so far; `id_` is that of the `CountsRequest`, if there is one."""
        self._send(Counts(self._samples(), id_))

    async def command(self, action: Action, model: str) -> Outcome:
        """Have something done with a model, however long it takes."""
        id_, reply = next(self._ids), self._loop.create_future()
        return await self._answered(Command(id_, action, model), id_, reply, None)

    async def status(self) -> Status:
        """What all processes do and hold; what this one has counted is among it to the last.

        Raises TimeoutError where the supervisor does not say.
        """
        self.count()
        id_, reply = next(self._ids), self._loop.create_future()
        return await self._answered(Ask(id_), id_, reply, ANSWER_SECONDS)

    def close(self) -> None:
        """Let the connection go; whoever waits for an answer waits no longer."""
        for reply in self._replies.values():
            reply.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.close()

    async def _answered(self, message: Up, id_: int, reply: "asyncio.Future[Reply]", seconds: float | None) -> Reply:
        self._replies[id_] = reply
        try:
            self._send(message)
            async with asyncio.timeout(seconds):
                return await reply
        finally:
            del self._replies[id_]

    def _send(self, message: Up) -> None:
        self._socket.send(fleet.encode(message), zmq.NOBLOCK)
        # The descriptor only signals a change, and sending may have taken note of a message that arrived meanwhile.
        if self._socket.poll(0):
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        while not self._socket.closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(fleet.decode_down(frame))

    def _take(self, message: Down) -> None:
        if isinstance(message, Fleet):
            self._tell(message)
            return
        if isinstance(message, CountsRequest):
            self.count(message.id)
            return
        reply = self._replies.get(message.id)
        if reply is not None and not reply.done():
            reply.set_result(message)  # type: ignore[arg-type]  # each id is of one kind
