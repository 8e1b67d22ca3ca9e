"""Errors in the shape that each API's clients expect. The path says which: an error may come before its route is known."""

from collections.abc import Callable
from typing import Literal

import msgspec
from aiohttp import web

from server.access import of_gemini
from server.errors import ApiError
from server.journal import ENTRY

MESSAGES = "/v1/messages"
"""Where Anthropic's API begins."""

MessagesErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "timeout_error",
    "api_error",
    "overloaded_error",
]
GeminiStatus = Literal[
    "INVALID_ARGUMENT",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "NOT_FOUND",
    "UNIMPLEMENTED",
    "ABORTED",
    "RESOURCE_EXHAUSTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
]

_MESSAGES_TYPES: dict[int, MessagesErrorType] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_GEMINI_STATUSES: dict[int, GeminiStatus] = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""https://cloud.google.com/apis/design/errors"""


class MessagesErrorDetail(msgspec.Struct, frozen=True):
    """The inside of an error of Anthropic's."""

    type: MessagesErrorType
    message: str


class MessagesError(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """An error of Anthropic's API, whole or as the last event of a stream."""

    error: MessagesErrorDetail
    request_id: str

    @classmethod
    def of(cls, error: ApiError, request: web.Request) -> "MessagesError":
        """`error` as it is told to the client that sent `request`."""
        other: MessagesErrorType = "api_error" if error.status >= 500 else "invalid_request_error"
        return cls(MessagesErrorDetail(_MESSAGES_TYPES.get(error.status, other), str(error)), request[ENTRY].id)


class GeminiErrorDetail(msgspec.Struct, frozen=True):
    """The inside of an error of Google's."""

    code: int
    message: str
    status: GeminiStatus


class GeminiError(msgspec.Struct, frozen=True):
    """An error of Google's API, whole or as the last piece of a stream."""

    error: GeminiErrorDetail

    @classmethod
    def of(cls, error: ApiError) -> "GeminiError":
        """`error` as it is told to the client."""
        other: GeminiStatus = "INTERNAL" if error.status >= 500 else "INVALID_ARGUMENT"
        return cls(GeminiErrorDetail(error.status, str(error), _GEMINI_STATUSES.get(error.status, other)))


Encode = Callable[[msgspec.Struct], bytes]
_encode: Encode = msgspec.json.Encoder().encode


def answer(request: web.Request, error: ApiError) -> web.Response:
    """The answer to a request that ended with `error`."""
    if _of_messages(request):
        body = _encode(MessagesError.of(error, request))
    elif of_gemini(request):
        body = _encode(GeminiError.of(error))
    else:
        return error.response()
    return web.Response(status=error.status, body=body, content_type="application/json", headers=error.headers)


def mark(request: web.Request, response: web.StreamResponse) -> None:
    """Put the request's id where Anthropic's clients look for it as well."""
    if _of_messages(request):
        response.headers["request-id"] = request[ENTRY].id


def _of_messages(request: web.Request) -> bool:
    return request.path == MESSAGES or request.path.startswith(f"{MESSAGES}/")
