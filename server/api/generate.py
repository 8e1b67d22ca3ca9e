"""`POST /v1/generate`: this server's own route, as plain as HTTP allows. Text comes in chunks, or as JSON lines."""

import msgspec
from aiohttp import web

from server.api.bodies import GenerateBody, read
from server.api.streaming import Form, send
from server.choices import Choices
from server.errors import ApiError
from server.generation import FinishReason, Piece, Usage
from server.service import SERVICE

NDJSON = "application/x-ndjson"


class Line(msgspec.Struct, frozen=True):
    """A JSON line: one piece of the answer."""

    text: str
    tokens: list[int]
    logprobs: list[float]


class LastLine(msgspec.Struct, frozen=True):
    """The last JSON line of a complete answer."""

    finish_reason: FinishReason | None
    usage: Usage


class PlainText:
    """The text and nothing else."""

    content_type = "text/plain; charset=utf-8"

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """The text."""
        return piece.text.encode()

    def end(self, choices: Choices) -> bytes:
        """Nothing."""
        return b""

    def error(self, error: ApiError) -> None:
        """Plain text has no way to say it: the connection breaks off."""
        return


class JsonLines:
    """One JSON object a line."""

    content_type = NDJSON

    def __init__(self) -> None:
        self._finish: FinishReason | None = None

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """A `Line`, unless there is nothing left to tell but how the answer ended."""
        self._finish = piece.finish
        if not (piece.tokens or piece.text):
            return b""
        return msgspec.json.encode(Line(piece.text, piece.tokens, piece.logprobs)) + b"\n"

    def end(self, choices: Choices) -> bytes:
        """A `LastLine`."""
        return msgspec.json.encode(LastLine(self._finish, choices.usage)) + b"\n"

    def error(self, error: ApiError) -> bytes:
        """An error object in OpenAI's shape."""
        return error.encode() + b"\n"


async def generate(request: web.Request) -> web.StreamResponse:
    """Continue a prompt."""
    service = request.app[SERVICE]
    body = await read(request, GenerateBody)
    form: Form = JsonLines() if NDJSON in request.headers.get("Accept", "") else PlainText()
    asked = body.asked()
    async with service.lease(request, body.model) as (served, limits):
        prompt = await served.tokenize(body.prompt)
        async with served.answers(request, [prompt], asked, of="prompt", limits=limits) as choices:
            return await send(request, choices, form)
