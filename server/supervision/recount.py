"""Everybody's numbers as they stand now: a scrape would otherwise read what the last heartbeat said, up to a second ago."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection

from runtime.messages import HEARTBEAT_SECONDS
from server.engine_client import EngineClient
from server.fleet import CountsRequest


class Recount:
    """Asks the HTTP processes and the workers, with `send` for a message to an HTTP process."""

    def __init__(self, send: Callable[[bytes, CountsRequest], Awaitable[None]]) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._asked: dict[tuple[bytes, int], asyncio.Future[None]] = {}

    async def everybody(self, fronts: Collection[bytes], engines: Collection[EngineClient]) -> None:
        """Return once each of them has said how things stand, HTTP processes to `take`, workers to their connections.

        Who does not say within HEARTBEAT_SECONDS hangs, or is within a long step: of it counts what it said last.
        """
        id_ = next(self._ids)
        asked = {(owner, id_): asyncio.get_running_loop().create_future() for owner in fronts}
        self._asked |= asked
        try:
            for owner in fronts:
                await self._send(owner, CountsRequest(id_))
            beats = [engine.beat() for engine in engines if engine.ready is not None]
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await asyncio.gather(*asked.values(), *beats, return_exceptions=True)
        except TimeoutError:
            pass
        finally:
            for key in asked:
                del self._asked[key]

    def take(self, owner: bytes, id_: int) -> None:
        """The HTTP process `owner` has answered the request of that id."""
        answer = self._asked.get((owner, id_))
        if answer is not None and not answer.done():
            answer.set_result(None)

    def leave(self, owner: bytes) -> None:
        """The HTTP process `owner` will answer nothing more."""
        for gone, id_ in list(self._asked):
            if gone == owner:
                self.take(owner, id_)
