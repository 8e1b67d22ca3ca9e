"""The web pages that may read answers: none, unless their origins are named.

Never with credentials, which a browser adds by itself: a key is what the page puts into its own request.
"""

import re

from aiohttp import hdrs, web

ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_NAMES = re.compile(r"[A-Za-z0-9_, -]+")
_EXPOSED = "X-Request-Id, request-id, Retry-After"
"""Those that client libraries read; request-id is Anthropic's name of the first."""
_PREFLIGHT_SECONDS = "7200"
"""How long a browser remembers an answer: the most that Chromium does."""


class OriginError(ValueError):
    """What is given as an origin is none."""


def parse(text: str) -> str:
    """An origin as browsers write it, or ANY. Raises OriginError."""
    origin = text if text == ANY else text.lower()
    if origin != ANY and not _ORIGIN.fullmatch(origin):
        raise OriginError(f"{text!r} is no origin; write it as https://example.org or http://127.0.0.1:3000, or * for any")
    return origin


def preflight(request: web.Request, origins: frozenset[str]) -> web.Response | None:
    """The answer to a browser that asks before it sends; None for any other request, and where no origin may."""
    wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
    if not origins or request.method != hdrs.METH_OPTIONS or wanted is None or hdrs.ORIGIN not in request.headers:
        return None
    response = web.Response(status=204, headers={hdrs.VARY: hdrs.ACCESS_CONTROL_REQUEST_HEADERS})
    if _allowed(request, origins) is not None:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST"
        headers = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        if _NAMES.fullmatch(headers):  # All that a client library sends, by name: "*" would leave Authorization out.
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = headers
        response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = _PREFLIGHT_SECONDS
    return response


def mark(request: web.Request, response: web.StreamResponse, origins: frozenset[str]) -> None:
    """Tell the browser of an allowed origin that its page may read this answer."""
    if not origins:
        return
    if ANY not in origins:
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
    allowed = _allowed(request, origins)
    if allowed is not None:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = allowed
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED


def _allowed(request: web.Request, origins: frozenset[str]) -> str | None:
    if ANY in origins:
        return ANY
    origin = request.headers.get(hdrs.ORIGIN)
    return origin if origin in origins else None
