"""OpenAI's routes: chat completions, completions, models."""

import secrets
import time
from collections.abc import Callable
from typing import TypedDict

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from server import fleet
from server.api.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Model,
    ModelList,
)
from server.api.bodies import ChatBody, CompletionBody, OpenAIBody, read
from server.api.streaming import send
from server.errors import ApiError, bad_request
from server.generation import Generation, Piece, Usage
from server.served import Served
from server.service import SERVICE, Service

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a chat, whole or as server-sent events."""
    service = request.app[SERVICE]
    body = await read(request, ChatBody)
    async with service.lease(request, body.model) as (served, limits):
        prompt = await served.tokenize_chat(body.messages)
        expected = body.prediction.text if body.prediction is not None else ""
        prediction = await served.tokenize(expected, of="prediction", special=False) if expected else []
        with served.generate(request, body, prompt, of="messages", limits=limits, prediction=prediction) as generation:
            if body.stream:
                return await send(request, generation, ChatStream(served, body, generation))
            piece = await generation.whole()
            choice = ChatChoice(
                AssistantMessage(piece.text),
                generation.finish_reason,
                ChatLogprobs.of(piece, served.text) if body.logprobs else None,
            )
            return _json(ChatCompletion(**_head(served, "chatcmpl"), choices=[choice], usage=generation.usage))


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue a prompt, whole or as server-sent events."""
    service = request.app[SERVICE]
    body = await read(request, CompletionBody)
    async with service.lease(request, body.model) as (served, limits):
        prompt = await _prompt(served, body.prompt)
        with served.generate(request, body, prompt, of="prompt", limits=limits) as generation:
            if body.stream:
                return await send(request, generation, CompletionStream(served, body, generation))
            piece = await generation.whole()
            choice = CompletionChoice(
                piece.text,
                generation.finish_reason,
                None if body.logprobs is None else CompletionLogprobs.of(piece, served.text, 0),
            )
            return _json(Completion(**_head(served, "cmpl"), choices=[choice], usage=generation.usage))


async def models(request: web.Request) -> web.Response:
    """List the models."""
    service = request.app[SERVICE]
    return _json(ModelList(data=[_model(service, model) for model in service.roster.models]))


async def model(request: web.Request) -> web.Response:
    """Describe one model."""
    service = request.app[SERVICE]
    return _json(_model(service, service.model(request.match_info["id"])))


class _Events:
    """What both streams share: server-sent events, the last of which is `[DONE]`."""

    content_type = "text/event-stream; charset=utf-8"

    def __init__(self, served: Served, body: OpenAIBody, generation: Generation, prefix: str) -> None:
        self.text = served.text
        self.head = _head(served, prefix)
        self.include_usage = body.include_usage
        self.continuous_usage = body.continuous_usage
        self._generation = generation

    def usage(self, so_far: bool = False) -> Usage | UnsetType | None:
        """What a chunk before the last says of the usage; `so_far`, where it is wanted of every chunk with text."""
        if so_far and self.continuous_usage:
            return self._generation.usage
        return None if self.include_usage else UNSET

    def error(self, error: ApiError) -> bytes:
        """An `error` event."""
        return b"event: error\ndata: " + error.encode() + b"\n\n"


class ChatStream(_Events):
    """A chat's answer in chunks."""

    def __init__(self, served: Served, body: ChatBody, generation: Generation) -> None:
        super().__init__(served, body, generation, "chatcmpl")
        self._logprobs = body.logprobs
        self._plain = _Frame(lambda text: self._chunk(ChatDelta(Delta(content=text))))

    def begin(self) -> bytes:
        """The role."""
        return self._chunk(ChatDelta(Delta(role="assistant", content="")))

    def piece(self, piece: Piece) -> bytes:
        """The text, and its tokens if they are wanted."""
        if self._logprobs:
            logprobs = ChatLogprobs.of(piece, self.text)
            return self._chunk(ChatDelta(Delta(content=piece.text), logprobs=logprobs), so_far=True)
        if not piece.text:
            return b""
        if self.continuous_usage:
            return self._chunk(ChatDelta(Delta(content=piece.text)), so_far=True)
        return self._plain.around(piece.text)

    def end(self, generation: Generation) -> bytes:
        """The finish reason, the usage if it is wanted, and `[DONE]`."""
        last = self._chunk(ChatDelta(Delta(), finish_reason=generation.finish_reason))
        if self.include_usage:
            last += _event(ChatChunk(**self.head, choices=[], usage=generation.usage))
        return last + DONE

    def _chunk(self, choice: ChatDelta, so_far: bool = False) -> bytes:
        return _event(ChatChunk(**self.head, choices=[choice], usage=self.usage(so_far)))


class CompletionStream(_Events):
    """A completion in chunks."""

    def __init__(self, served: Served, body: CompletionBody, generation: Generation) -> None:
        super().__init__(served, body, generation, "cmpl")
        self._logprobs = body.logprobs is not None
        self._offset = 0
        self._plain = _Frame(lambda text: self._chunk(CompletionChoice(text)))

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """The text, and its tokens if they are wanted."""
        if self._logprobs:
            offset, self._offset = self._offset, self._offset + len(piece.text)
            logprobs = CompletionLogprobs.of(piece, self.text, offset)
            return self._chunk(CompletionChoice(piece.text, logprobs=logprobs), so_far=True)
        if not piece.text:
            return b""
        if self.continuous_usage:
            return self._chunk(CompletionChoice(piece.text), so_far=True)
        return self._plain.around(piece.text)

    def end(self, generation: Generation) -> bytes:
        """The finish reason, the usage if it is wanted, and `[DONE]`."""
        last = self._chunk(CompletionChoice("", finish_reason=generation.finish_reason))
        if self.include_usage:
            last += _event(Completion(**self.head, choices=[], usage=generation.usage))
        return last + DONE

    def _chunk(self, choice: CompletionChoice, so_far: bool = False) -> bytes:
        return _event(Completion(**self.head, choices=[choice], usage=self.usage(so_far)))


class _Frame:
    """An event without its text, which is all that differs from one to the next of a stream."""

    def __init__(self, event: Callable[[str], bytes]) -> None:
        mark = secrets.token_hex(16)
        self._before, _, self._after = event(mark).partition(_encode(mark))

    def around(self, text: str) -> bytes:
        """The event that carries `text`."""
        return self._before + _encode(text) + self._after


class _Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


def _head(served: Served, prefix: str) -> _Head:
    return _Head(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=served.name,
        system_fingerprint=served.fingerprint,
    )


def _model(service: Service, model: fleet.Offer) -> Model:
    served = service.roster.loaded(model.name)
    context = model.context if served is None else served.context
    return Model(
        id=model.name,
        created=model.created,
        max_model_len=context,
        state=model.state,
        reason=model.reason or None,
        task=model.task,
    )


async def _prompt(served: Served, prompt: str | list[str | int]) -> list[int]:
    """The tokens of a completion's prompt, which may be text, one text in a list, or tokens."""
    if isinstance(prompt, str):
        return await served.tokenize(prompt)
    tokens = [token for token in prompt if isinstance(token, int)]
    if len(tokens) == len(prompt):
        served.check_tokens(tokens)
        return tokens
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return await served.tokenize(prompt[0])
    if tokens:
        raise bad_request("The value of 'prompt' mixes texts and tokens; send one text, or a list of token ids.", "prompt")
    raise bad_request(f"The value of 'prompt' has {len(prompt)} texts; send one a request.", "prompt")


def _event(body: msgspec.Struct) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


def _json(body: msgspec.Struct) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")
