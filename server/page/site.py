"""What serves the page's files: read once, kept in memory, the same for everybody and without a key.

The page loads nothing from anywhere else and may run nothing but its own modules; its Content-Security-Policy says so to the
browser, and Trusted Types (https://www.w3.org/TR/trusted-types/) take from every script the means to turn text into markup.
What a model writes can therefore never be more than text.
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from aiohttp import web

INDEX, DOCS, ICON = "/", "/docs", "/favicon.svg"
FILES = "/page/{file}"
PATHS = (INDEX, DOCS, ICON, FILES)
"""Every route of the page."""

MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""The files that are served, by how their names end."""

_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # Kept, and asked for again with its ETag: another version's modules never meet this one's.
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class File:
    """One of the page's files."""

    body: bytes
    media: str
    tag: str
    """Of its content, in hexadecimal."""


@cache
def files() -> dict[str, File]:
    """The page's files by name: all that can be asked for, whatever a path says."""
    found = {}
    for entry in resources.files(__package__).iterdir():
        media = MEDIA.get(f".{entry.name.rpartition('.')[2]}")
        if media is not None:
            body = entry.read_bytes()
            found[entry.name] = File(body, media, hashlib.sha256(body).hexdigest()[:32])
    return found


def routes() -> list[web.RouteDef]:
    """The page's routes; reads its files."""
    files()
    return [
        web.get(INDEX, _of("index.html")),
        web.get(DOCS, _of("docs.html")),
        web.get(ICON, _of("favicon.svg")),
        web.get(FILES, part),
    ]


async def part(request: web.Request) -> web.Response:
    """Give one of the files that the pages are made of."""
    file = files().get(request.match_info["file"])
    if file is None:
        raise web.HTTPNotFound
    return _answer(request, file)


def _of(name: str) -> Handler:
    async def give(request: web.Request) -> web.Response:
        return _answer(request, files()[name])

    return give


def _answer(request: web.Request, file: File) -> web.Response:
    known = request.if_none_match or ()
    if any(tag.value in (file.tag, "*") for tag in known):
        response = web.Response(status=304, headers=HEADERS)
    else:
        response = web.Response(body=file.body, content_type=file.media, charset="utf-8", headers=HEADERS)
    response.etag = file.tag
    return response
