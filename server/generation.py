"""One request on its way through the engine: tokens in, pieces of text out, and the count of both."""

import secrets
import time
from typing import Literal

import msgspec

from runtime.messages import Row, Sampling
from runtime.text import TextStream
from server.api.bodies import GenerationBody
from server.engine_client import (
    EngineUnavailableError,
    RequestFailedError,
    RequestRefusedError,
    RequestTimedOutError,
    Rows,
    SlowReaderError,
)
from server.errors import ApiError, bad_request, unavailable
from server.metrics import AnswerMetrics

FinishReason = Literal["stop", "length"]


class PromptDetails(msgspec.Struct, frozen=True):
    """What became of the prompt's tokens."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Piece(msgspec.Struct, frozen=True):
    """Text that can be sent, and the tokens that completed it; text is empty only in a last piece."""

    text: str
    tokens: list[int]
    logprobs: list[float]


class Generation:
    """An async iterator of an answer's pieces. Raises ApiError where the answer ends without a finish reason."""

    def __init__(self, prompt: list[int], arrived: float, answer: Rows, text: TextStream, metrics: AnswerMetrics) -> None:
        """`arrived` is time.perf_counter() when the request came."""
        self._prompt_tokens = len(prompt)
        self._arrived = arrived
        self._answer = answer
        self._text = text
        self._metrics = metrics
        self._started = False
        self._last_token: float | None = None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._cached = 0
        self._completion_tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def usage(self) -> Usage:
        """The tokens up to the last piece that was given, and with it."""
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return Usage(prompt, completion, prompt + completion, PromptDetails(self._cached))

    def __aiter__(self) -> "Generation":
        """The answer's pieces, once."""
        return self

    async def __anext__(self) -> Piece:
        """The next piece, as soon as it has text."""
        text = ""
        while not text:
            if self.finish_reason is not None:
                if not self._tokens:
                    raise StopAsyncIteration
                break
            try:
                rows = await self._answer.rows()
            except ENDINGS as error:
                raise told(error) from None
            for row in rows:
                text += self._take(row)
        piece = Piece(text, self._tokens, self._logprobs)
        self._tokens, self._logprobs = [], []
        return piece

    async def whole(self) -> Piece:
        """All that is left of the answer in one piece."""
        pieces = [piece async for piece in self]
        return Piece(
            "".join(piece.text for piece in pieces),
            [token for piece in pieces for token in piece.tokens],
            [logprob for piece in pieces for logprob in piece.logprobs],
        )

    def _take(self, row: Row) -> str:
        """Count a row's tokens and give the text that they complete."""
        if self.finish_reason is not None:
            return ""
        text, taken = self._text.take(row.tokens)
        self._tokens += row.tokens[:taken]
        self._logprobs += row.logprobs[:taken]
        self._count(row, taken)
        if row.finish is not None and not self._text.stopped:
            self.finish_reason = "length" if row.finish == "length" else "stop"
            text += self._text.finish()
        if self._text.stopped:
            self.finish_reason = "stop"
        return text

    def _count(self, row: Row, tokens: int) -> None:
        if not self._started:
            self._started = True
            self._cached = row.cached
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
            self._metrics.cached_tokens.inc(row.cached)
        if not tokens:
            return
        now = time.perf_counter()
        if self._last_token is None:
            self._metrics.first_token.observe(now - self._arrived)
        else:
            self._metrics.inter_token.observe((now - self._last_token) / tokens, tokens)
        self._last_token = now
        self._completion_tokens += tokens
        self._metrics.generated_tokens.inc(tokens)


ENDINGS = (RequestRefusedError, EngineUnavailableError, RequestFailedError, RequestTimedOutError, SlowReaderError)


def told(error: Exception) -> ApiError:
    """What the client is told of an answer that ended without a finish reason, by one of `ENDINGS`."""
    match error:
        case RequestRefusedError(reason="queue full"):
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        case RequestRefusedError():
            return bad_request(str(error))
        case EngineUnavailableError():
            return unavailable(str(error))
        case RequestTimedOutError():
            return ApiError(504, str(error), code="timeout")
        case SlowReaderError():
            return ApiError(408, str(error), code="slow_reader")
        case _:
            return ApiError(500, str(error), code="engine_error")


def sampling(body: GenerationBody) -> Sampling:
    """How a body wants its tokens chosen, with OpenAI's defaults; without a seed, a random one."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
    )
