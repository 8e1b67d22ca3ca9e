"""An answer leaves as it comes: one HTTP chunk as soon as its text exists."""

import asyncio
import logging
from typing import Protocol

from aiohttp import hdrs, web

from server.choices import Choices
from server.errors import ApiError
from server.generation import Piece
from server.journal import STATUS

SEND_SECONDS = 30.0
"""How long a client may take nothing of what waits for it before its connection is dropped."""

SLOW_READER = 408
"""The status of an answer that was given up because its client did not keep up; its connection takes no other request."""

CLIENT_GONE = 499
"""nginx's status for a client that went away before its answer was complete."""

_NEVER_WAITS = 2**14
"""Bytes up to which a connection takes more without waiting for its client: the mark at which asyncio resumes a writer."""

log = logging.getLogger(__name__)


class Form(Protocol):
    """How a stream is written."""

    content_type: str

    def begin(self) -> bytes:
        """What comes before the first text."""
        ...

    def piece(self, piece: Piece) -> bytes:
        """One piece; empty if it shows nothing."""
        ...

    def end(self, choices: Choices) -> bytes:
        """What comes after the last piece of the last answer, where all are complete."""
        ...

    def error(self, error: ApiError) -> bytes | None:
        """The last words of an answer that is not complete, or None where the form has no way to say it."""
        ...


async def send(request: web.Request, choices: Choices, form: Form) -> web.StreamResponse:
    """Write answers as a stream, as they come.

    The status is decided when there is something to say: what goes wrong before the first text is raised as
    ApiError, and what goes wrong later is told inside the stream or, where its form has no words for it, by a
    connection that breaks off instead of ending.
    """
    first = await anext(choices)
    response = web.StreamResponse(
        headers={"Content-Type": form.content_type, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    await response.prepare(request)
    line = _Line(request, response)
    try:
        await line.write(form.begin() + form.piece(first))
        async for piece in choices:
            data = form.piece(piece)
            if not line.offer(data):
                await line.write(data)
        await line.write(form.end(choices))
    except TimeoutError:
        log.info("dropped a client that took nothing for %.0f s", SEND_SECONDS)
        request[STATUS] = CLIENT_GONE
        line.abort()
    except ConnectionError:
        request[STATUS] = CLIENT_GONE
    except ApiError as error:
        await _fail(request, line, form, error)
    except Exception:
        log.exception("a stream broke")
        await _fail(request, line, form, ApiError(500, "The server failed on this request.", code="internal_error"))
    return response


class _Line:
    """The way to one client, once the response's head is on it."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._transport = request.transport
        self._response = response
        self._chunked = hdrs.TRANSFER_ENCODING in response.headers

    def offer(self, data: bytes) -> bool:
        """Send `data` and give True, unless that may have to wait for the client or cannot be done.

        This is what `StreamResponse.write` would do, less the five calls on the way: with most tokens there is nothing to wait
        for, and a timer or even a coroutine for each would cost as much as making the event.
        """
        if not data:
            return True
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() + len(data) >= _NEVER_WAITS:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return True

    async def write(self, data: bytes) -> None:
        """Send `data`, and wait for a client that has much to take; raises TimeoutError, ConnectionError."""
        if not self.offer(data):
            async with asyncio.timeout(SEND_SECONDS):
                await self._response.write(data)

    def close(self) -> None:
        """Close the connection once this response has ended."""
        self._response.force_close()

    def abort(self) -> None:
        """Break off."""
        if self._transport is not None:
            self._transport.abort()


async def _fail(request: web.Request, line: _Line, form: Form, error: ApiError) -> None:
    request[STATUS] = error.status
    words = form.error(error)
    if error.status == SLOW_READER:
        line.close()
    try:
        if words is not None:
            await line.write(words)
        else:
            line.abort()
    except (TimeoutError, ConnectionError):
        line.abort()
