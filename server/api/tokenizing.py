"""vLLM's `POST /tokenize` and `POST /detokenize`: what a text is in tokens, and the other way round."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from runtime.bundle import Task
from runtime.text import Text
from server.api.bodies import Refused, read
from server.api.openai.bodies import MAX_TOOLS, MAX_TURNS, FunctionTool, Message
from server.api.writing import json
from server.asked import Asked
from server.conversation import Chat, tokenize
from server.journal import ENTRY
from server.served import LONG_TEXT, Served
from server.service import SERVICE

MAX_TOKENS = 2**17
"""Tokens of one text."""


_OF_CHATS = (
    *("add_generation_prompt", "continue_final_message", "tools"),
    *("chat_template", "chat_template_kwargs", "documents"),
)
"""Fields that a prompt cannot have."""


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /tokenize`: a prompt, or the messages of a chat."""

    model: str | None = None
    """A model's id; absent takes the one that is served."""
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_TURNS)] | None = None
    add_special_tokens: bool | None = None
    """Whether the beginning-of-sequence token is added to a prompt; absent is yes. A chat's template has its own."""
    return_token_strs: bool | None = None
    """Tell what each token adds to the text, too."""
    add_generation_prompt: bool | None = None
    """Whether the assistant's turn is begun; absent is yes, unless the last message is continued."""
    continue_final_message: bool | None = None
    chat_template: str | None = None
    """The name of one of the model's chat templates."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    documents: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TURNS)] | None = None
    """For chat templates that know of documents."""
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None

    def __post_init__(self) -> None:
        """Refuse both kinds of prompts, none, and what does not go with the one that is there."""
        if (self.prompt is None) == (self.messages is None):
            raise Refused("prompt", "is required, or else messages; not both")
        if self.messages is None:
            for name in _OF_CHATS:
                if getattr(self, name):
                    raise Refused(name, "is only allowed together with messages")
        elif self.add_special_tokens:
            raise Refused("add_special_tokens", "cannot be true together with messages: the chat template has its own")
        if self.continue_final_message and self.add_generation_prompt:
            raise Refused("add_generation_prompt", "cannot be true together with continue_final_message")


class Tokenized(msgspec.Struct, frozen=True):
    """A text in tokens."""

    count: int
    max_model_len: int
    """Tokens of prompt and answer together."""
    tokens: list[int]
    token_strs: list[str] | None
    """What each adds to the text; bytes that are no whole character as U+FFFD. Null unless it was asked for."""


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    """A model's id; absent takes the one that is served."""
    tokens: Annotated[list[int], Meta(max_length=MAX_TOKENS)]


class Detokenized(msgspec.Struct, frozen=True):
    """Tokens as text."""

    prompt: str


async def tokenizing(request: web.Request) -> web.Response:
    """Tell a text's or a chat's tokens."""
    body = await read(request, TokenizeBody)
    async with _lease(request, body.model) as served:
        if body.prompt is not None:
            tokens = await served.tokenize(body.prompt, special=body.add_special_tokens is not False)
        else:
            tokens = await tokenize(served, _chat(body))
        names = await _apart(len(tokens), _strings, served.text, tokens) if body.return_token_strs else None
        return json(Tokenized(len(tokens), served.context, tokens, names))


async def detokenizing(request: web.Request) -> web.Response:
    """Tell the text of tokens, in which special ones are spelled out."""
    body = await read(request, DetokenizeBody)
    async with _lease(request, body.model) as served:
        served.check_tokens(body.tokens, of="tokens")
        return json(Detokenized(await _apart(len(body.tokens), served.text.decode, body.tokens)))


@asynccontextmanager
async def _lease(request: web.Request, name: str | None) -> AsyncIterator[Served]:
    """The model of that name, whatever it is for: all of them have tokens."""
    service = request.app[SERVICE]
    task: Task = "text-generation" if name is None else service.model(name).task
    async with service.lease(request, name, task) as (served, _):
        request[ENTRY].model = served.name
        yield served


def _chat(body: TokenizeBody) -> Chat:
    return Chat(
        messages=[message.turn() for message in body.messages or ()],
        asked=Asked(),
        tools=tuple(tool.function for tool in body.tools or ()),
        continue_final_message=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
        template=body.chat_template,
        template_options=body.chat_template_kwargs or {},
        documents=tuple(body.documents or ()),
    )


def _strings(text: Text, tokens: list[int]) -> list[str]:
    return [text.token_text(token) for token in tokens]


async def _apart(length: int, work: Any, *arguments: Any) -> Any:
    """What `work` gives; in a thread where the streams would wait for it."""
    return await asyncio.to_thread(work, *arguments) if length > LONG_TEXT else work(*arguments)
