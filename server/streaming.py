"""An answer leaves as it comes: one HTTP chunk as soon as its text exists."""

import asyncio
import logging
from typing import Protocol

from aiohttp import web

from server.errors import ApiError
from server.generation import Generation, Piece
from server.journal import STATUS

SEND_SECONDS = 30.0
"""How long a client may take nothing of what waits for it before its connection is dropped."""

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

    def end(self, generation: Generation) -> bytes:
        """What comes after the last text of an answer that is complete."""
        ...

    def error(self, error: ApiError) -> bytes | None:
        """The last words of an answer that is not complete, or None where the form has no way to say it."""
        ...


async def send(request: web.Request, generation: Generation, form: Form) -> web.StreamResponse:
    """Write a whole answer as a stream.

    The status is decided when there is something to say: what goes wrong before the first text is raised as
    ApiError, and what goes wrong later is told inside the stream or, where its form has no words for it, by a
    connection that breaks off instead of ending.
    """
    first = await anext(generation, None)
    response = web.StreamResponse(
        headers={"Content-Type": form.content_type, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    await response.prepare(request)
    try:
        await _write(request, response, form.begin() + (form.piece(first) if first else b""))
        async for piece in generation:
            await _write(request, response, form.piece(piece))
        await _write(request, response, form.end(generation))
    except TimeoutError:
        log.info("dropped a client that took nothing for %.0f s", SEND_SECONDS)
        request[STATUS] = CLIENT_GONE
        _abort(request)
    except ConnectionError:
        request[STATUS] = CLIENT_GONE
    except ApiError as error:
        await _fail(request, response, form, error)
    except Exception:
        log.exception("a stream broke")
        await _fail(request, response, form, ApiError(500, "The server failed on this request.", code="internal_error"))
    return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    if not data:
        return
    transport = request.transport
    if transport is not None and transport.get_write_buffer_size() + len(data) < _NEVER_WAITS:
        await response.write(data)  # A timer for every token would cost more than sending it.
        return
    async with asyncio.timeout(SEND_SECONDS):
        await response.write(data)


async def _fail(request: web.Request, response: web.StreamResponse, form: Form, error: ApiError) -> None:
    request[STATUS] = error.status
    words = form.error(error)
    try:
        if words is not None:
            await _write(request, response, words)
        else:
            _abort(request)
    except (TimeoutError, ConnectionError):
        _abort(request)


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
