"""OpenAI's chat completions: `POST /v1/chat/completions`."""

import secrets
from functools import cached_property

from aiohttp import web
from msgspec import UNSET

from server.api.bodies import read
from server.api.openai.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Delta,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from server.api.openai.bodies import ChatBody, NamedChoice
from server.api.openai.events import DONE, Events, Frame, head
from server.api.streaming import send
from server.api.writing import event, json
from server.choices import Choices, Whole
from server.conversation import Chat, Named, converse
from server.generation import Piece
from server.served import Served
from server.tools import Arguments, CallStarted, Event


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a chat, whole or as server-sent events."""
    body = await read(request, ChatBody)
    async with converse(request, body.model, chat(body)) as (served, choices):
        if body.stream:
            return await send(request, choices, ChatStream(served, body, choices))
        answers = [_choice(index, whole, body, served) for index, whole in enumerate(await choices.whole())]
        return json(ChatCompletion(**head(served, choices, "chatcmpl"), choices=answers, usage=choices.usage))


def chat(body: ChatBody) -> Chat:
    """What `body` asks for. Raises ApiError where the form of its answer is none."""
    wanted = body.tool_choice
    choice = Named(wanted.function.name) if isinstance(wanted, NamedChoice) else wanted or "auto"
    return Chat(
        messages=[message.turn() for message in body.messages],
        asked=body.asked(count=body.n or 1, top_logprobs=body.top_logprobs or 0),
        tools=tuple(tool.function for tool in body.tools or ()),
        choice=choice,
        parallel=body.parallel_tool_calls is not False,
        continue_final_message=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
        template=body.chat_template,
        template_options=body.chat_template_kwargs or {},
        documents=tuple(body.documents or ()),
        prediction=body.prediction.text if body.prediction is not None else "",
    )


def _choice(index: int, whole: Whole, body: ChatBody, served: Served) -> ChatChoice:
    calls = [ToolCall(_call_id(), FunctionDelta(call.arguments, call.name)) for call in whole.calls]
    message = AssistantMessage(None if calls and not whole.text else whole.text, calls or UNSET)
    return ChatChoice(message, whole.finish, ChatLogprobs.of(whole, served.text) if body.logprobs else None, index)


class ChatStream(Events):
    """Chats' answers in chunks."""

    def __init__(self, served: Served, body: ChatBody, choices: Choices) -> None:
        super().__init__(served, body, choices, "chatcmpl")
        self._logprobs = bool(body.logprobs)
        self._count = choices.count

    @cached_property
    def _plain(self) -> list[Frame]:
        """Events with nothing but text, of each answer."""
        return [
            Frame(lambda text, index=index: self._chunk(ChatDelta(Delta(content=text), index=index)))  # type: ignore[misc]
            for index in range(self._count)
        ]

    def begin(self) -> bytes:
        """The roles."""
        role = Delta(role="assistant", content="")
        return b"".join(self._chunk(ChatDelta(role, index=index)) for index in range(self._count))

    def piece(self, piece: Piece) -> bytes:
        """The text, its tokens if they are wanted, parts of calls; at an answer's end its finish reason."""
        calls = [call for part in piece.parts if (call := _delta(part)) is not None]
        if piece.finish is None and not (self._logprobs or self.continuous_usage or calls):
            return self._plain[piece.index].around(piece.text) if piece.text else b""
        told = b""
        logprobs = ChatLogprobs.of(piece, self.text) if self._logprobs and piece.tokens else None
        if piece.text or (logprobs is not None and not calls):
            told = self._chunk(ChatDelta(Delta(content=piece.text), logprobs=logprobs, index=piece.index), so_far=True)
            logprobs = None
        for call in calls:
            delta = ChatDelta(Delta(tool_calls=[call]), logprobs=logprobs, index=piece.index)
            told += self._chunk(delta, so_far=True)
            logprobs = None
        if piece.finish is not None:
            told += self._chunk(ChatDelta(Delta(), finish_reason=piece.finish, index=piece.index))
        return told

    def end(self, choices: Choices) -> bytes:
        """The usage if it is wanted, and `[DONE]`."""
        if self.include_usage:
            return event(ChatChunk(**self.head, choices=[], usage=choices.usage)) + DONE
        return DONE

    def _chunk(self, choice: ChatDelta, so_far: bool = False) -> bytes:
        return event(ChatChunk(**self.head, choices=[choice], usage=self.usage(so_far)))


def _delta(part: Event) -> ToolCallDelta | None:
    """What `part` adds to a call, if it does."""
    match part:
        case CallStarted(index, name):
            return ToolCallDelta(index, FunctionDelta("", name), _call_id(), "function")
        case Arguments(index, text):
            return ToolCallDelta(index, FunctionDelta(text))
        case _:
            return None


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
