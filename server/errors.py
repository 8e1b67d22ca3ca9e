"""What goes wrong with a request, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Literal

import msgspec
from aiohttp import web

LONGEST_MESSAGE = 1000
"""Characters of an error's message, which may quote what the client sent."""

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inside of an error answer."""

    message: str
    type: ErrorType
    param: str | None = None
    """The request's field that is at fault, e.g. `messages[0].content`."""
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """An error answer, whole or as the last event of a stream."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that ends with an error; the message is for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}...")
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def type(self) -> ErrorType:
        """OpenAI's class of the error, which follows from the status."""
        if self.status >= 500:
            return "server_error"
        return "rate_limit_error" if self.status == 429 else "invalid_request_error"

    def encode(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode(ErrorBody(ErrorDetail(str(self), self.type, self.param, self.code)))

    def response(self) -> web.Response:
        """The whole HTTP answer."""
        return web.Response(status=self.status, body=self.encode(), content_type="application/json", headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never succeed as it is."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """The engine cannot answer now; the same request may succeed in a while."""
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "1"})


def unauthorized(message: str, *, wrong: bool = False) -> ApiError:
    """The request bears no API key, or with `wrong` one that is not known."""
    challenge = 'Bearer realm="engineshed"' + (', error="invalid_token"' if wrong else "")
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})


def forbidden(message: str) -> ApiError:
    """The request's key does not open the route."""
    return ApiError(403, message, code="admin_required")
