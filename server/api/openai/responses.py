"""OpenAI's responses: `POST /v1/responses`. A response is a chat that says more of itself; none is stored."""

import secrets
import time
from typing import Any, Literal, TypedDict

import msgspec
from aiohttp import web

from server.api.bodies import read
from server.api.openai.answers import TokenLogprob, token_logprobs
from server.api.openai.responses_answers import (
    ArgumentsDelta,
    ArgumentsDone,
    Completed,
    Created,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    ItemAdded,
    ItemDone,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    PartAdded,
    PartDone,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
    StreamError,
    TextDelta,
    TextDone,
)
from server.api.openai.responses_bodies import (
    AllowedChoice,
    AnyText,
    FunctionChoice,
    InputTextPart,
    Item,
    OutputRefusalPart,
    OutputTextPart,
    Parts,
    ResponsesBody,
    TextConfig,
)
from server.api.streaming import send
from server.api.writing import SSE, json, named_events
from server.choices import Choices
from server.conversation import Chat, Fields, Named, converse
from server.errors import ApiError, bad_request
from server.generation import FinishReason, Piece
from server.served import Served
from server.tools import Arguments, CallEnded, CallStarted, Content, Tool


async def responses(request: web.Request) -> web.StreamResponse:
    """Answer, whole or as server-sent events."""
    body = await read(request, ResponsesBody)
    async with converse(request, body.model, chat(body)) as (served, choices):
        stream = ResponseStream(served, body)
        if body.stream:
            return await send(request, choices, stream)
        async for piece in choices:
            stream.add(piece)
        return json(stream.ended(choices))


async def stored(request: web.Request) -> web.Response:
    """Say that there is no such response."""
    id = request.match_info["id"]
    raise ApiError(404, f"There is no response {id!r}: this server stores none.", param="id", code="response_not_found")


def chat(body: ResponsesBody) -> Chat:
    """What `body` asks for. Raises ApiError."""
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _turns(body.input)
    if not messages:
        raise bad_request("The value of 'input' has no messages; there is nothing to answer.", "input")
    tools = [tool for tool in body.tools or () if not body.chosen or tool.name in body.chosen]
    return Chat(
        messages=messages,
        asked=body.asked(top_logprobs=body.top_logprobs or 0),
        tools=tuple(Tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in tools),
        choice=_choice(body),
        parallel=body.parallel_tool_calls is not False,
        fields=Fields(messages="input"),
    )


def _choice(body: ResponsesBody) -> Any:
    match body.tool_choice:
        case FunctionChoice(name):
            return Named(name)
        case AllowedChoice(mode):
            return mode
        case choice:
            return choice or "auto"


