"""A chat, whichever API asks for it: its turns laid out by the model's template, its tools, the form of its answer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
from aiohttp import web

from runtime.text import TextError
from server import constraints
from server.asked import Asked
from server.choices import Choices
from server.errors import bad_request
from server.served import LONG_TEXT, Served
from server.service import SERVICE
from server.tools import ConversationError, Format, Tool, prepare

T = TypeVar("T")


class Named(msgspec.Struct, frozen=True):
    """The tool that must be called."""

    name: str


class Fields(msgspec.Struct, frozen=True):
    """What an API calls the parts of a chat, for the errors' sake."""

    messages: str = "messages"
    tools: str = "tools"


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A chat in the terms of OpenAI's chat completions, which those of the other APIs translate to."""

    messages: list[dict[str, Any]]
    """OpenAI's messages; their content is a text or a list of text parts."""
    asked: Asked
    """Its constraint is the form of the answer."""
    tools: tuple[Tool, ...] = ()
    choice: Literal["none", "auto", "required"] | Named = "auto"
    parallel: bool = True
    """Whether one answer may call several tools."""
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    template: str | None = None
    """The name of one of the model's chat templates; None takes the one that is meant for such a chat."""
    template_options: dict[str, Any] = {}
    """Further variables of the template."""
    documents: tuple[dict[str, Any], ...] = ()
    """What the answer may draw on, for templates that know of documents."""
    prediction: str = ""
    fields: Fields = Fields()

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        return () if self.choice == "none" else self.tools


@asynccontextmanager
async def converse(request: web.Request, model: str | None, chat: Chat) -> AsyncIterator[tuple[Served, Choices]]:
    """The model that answers, and its answers; leaving the context ends them. Raises ApiError."""
    service = request.app[SERVICE]
    async with service.lease(request, model) as (served, limits):
        prompt = await tokenize(served, chat)
        asked, calling = chat.asked, None
        if chat.callable:
            asked = await _aside(chat, partial(_calling, chat, served.tools))
            calling = [tool.name for tool in chat.callable]
        expected = chat.prediction
        prediction = await served.tokenize(expected, of="prediction", special=False) if expected else []
        async with served.answers(
            request, [prompt], asked, of=chat.fields.messages, limits=limits, prediction=prediction, calling=calling
        ) as choices:
            yield served, choices


async def tokenize(served: Served, chat: Chat) -> list[int]:
    """The tokens of the chat's prompt, up to where its answer begins. Raises ApiError."""
    return await _aside(chat, partial(_prompt, served, chat))


def _prompt(served: Served, chat: Chat) -> list[int]:
    of = chat.fields.messages
    if chat.continue_final_message and not chat.messages:
        raise bad_request("There is no message to continue.", of)
    if chat.continue_final_message and chat.messages[-1].get("tool_calls"):
        raise bad_request("The last message calls tools; there is nothing in it to continue.", of)
    template = _template(served, chat)
    try:
        messages, described = prepare(chat.messages, chat.callable, served.tools, served.text.shape(template))
        return served.text.chat(
            messages,
            tools=described,
            documents=chat.documents or None,
            template=template,
            add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
            options=chat.template_options,
        )
    except ConversationError as error:
        raise bad_request(f"{error}.", of) from None
    except TextError as error:
        raise bad_request(str(error), of) from None


def _template(served: Served, chat: Chat) -> str:
    """The name of the template that lays the chat out; tools that it is not given itself call for no other one."""
    try:
        return served.text.choose(chat.template, tools=bool(chat.callable) and served.tools.native)
    except TextError as error:
        raise bad_request(f"{error}.", chat.fields.messages if chat.template is None else "chat_template") from None


async def _aside(chat: Chat, work: Callable[[], T]) -> T:
    """What `work` gives, which takes time in proportion to the chat: in a thread where streams would have to wait for it."""
    tools = [(tool.description, tool.parameters) for tool in chat.tools]
    if _characters((chat.messages, tools, chat.template_options, chat.documents)) > LONG_TEXT:
        return await asyncio.to_thread(work)
    return work()


def _characters(value: object) -> int:
    """Of all texts in a JSON value."""
    match value:
        case str():
            return len(value)
        case Mapping():
            return sum(map(len, value)) + sum(map(_characters, value.values()))
        case list() | tuple():
            return sum(map(_characters, value))
        case _:
            return 0


def _calling(chat: Chat, format: Format) -> Asked:
    """How an answer is made that may call tools: calls that must come, or must be valid, are constrained to their schemas."""
    of = chat.fields.tools
    try:
        grammar = _grammar(chat, format)
    except ConversationError as error:
        raise bad_request(f"{error}.", of) from None
    if grammar is None:
        return chat.asked
    return msgspec.structs.replace(chat.asked, constraint=constraints.lark(grammar, of=of), form=of)


def _grammar(chat: Chat, format: Format) -> str | None:
    tools = chat.callable
    match chat.choice:
        case Named(name):
            return format.grammar(tools, name=name)
        case "required":
            return format.grammar(tools, parallel=chat.parallel)
        case _ if (not chat.parallel or any(tool.strict for tool in tools)) and chat.asked.constraint is None:
            return format.grammar(tools, required=False, parallel=chat.parallel)
        case _:
            return None
