"""One request on its way through the engine: tokens in, pieces of text out, and the count of both."""

import time
from typing import Literal

import msgspec

from runtime.messages import Ready, Row, Scored
from runtime.text import TextStream
from server.attempts import Attempts
from server.engine_client import (
    EngineUnavailableError,
    RequestFailedError,
    RequestRefusedError,
    RequestTimedOutError,
    RequestUnmetError,
    SlowReaderError,
)
from server.errors import ApiError, bad_request, unavailable
from server.metrics import AnswerMetrics
from server.tools import CallStarted, Content, Event, Parser

FinishReason = Literal["stop", "length", "tool_calls"]


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
    """A part of an answer that can be sent, and the tokens that completed it."""

    text: str
    """All of it, without the calls between."""
    tokens: list[int]
    logprobs: list[float]
    finish: FinishReason | None = None
    """Set in an answer's last piece, which alone may have neither text nor parts."""
    index: int = 0
    """Which of a request's answers it belongs to."""
    parts: list[Event] = []
    """Where the answer may call tools: its text and what it adds to calls, in the order in which the model wrote them."""
    tops: list[list[tuple[int, float]]] = []
    """With each token the likeliest ones in its place, if they were asked for; see `runtime.messages.Row.tops`."""
    scored: list[Scored] = []
    """In the first piece of an answer whose prompt is to be scored: the prompt's tokens from the second on."""
    stop: str | None = None
    """In an answer's last piece: the stop string before which it ended."""

    @property
    def said(self) -> list[Event]:
        """Its parts, of which the text is the only one where the answer cannot call tools."""
        return self.parts if self.parts or not self.text else [Content(self.text)]


class Generation:
    """An async iterator of an answer's pieces. Raises ApiError where the answer ends without a finish reason."""

    def __init__(
        self,
        prompt: list[int],
        arrived: float,
        answer: Attempts,
        text: TextStream,
        metrics: AnswerMetrics,
        parser: Parser | None = None,
        silent: bool = False,
    ) -> None:
        """`arrived` is time.perf_counter() when the request came; `parser` finds the calls of tools in the text.

        A `silent` answer has no tokens: what the engine was asked for is the prompt's scores.
        """
        self._prompt_tokens = len(prompt)
        self._arrived = arrived
        self._answer = answer
        self._text = text
        self._metrics = metrics
        self._parser = parser
        self._silent = silent
        self._started = False
        self._last_token: float | None = None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[list[tuple[int, float]]] = []
        self._scored: list[Scored] = []
        self._called = False
        self._cached = 0
        self._completion_tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def engine(self) -> Ready | None:
        """What the engine that gives the answer said of itself; None until there is one."""
        return self._answer.ready

    @property
    def usage(self) -> Usage:
        """The tokens up to the last piece that was given, and with it."""
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return Usage(prompt, completion, prompt + completion, PromptDetails(self._cached))

    def __aiter__(self) -> "Generation":
        """The answer's pieces, once."""
        return self

    async def __anext__(self) -> Piece:
        """The next piece, as soon as it shows something."""
        if self.finish_reason is not None:
            raise StopAsyncIteration
        text = ""
        parts: list[Event] = []
        while not text and not parts and self.finish_reason is None:
            try:
                rows = await self._answer.rows()
            except ENDINGS as error:
                raise told(error) from None
            for row in rows:
                text += self._take(row)
            if self._parser is not None:
                parts = self._read(self._parser, text)
                text = "".join([part.text for part in parts if isinstance(part, Content)])
        piece = Piece(text, self._tokens, self._logprobs, self._reason(), 0, parts, self._tops, self._scored, self._text.stop)
        self._tokens, self._logprobs, self._tops, self._scored = [], [], [], []
        return piece

    def _reason(self) -> FinishReason | None:
        return "tool_calls" if self._called and self.finish_reason == "stop" else self.finish_reason

    def _read(self, parser: Parser, text: str) -> list[Event]:
        """What `text` makes certain of the answer's content and of its calls."""
        parts = parser.feed(text) if text else []
        if self.finish_reason is not None:
            parts += parser.finish()
        self._called = self._called or any(isinstance(part, CallStarted) for part in parts)
        return parts

    def _take(self, row: Row) -> str:
        """Count a row's tokens and give the text that they complete."""
        if self.finish_reason is not None:
            return ""
        text, taken = self._text.take(row.tokens) if not self._silent else ("", 0)
        self._tokens += row.tokens[:taken]
        self._logprobs += row.logprobs[:taken]
        self._tops += row.tops[:taken]
        self._scored += row.prompt
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


ENDINGS = (
    RequestRefusedError,
    EngineUnavailableError,
    RequestFailedError,
    RequestTimedOutError,
    RequestUnmetError,
    SlowReaderError,
)


def told(error: Exception) -> ApiError:
    """What the client is told of an answer that ended without a finish reason, by one of `ENDINGS`."""
    match error:
        case RequestRefusedError(reason="queue full"):
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        case RequestRefusedError():
            return bad_request(str(error))
        case EngineUnavailableError():
            return unavailable(str(error))
        case RequestUnmetError():
            return bad_request(f"{str(error)[:1].upper()}{str(error)[1:]}.", code="constraint_unmet")
        case RequestTimedOutError():
            return ApiError(504, str(error), code="timeout")
        case SlowReaderError():
            return ApiError(408, str(error), code="slow_reader")
        case _:
            return ApiError(500, str(error), code="engine_error")