def _turns(items: list[Item]) -> list[dict[str, Any]]:
    """The items as the messages of a chat: calls that follow one another, or a message, are one turn with it."""
    turns: list[dict[str, Any]] = []
    for item in items:
        match item.type:
            case "message":
                role = "system" if item.role == "developer" else item.role
                turns.append({"role": role, "content": _content(item.content)})
            case "function_call":
                if not turns or turns[-1]["role"] != "assistant":
                    turns.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments or "{}"}
                turns[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
            case "function_call_output":
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            case "reasoning":
                pass
    return turns


def _content(content: str | Parts | None) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for part in content:
        match part:
            case InputTextPart(text) | OutputTextPart(text) | OutputRefusalPart(text):
                parts.append({"type": "text", "text": text})
    return parts


class ResponseStream:
    """A response as it is made, and the events that tell of it."""

    content_type = SSE

    def __init__(self, served: Served, body: ResponsesBody) -> None:
        self._text = served.text
        self._logprobs = body.logprobs
        self._events = 0
        self._items: list[OutputItem] = []
        """Those that have ended."""
        self._open: _Message | _Call | None = None
        self._finish: FinishReason | None = None
        used = body.sampling.over(served.sampling)
        self._response = ResponseObject(
            id=f"resp_{secrets.token_hex(24)}",
            created_at=int(time.time()),
            instructions=body.instructions,
            max_output_tokens=body.limit[1],
            metadata=body.metadata or {},
            model=served.name,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning=body.reasoning or {"effort": None, "summary": None},
            temperature=used.temperature,
            text=body.text if body.text is not None and body.text.format is not None else TextConfig(AnyText()),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=used.top_p,
            user=body.user,
        )

    # As a Form -----------------------------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """There is a response, and it is in progress."""
        return named_events(
            [
                Created(sequence_number=self._next(), response=self._response),
                InProgress(sequence_number=self._next(), response=self._response),
            ]
        )

    def piece(self, piece: Piece) -> bytes:
        """What the piece adds."""
        return named_events(self.add(piece))

    def end(self, choices: Choices) -> bytes:
        """The whole response."""
        response = self.ended(choices)
        kind = Completed if response.status == "completed" else Incomplete
        return named_events([kind(sequence_number=self._next(), response=response)])

    def error(self, error: ApiError) -> bytes:
        """What went wrong, and the response as far as it came."""
        failed = msgspec.structs.replace(
            self._response,
            status="failed",
            error=ResponseFailure("rate_limit_exceeded" if error.status == 429 else "server_error", str(error)),
            output=[*self._items, *([self._open.item("incomplete")] if self._open is not None else [])],
        )
        told = StreamError(sequence_number=self._next(), code=error.code, message=str(error), param=error.param)
        return named_events([told, Failed(sequence_number=self._next(), response=failed)])

    # What it is made of --------------------------------------------------------------------------------------------

    def add(self, piece: Piece) -> list[ResponseEvent]:
        """Take the answer's next piece; gives what it changes."""
        events: list[ResponseEvent] = []
        logprobs = token_logprobs(piece, self._text) if self._logprobs else []
        for part in piece.said:
            match part:
                case Content(text):  # The first one has all of the piece's tokens: which is whose cannot be told.
                    self._say(text, logprobs, events)
                    logprobs = []
                case CallStarted(_, name):
                    self._close(events)
                    self._begin(_Call(len(self._items), name), events)
                case Arguments(_, text) if isinstance(self._open, _Call):
                    call = self._open
                    call.arguments += text
                    events.append(
                        ArgumentsDelta(sequence_number=self._next(), item_id=call.id, output_index=call.index, delta=text)
                    )
                case CallEnded(_, complete):
                    self._close(events, "completed" if complete else "incomplete")
        empty = piece.finish is not None and not self._items and self._open is None
        if empty or (logprobs and isinstance(self._open, _Message)):
            self._say("", logprobs, events)
        if piece.finish is not None:
            self._finish = piece.finish
            self._close(events, "incomplete" if piece.finish == "length" else "completed")
        return events

    def ended(self, choices: Choices) -> ResponseObject:
        """The response, once its last piece has been taken."""
        cut = self._finish == "length"
        return msgspec.structs.replace(
            self._response,
            status="incomplete" if cut else "completed",
            incomplete_details=IncompleteDetails("max_output_tokens") if cut else None,
            completed_at=None if cut else int(time.time()),
            output=self._items,
            usage=ResponseUsage.of(choices.usage),
        )

    def _say(self, text: str, logprobs: list[TokenLogprob], events: list[ResponseEvent]) -> None:
        if not isinstance(self._open, _Message):
            self._close(events)
            message = _Message(len(self._items))
            self._begin(message, events)
            events.append(PartAdded(sequence_number=self._next(), part=OutputText("", []), **message.where))
        else:
            message = self._open
        message.text += text
        message.logprobs += logprobs
        if text or logprobs:
            events.append(TextDelta(sequence_number=self._next(), delta=text, logprobs=logprobs, **message.where))

    def _begin(self, item: "_Message | _Call", events: list[ResponseEvent]) -> None:
        self._open = item
        events.append(ItemAdded(sequence_number=self._next(), output_index=item.index, item=item.item("in_progress")))

    def _close(self, events: list[ResponseEvent], status: Literal["completed", "incomplete"] = "completed") -> None:
        """End the item that is open, if one is."""
        item, self._open = self._open, None
        match item:
            case None:
                return
            case _Message():
                part = OutputText(item.text, item.logprobs)
                events.append(TextDone(sequence_number=self._next(), text=item.text, logprobs=item.logprobs, **item.where))
                events.append(PartDone(sequence_number=self._next(), part=part, **item.where))
            case _Call():
                events.append(
                    ArgumentsDone(
                        sequence_number=self._next(),
                        item_id=item.id,
                        output_index=item.index,
                        name=item.name,
                        arguments=item.arguments,
                    )
                )
        whole = item.item(status)
        self._items.append(whole)
        events.append(ItemDone(sequence_number=self._next(), output_index=item.index, item=whole))

    def _next(self) -> int:
        self._events += 1
        return self._events - 1


class _Where(TypedDict):
    """Which text an event is about."""

    item_id: str
    output_index: int
    content_index: int


class _Message:
    """A message that is being said."""

    def __init__(self, index: int) -> None:
        self.id = f"msg_{secrets.token_hex(24)}"
        self.index = index
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.where = _Where(item_id=self.id, output_index=index, content_index=0)

    def item(self, status: Any) -> OutputMessage:
        content = [] if status == "in_progress" else [OutputText(self.text, self.logprobs)]
        return OutputMessage(self.id, status, content)


class _Call:
    """A call that is being made."""

    def __init__(self, index: int, name: str) -> None:
        self.id = f"fc_{secrets.token_hex(24)}"
        self.call_id = f"call_{secrets.token_hex(12)}"
        self.index = index
        self.name = name
        self.arguments = ""

    def item(self, status: Any) -> OutputCall:
        return OutputCall(self.id, self.call_id, self.name, self.arguments, status)
