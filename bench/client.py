"""One streamed completion, timed as its reader meets it."""

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp
import msgspec
from yarl import URL

_HEADERS = {"Content-Type": "application/json"}


class FailedError(Exception):
    """A request that was not answered to its end."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause
        """In a word or two, equal for failures of one kind: "429", "timed out"."""


@dataclass(frozen=True)
class Answer:
    """Times of one answer in seconds, counted from the moment that its asker names, and its tokens."""

    first: float
    """To the first token."""
    whole: float
    """To the end of the stream."""
    gaps: list[float]
    """Between neighbouring tokens; see `gaps`."""
    tokens: int
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompt, computed before; None where the server does not say."""
    events: int
    """In which the tokens came."""


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_decode = msgspec.json.Decoder(_Event).decode


async def ask(session: aiohttp.ClientSession, address: URL, body: bytes, since: float, seconds: float) -> Answer:
    """Stream one completion; `since` is the time.perf_counter() that its times count from.

    Raises FailedError where the answer is refused, breaks off, or takes longer than `seconds`.
    """
    stream = _Stream()
    try:
        async with (
            asyncio.timeout(seconds),
            session.post(address, data=body, headers=_HEADERS, allow_redirects=False) as response,
        ):
            if response.status != 200:
                words = " ".join((await response.text(errors="replace")).split())
                raise FailedError(str(response.status), f"it answered {response.status}: {words[:300]}")
            while data := await response.content.readany():
                stream.take(data, time.perf_counter())
    except TimeoutError:
        raise FailedError("timed out", f"an answer was not complete after {seconds:g} s") from None
    except aiohttp.ClientConnectorError as error:
        raise FailedError("no connection", refusal(error)) from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise FailedError("broken", f"the connection broke: {error!r}") from error
    except msgspec.DecodeError as error:
        raise FailedError("unreadable", f"an event is no completion chunk: {error}") from error
    return stream.answer(since, time.perf_counter())


@dataclass
class _Stream:
    """Server-sent events as they come: when each brought tokens, and how many."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Tokens up to each event, where events carry the usage so far."""
    usage: _Usage | None = None
    finished: bool = False
    error: str | None = None
    _rest: bytes = b""

    def take(self, data: bytes, now: float) -> None:
        """What one read of the socket brought. Raises msgspec.DecodeError."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        event = _decode(data)
        if bytes(event.error) != b"null":
            self.error = bytes(event.error).decode(errors="replace")
        self.usage = event.usage or self.usage
        for choice in event.choices:
            # A server may tell of a token whose text is not complete; the last event of most has a reason and no token.
            if choice.text or choice.finish_reason is None:
                self.times.append(now)
                if event.usage is not None and event.usage.completion_tokens:
                    self.counts.append(event.usage.completion_tokens)
            self.finished = self.finished or choice.finish_reason is not None

    def answer(self, since: float, end: float) -> Answer:
        """What the stream was; raises FailedError if it was no whole answer with a token."""
        if self.error is not None:
            raise FailedError("error event", f"the stream ended with an error: {self.error[:300]}")
        if not self.finished:
            raise FailedError("broken", "the stream broke off before its end")
        if not self.times:
            raise FailedError("no text", "an answer had no text; ask for more --tokens")
        usage = self.usage or _Usage(0, len(self.times))
        tokens = max(usage.completion_tokens, len(self.times))
        return Answer(
            first=self.times[0] - since,
            whole=end - since,
            gaps=gaps(self.times, tokens, self.counts if len(self.counts) == len(self.times) else None),
            tokens=tokens,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=None if usage.prompt_tokens_details is None else usage.prompt_tokens_details.cached_tokens,
            events=len(self.times),
        )


def refusal(error: aiohttp.ClientConnectorError) -> str:
    """What it means that nothing could be connected to."""
    return f"no server answers at {error.host}:{error.port} ({error.os_error.strerror or error.os_error})"


def gaps(times: list[float], tokens: int, counts: list[int] | None = None) -> list[float]:
    """Times between the neighbours of `tokens` tokens that came in events at `times`: `tokens` - 1 of them.

    Where `counts` tells the tokens up to each event, the gap before an event of k tokens counts k times, as a k-th part.
    Where only the sum is known, every event is taken to carry the average: the mean is exact, the percentiles are as good as
    the events are alike. So a server that sends four tokens at a time does not look four times slower than it is.
    """
    between = [later - earlier for earlier, later in pairwise(times)]
    if counts is not None:
        new = [later - earlier for earlier, later in pairwise(counts)]
        return [gap / k for gap, k in zip(between, new, strict=True) for _ in range(k)]
    if not between:
        return []
    events, left = len(between), tokens - 1
    shares = [(i + 1) * left // events - i * left // events for i in range(events)]
    return [gap * events / left for gap, share in zip(between, shares, strict=True) for _ in range(share)]
