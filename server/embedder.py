"""A model for embeddings as requests use it: texts become tokens, and its engines make vectors of them."""

import logging
import time

import msgspec
import numpy as np
import numpy.typing as npt
from aiohttp import web

from runtime.messages import Embed, Embedded
from server.access import CLIENT
from server.attempts import MOST, found
from server.doors import Limits
from server.engine_client import EngineUnavailableError
from server.generation import ENDINGS, told
from server.journal import ENTRY
from server.served import Served

Floats = npt.NDArray[np.float32]

log = logging.getLogger(__name__)


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of one request."""

    prompt_tokens: int
    total_tokens: int

    @property
    def completion_tokens(self) -> int:
        """None: nothing is generated."""
        return 0


class Counted(msgspec.Struct, frozen=True):
    """What the log's line says of a request."""

    usage: EmbeddingUsage


class Embedder(Served):
    """One build of a model for embeddings behind one engine, which may run on several devices."""

    async def embed(self, request: web.Request, inputs: list[list[int]], limits: Limits) -> Floats:
        """The embeddings [inputs, dimensions] of `inputs`, none of them empty or longer than the model takes.

        An engine that stops before it answers is asked for once more, or the one that takes its place. Raises ApiError.
        """
        tokens = sum(map(len, inputs))
        left = limits.after(time.perf_counter() - request[ENTRY].arrived)
        request[ENTRY].model = self.name
        request[ENTRY].answer = Counted(EmbeddingUsage(tokens, tokens))
        wanted = Embed(
            id="",
            inputs=inputs,
            client=request[CLIENT].name,
            priority=request[CLIENT].priority,
            queue_seconds=left.queue_seconds,
            total_seconds=left.total_seconds,
        )
        try:
            embedded, device = await self._ask(wanted)
        except ENDINGS as error:
            raise told(error) from None
        self._metrics.of(self.name, device).prompt_tokens.inc(tokens)
        return np.frombuffer(embedded.vectors, "<f4").reshape(-1, embedded.dimensions)

    async def _ask(self, wanted: Embed) -> tuple[Embedded, str]:
        """The engine's answer, and the device that it is from."""
        for attempt in range(1, MOST + 1):
            client = await found(self._other)
            device = self._device(client)
            try:
                return await client.embed(wanted), device
            except EngineUnavailableError:
                if attempt == MOST:
                    raise
                log.info("a request whose engine stopped before it answered is asked for again")
        raise AssertionError("the last attempt returns or raises")
