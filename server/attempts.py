"""A request that outlives the engine it was sent to, as long as nothing of its answer has been handed out.

An answer that has begun cannot be taken up elsewhere: which of its tokens the client has seen, nobody knows. One that has not
is asked for again, of another engine or of the one that takes the dead one's place, and the client only waits longer.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from runtime.messages import Generate, Ready, Row
from server.engine_client import Answer, EngineClient, EngineUnavailableError

MOST = 2
"""Engines that one request may be sent to: one that ends each engine is no better off with a third, and must not be what
makes a worker die as often in a row as gets its model quarantined."""
PATIENCE_SECONDS = 60.0
"""How long a request waits for an engine that takes the place of its own."""
_LOOK_SECONDS = 0.05

log = logging.getLogger(__name__)

Find = Callable[[], EngineClient | None]
"""Gives an engine that takes requests now, or None."""


async def found(find: Find) -> EngineClient:
    """What `find` gives, as soon as it gives an engine. Raises EngineUnavailableError once that took `PATIENCE_SECONDS`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while (client := find()) is None:
        if loop.time() > deadline:
            raise EngineUnavailableError(
                f"The engine stopped, and no other was ready within {PATIENCE_SECONDS:.0f} seconds. Try again later."
            )
        await asyncio.sleep(_LOOK_SECONDS)
    return client


class Attempts:
    """The rows of `request`, from whichever engine gives them; leaving the context cancels it.

    Begins with `client`, or without one as soon as `find` gives one, which also says where to go on.
    """

    def __init__(self, request: Generate, client: EngineClient | None, find: Find) -> None:
        self._request, self._find = request, find
        self._first = client
        self.ready: Ready | None = None
        """What the engine that it was sent to last said of itself: once there are rows, they are that engine's."""
        self._made = 0
        self._started = False

    def __enter__(self) -> Self:
        """Send it for the first time."""
        self._open = ExitStack()
        self._answer: Answer | None
        self._answer = None if self._first is None else self._ask(self._first)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    async def rows(self) -> list[Row]:
        """See `server.engine_client.Answer.rows`."""
        while True:
            if self._answer is None:
                self._answer = await self._again()
            try:
                rows = await self._answer.rows()
            except EngineUnavailableError:
                if self._started or self._made == MOST:
                    raise
                self._answer = None
            else:
                self._started = True
                return rows

    def _ask(self, client: EngineClient) -> Answer:
        self._open.close()
        self._made += 1
        self.ready = client.ready
        return self._open.enter_context(client.generate(self._request))

    async def _again(self) -> Answer:
        client = await found(self._find)
        if self._made:
            log.info("a request whose engine stopped before it answered is asked for again")
        return self._ask(client)
