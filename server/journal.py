"""What is known of each request: its id, which goes out as `X-Request-Id`, and the line that it leaves in the log."""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from runtime import logs
from server.page.site import PATHS

HEADER = "X-Request-Id"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger("engineshed.request")


class Tokens(Protocol):
    """What a Usage says."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer so far."""
        ...


class Counted(Protocol):
    """An answer that counts its tokens, as a Generation does."""

    @property
    def usage(self) -> Tokens:
        """The tokens so far."""
        ...


@dataclass
class Entry:
    """One request, from its arrival on."""

    id: str
    arrived: float = field(default_factory=time.perf_counter)
    """time.perf_counter()."""
    first_byte: float | None = None
    """Likewise, when its answer began."""
    model: str | None = None
    """What answers it, once that is known."""
    answer: Counted | None = None
    """What knows its tokens, once there are any."""

    def begin(self) -> None:
        """Note that its answer begins, unless it has begun."""
        if self.first_byte is None:
            self.first_byte = time.perf_counter()

    def write(self, method: str, route: str, status: int, client: str) -> None:
        """Log the request, now that it has ended; times are in seconds from its arrival."""
        usage = self.answer.usage if self.answer is not None else None
        line = {
            "method": method,
            "route": route,
            "status": status,
            "client": client or None,
            "model": self.model,
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
            "first_byte_seconds": None if self.first_byte is None else round(self.first_byte - self.arrived, 6),
            "seconds": round(time.perf_counter() - self.arrived, 6),
        }
        log.log(_level(route, status), "request", extra=logs.fields(line))


ENTRY = web.RequestKey("entry", Entry)
STATUS = web.RequestKey("status", int)
"""The status that a stream would have had, had its error come before its first byte."""


def open_entry(request: web.Request) -> Entry:
    """Begin the request's entry, under the id that its client gave it if that is a fit one."""
    given = request.headers.get(HEADER, "")
    entry = request[ENTRY] = Entry(given if _ID.fullmatch(given) else uuid.uuid4().hex)
    return entry


def mark(request: web.Request, response: web.StreamResponse) -> None:
    """Put the id on an answer that is about to be sent."""
    entry = request.get(ENTRY) or open_entry(request)  # aiohttp refuses an unknown Expect before any middleware.
    entry.begin()
    response.headers[HEADER] = entry.id


def _level(route: str, status: int) -> int:
    """Debug for the answers to those who ask every few seconds whether all is well, and for the page's many files."""
    return logging.DEBUG if route in ("/healthz", "/readyz", "/metrics", *PATHS) and status < 400 else logging.INFO
