"""A stand-in at the process border: an engine worker that says what a test tells it to say.

It speaks the real messages over a real socket; everything in front of it, down to the tokenizer, is the real thing.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import msgspec
import zmq
import zmq.asyncio

from runtime import messages
from runtime.messages import (
    Attach,
    Cancel,
    Finish,
    Generate,
    Heartbeat,
    HeartbeatAnswer,
    HeartbeatRequest,
    Progress,
    Ready,
    Refused,
    Reply,
    Row,
)
from runtime.text import Text
from server.engine_client import EngineClient
from tests.waiting import HANGS_SECONDS

READY = Ready(model="tiny", variant="cpu-int4", slots=2, context=64, queue=4, vocab_size=256, pid=os.getpid())
IDLE = Heartbeat(
    running=0,
    waiting=0,
    kv_tokens=0,
    steps=0,
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    guessed_tokens=0,
    accepted_tokens=0,
    step_seconds=0.0,
)
Kind = TypeVar("Kind", Generate, Cancel)


@dataclass
class Attached:
    """Where the HTTP code finds a worker; a test can take it away."""

    client: EngineClient | None
    device: str = "cpu"


@dataclass
class ScriptedWorker:
    """The worker's end of the socket, in the test's own hands."""

    address: str
    text: Text
    ready: Ready = READY
    received: "asyncio.Queue[Generate | Cancel]" = field(default_factory=asyncio.Queue)
    held: Heartbeat = IDLE
    """What it tells who asks for a heartbeat."""

    async def __aenter__(self) -> Self:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(self.address)
        self._front_end = b""
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.cancel()
        self._socket.close(linger=0)

    async def next(self, kind: type[Kind]) -> Kind:
        """The next request that arrives, which must be of this kind."""
        message = await asyncio.wait_for(self.received.get(), HANGS_SECONDS)
        assert isinstance(message, kind), message
        return message

    async def say(self, request: Generate, text: str, finish: Finish | None = None, cached: int = 0) -> None:
        """A token for each byte of `text`, all in one row."""
        tokens = self.text.encode(text)
        await self.send(Progress([Row(request.id, tokens, [-0.5] * len(tokens), finish, cached)]))

    async def tokens(self, request: Generate, tokens: Sequence[int]) -> None:
        """A row for each of these tokens."""
        await self.send(Progress([Row(request.id, [token], [-0.5]) for token in tokens]))

    async def fail(self, request: Generate, message: str) -> None:
        """The engine's own error."""
        await self.send(Progress([Row(request.id, [], [], "error", message=message)]))

    async def refuse(self, request: Generate, message: str = "4 requests wait already") -> None:
        """No room in the queue."""
        await self.send(Refused(request.id, "queue full", message))

    async def beat(self, **numbers: float) -> None:
        """A heartbeat that differs from an idle one in `numbers`."""
        self.held = msgspec.structs.replace(IDLE, **numbers)
        await self.send(self.held)

    async def send(self, reply: Reply) -> None:
        await self._socket.send_multipart([self._front_end, messages.encode(reply)])

    async def _listen(self) -> None:
        while True:
            identity, frame = await self._socket.recv_multipart()
            match messages.decode_request(frame):
                case Attach():
                    self._front_end = identity
                    await self.send(self.ready)
                case Generate() | Cancel() as message:
                    self.received.put_nowait(message)
                case HeartbeatRequest(number):
                    await self.send(HeartbeatAnswer(number, self.held))
