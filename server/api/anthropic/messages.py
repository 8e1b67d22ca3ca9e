"""Anthropic's messages: `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

from server.api.anthropic.answers import (
    BlockDelta,
    BlockStart,
    BlockStop,
    Ending,
    MessageDelta,
    MessagesAnswer,
    MessagesEvent,
    MessageStart,
    MessageStop,
    MessagesUsage,
    MoreInput,
    MoreText,
    Ping,
    SaidText,
    TokenCount,
    ToolUse,
)
from server.api.anthropic.bodies import (
    AnyChoice,
    AutoChoice,
    Conversation,
    MessagesBody,
    MessagesTurn,
    NoChoice,
    TextBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from server.api.bodies import as_written, read
from server.api.error_shapes import MessagesError
from server.api.streaming import send
from server.api.writing import SSE, decoded, encode, json, named_events
from server.asked import Asked
from server.choices import Choices
from server.conversation import Chat, Named, converse, tokenize
from server.errors import ApiError
from server.generation import Piece
from server.journal import ENTRY
from server.served import Served
from server.service import SERVICE
from server.tools import Arguments, CallEnded, CallStarted, Content, Tool


async def messages(request: web.Request) -> web.StreamResponse:
    """Answer, whole or as server-sent events."""
    body = await read(request, MessagesBody)
    async with converse(request, body.model, chat(body, body.asked())) as (served, choices):
        if body.stream:
            return await send(request, choices, MessageStream(request, served, choices))
        message = _Message()
        async for piece in choices:
            message.add(piece)
        return json(
            MessagesAnswer(
                id=_id(),
                model=served.name,
                content=message.content,
                stop_reason=message.ending.stop_reason,
                stop_sequence=message.ending.stop_sequence,
                usage=MessagesUsage.of(choices.usage),
            )
        )


async def count_tokens(request: web.Request) -> web.Response:
    """Count the tokens of a conversation."""
    body = await read(request, Conversation)
    async with request.app[SERVICE].lease(request, body.model) as (served, _):
        request[ENTRY].model = served.name
        tokens = await tokenize(served, chat(body, Asked()))
        return json(TokenCount(len(tokens)))


def chat(body: Conversation, asked: Asked) -> Chat:
    """The conversation, to be answered as `asked`."""
    system = body.system if isinstance(body.system, str) else "\n".join(block.text for block in body.system or ())
    turns = _combined(turn for message in body.messages for turn in _turns(message))
    choice: Any = "auto"
    match body.tool_choice:
        case NoChoice():
            choice = "none"
        case AnyChoice():
            choice = "required"
        case ToolChoice(name):
            choice = Named(name)
    lone = isinstance(body.tool_choice, AutoChoice | AnyChoice | ToolChoice) and body.tool_choice.disable_parallel_tool_use
    return Chat(
        messages=[*([{"role": "system", "content": system}] if system else []), *turns],
        asked=asked,
        tools=tuple(Tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in body.tools or ()),
        choice=choice,
        parallel=not lone,
        continue_final_message=turns[-1]["role"] == "assistant",
    )


def _turns(message: MessagesTurn) -> list[dict[str, Any]]:
    """A message as those of a chat: every result is one of its own, and so is the text between two."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[dict[str, str]] = []
    calls: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for block in message.content:
        match block:
            case TextBlock(text):
                texts.append({"type": "text", "text": text})
            case ToolUseBlock(id, name, given):
                function = {"name": name, "arguments": as_written(given, of="messages")}
                calls.append({"id": id, "type": "function", "function": function})
            case ToolResultBlock(id, content):
                if texts:
                    turns.append({"role": message.role, "content": texts})
                    texts = []
                told = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
                turns.append({"role": "tool", "tool_call_id": id, "content": told})
    if texts or calls or not turns:
        turns.append({"role": message.role, "content": texts or "", **({"tool_calls": calls} if calls else {})})
    return turns


