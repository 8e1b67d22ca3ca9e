"""How every dialect writes what it answers: JSON, whole or in server-sent events."""

from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

SSE = "text/event-stream; charset=utf-8"

encode = msgspec.json.Encoder().encode


def json(body: msgspec.Struct) -> web.Response:
    """A whole answer."""
    return web.Response(body=encode(body), content_type="application/json")


def event(body: msgspec.Struct) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + encode(body) + b"\n\n"


def named_events(bodies: Iterable[msgspec.Struct]) -> bytes:
    """Server-sent events, each with its type's tag as its name."""
    return b"".join([b"event: %b\ndata: %b\n\n" % (str(body.__struct_config__.tag).encode(), encode(body)) for body in bodies])


def decoded(arguments: str) -> dict[str, Any] | None:
    """A call's whole arguments as the object that an answer gives; None where it is none that JSON's readers take: nested too
    deeply, with a number out of range, or with half of a surrogate pair.
    """
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None