def _combined(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, those of one speaker that follow one another as one; many chat templates take turns in turns only.

    The texts of an assistant are pieces of one, which the answer may go on with; those of others are paragraphs.
    """
    combined: list[dict[str, Any]] = []
    for turn in turns:
        last = combined[-1] if combined else {}
        if turn["role"] in ("user", "assistant") and turn["role"] == last.get("role") and "tool_calls" not in last:
            parts = _parts(last)
            parts += _parts(turn)
            combined[-1] = turn | {"content": parts}
        else:
            combined.append(turn)
    for turn in combined:
        if turn["role"] == "assistant":
            turn["content"] = "".join([part["text"] for part in _parts(turn)])
    return combined


def _parts(turn: dict[str, Any]) -> list[dict[str, str]]:
    """A turn's content as a list, the turn's own if it has one."""
    content: str | list[dict[str, str]] = turn["content"]
    if not isinstance(content, str):
        return content
    return [{"type": "text", "text": content}] if content else []


class _Message:
    """A message as it is made: its blocks, and the events that tell of them."""

    def __init__(self) -> None:
        self.ending = Ending("end_turn", None)
        self.content: list[SaidText | ToolUse] = []
        """The blocks that have ended, without calls whose input is not a whole JSON object."""
        self._blocks = 0
        """How many have begun."""
        self._open: SaidText | ToolUse | None = None
        """The last one, as it began, and what has been added to it."""
        self._texts: list[str] = []

    def add(self, piece: Piece) -> list[MessagesEvent]:
        """Take the answer's next piece; gives what it changes."""
        events: list[MessagesEvent] = []
        for part in piece.said:
            match part:
                case Content(text):
                    if not isinstance(self._open, SaidText):
                        self._begin(SaidText(""), events)
                    self._more(text, MoreText(text), events)
                case CallStarted(_, name):
                    self._begin(ToolUse(f"toolu_{secrets.token_hex(12)}", name, {}), events)
                case Arguments(_, text):
                    self._more(text, MoreInput(text), events)
                case CallEnded(_, complete):
                    self._close(events, complete)
        if piece.finish is not None:
            self._close(events)
            self.ending = self._ending(piece)
        return events

    def _ending(self, piece: Piece) -> Ending:
        if piece.finish == "length":
            return Ending("max_tokens", None)
        if any(isinstance(block, ToolUse) for block in self.content):
            return Ending("tool_use", None)
        return Ending("end_turn" if piece.stop is None else "stop_sequence", piece.stop)

    def _begin(self, block: SaidText | ToolUse, events: list[MessagesEvent]) -> None:
        self._close(events)
        self._open, self._texts = block, []
        events.append(BlockStart(self._blocks, block))
        self._blocks += 1

    def _more(self, text: str, delta: MoreText | MoreInput, events: list[MessagesEvent]) -> None:
        self._texts.append(text)
        events.append(BlockDelta(self._blocks - 1, delta))

    def _close(self, events: list[MessagesEvent], complete: bool = True) -> None:
        """End the block that is open, if one is; a call that is not `complete` is none."""
        block, self._open = self._open, None
        if block is None:
            return
        events.append(BlockStop(self._blocks - 1))
        text = "".join(self._texts)
        match block:
            case SaidText():
                self.content.append(SaidText(text))
            case ToolUse(id, name) if complete and (given := decoded(text)) is not None:
                self.content.append(ToolUse(id, name, given))


class MessageStream:
    """A message as server-sent events."""

    content_type = SSE

    def __init__(self, request: web.Request, served: Served, choices: Choices) -> None:
        self._request = request
        self._model = served.name
        self._choices = choices
        self._message = _Message()

    def begin(self) -> bytes:
        """The message without content."""
        usage = msgspec.structs.replace(MessagesUsage.of(self._choices.usage), output_tokens=0)
        return named_events([MessageStart(MessagesAnswer(id=_id(), model=self._model, usage=usage)), Ping()])

    def piece(self, piece: Piece) -> bytes:
        """What the piece adds."""
        return named_events(self._message.add(piece))

    def end(self, choices: Choices) -> bytes:
        """How the message ended, and its tokens."""
        return named_events([MessageDelta(self._message.ending, MessagesUsage.of(choices.usage)), MessageStop()])

    def error(self, error: ApiError) -> bytes:
        """An `error` event."""
        return b"event: error\ndata: " + encode(MessagesError.of(error, self._request)) + b"\n\n"


def _id() -> str:
    return f"msg_{secrets.token_hex(12)}"
