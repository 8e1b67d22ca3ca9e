"""The bodies of OpenAI's routes, with vLLM's additions. What is not known is ignored; what is known and impossible, refused."""

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.messages import MOST_ALTERNATIVES
from server import constraints
from server.api.bodies import GenerationBody, Make, Positive, Refused
from server.asked import Asked
from server.tools import Tool

MAX_CHOICES = 128
"""Answers to one request."""
MAX_TOOLS = 128
MAX_TURNS = 4096
"""Of one conversation: more of them fit no context."""


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A piece of a message."""

    text: str


class RefusalPart(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    """An assistant's refusal, as an earlier answer may have had one."""

    refusal: str


Parts = Annotated[list[TextPart | RefusalPart], Meta(max_length=1000)]


class CalledFunction(msgspec.Struct, frozen=True):
    """What an assistant called."""

    name: str
    arguments: str = "{}"
    """JSON."""


class CallMade(msgspec.Struct, frozen=True):
    """A call that an assistant made in an earlier turn."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a chat."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Parts | None = None
    """Null only in an assistant's turn that calls tools or refuses."""
    name: str | None = None
    tool_calls: list[CallMade] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """What an assistant thought before it answered, as vLLM and others return it; the chat template decides what it becomes."""
    reasoning: str | None = None
    """The same by vLLM's newer name."""
    thinking: str | None = None
    """The same by the name that gpt-oss's template has for it."""

    def __post_init__(self) -> None:
        """Refuse a turn without words."""
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise Refused("content", f"is required in a message of role {self.role}")

    def turn(self) -> dict[str, Any]:
        """As chat templates take it: a developer is the system, every part is text."""
        turn: dict[str, Any] = msgspec.to_builtins(self)
        turn["role"] = "system" if self.role == "developer" else self.role
        turn["content"] = self.refusal or "" if self.content is None else self.content
        if isinstance(self.content, list):
            turn["content"] = [
                {"type": "text", "text": part.text if isinstance(part, TextPart) else part.refusal} for part in self.content
            ]
        return turn


class Prediction(msgspec.Struct, frozen=True):
    """What the client expects the answer to be, for the most part: where it comes true, the answer comes faster."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides its text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """OpenAI's padding against listeners; there is none here."""
    continuous_usage_stats: bool = False
    """vLLM's: with the usage wanted, every chunk carries that so far."""


class OpenAIBody(GenerationBody, frozen=True, kw_only=True):
    """What the two routes for generating share."""

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """Answers to each prompt."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted; who asks is told by the API key."""
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    """Accepted; priority is a matter of the API key."""

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        super().__post_init__()
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options", "is only allowed together with stream: true")

    @property
    def include_usage(self) -> bool:
        """Whether the stream's last chunk carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk does."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def refuse_if_set(self, *names: str) -> None:
        """Refuse a field that is known but not available, unless its value changes nothing."""
        for name in names:
            if getattr(self, name):
                raise Refused(name, "is not available on this server; leave it out")


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Any text."""


class JsonFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """A JSON object."""


class NamedSchema(msgspec.Struct, frozen=True):
    """A JSON schema and what it describes."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any] | bool = True
    description: str | None = None
    strict: bool | None = None
    """Accepted; the answer always keeps to the schema."""


class SchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that keeps to a schema."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonFormat | SchemaFormat


class FunctionTool(msgspec.Struct, frozen=True):
    """A tool."""

    type: Literal["function"]
    function: Tool


class FunctionName(msgspec.Struct, frozen=True):
    """Which function."""

    name: str


class NamedChoice(msgspec.Struct, frozen=True):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_TURNS)]
    max_completion_tokens: Positive | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None = None
    prediction: Prediction | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    """Absent is auto where there are tools."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may call several tools; absent is yes."""
    continue_final_message: bool | None = None
    """vLLM's: the answer goes on with the last message instead of following it."""
    add_generation_prompt: bool | None = None
    """vLLM's: whether the assistant's turn is begun; absent is yes, unless the last message is continued."""
    chat_template: str | None = None
    """vLLM's: the name of one of the model's chat templates, such as rag; absent is, where a model has several, tool_use with
    tools and else default. A template itself is not taken from a request."""
    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: further variables of the chat template, such as enable_thinking."""
    documents: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TURNS)] | None = None
    """vLLM's: what the answer may draw on, each with a title and a text, for chat templates that know of documents."""

    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        super().__post_init__()
        if self.top_logprobs and not self.logprobs:
            raise Refused("top_logprobs", "is only allowed together with logprobs: true")
        if self.modalities and self.modalities != ["text"]:
            raise Refused("modalities", "may only be text")
        if self.functions or self.function_call not in (None, "none"):
            raise Refused("functions" if self.functions else "function_call", "is not available; use tools and tool_choice")
        self.refuse_if_set("audio", "web_search_options")
        if self.continue_final_message and self.add_generation_prompt:
            raise Refused("add_generation_prompt", "cannot be true together with continue_final_message")
        self._check_tools()

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise Refused("tools", "names a function twice")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise Refused("tool_choice", "is only allowed together with tools")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise Refused("tool_choice", f"names {self.tool_choice.function.name!r}, which is none of the tools")
        if self.tool_choice not in (None, "none", "auto") and (wishes := self.wishes()):
            raise Refused(wishes[0][0], "cannot be had together with a tool_choice that requires a call")

    @property
    def limit(self) -> tuple[str, int | None]:
        """OpenAI's newer name wins where it is given."""
        return super().limit if self.max_completion_tokens is None else ("max_completion_tokens", self.max_completion_tokens)

    def wishes(self) -> list[tuple[str, Make]]:
        """With that of `response_format`."""
        of = "response_format"
        match self.response_format:
            case JsonFormat():
                return [*super().wishes(), (of, constraints.json_object)]
            case SchemaFormat(named):
                return [*super().wishes(), (of, partial(constraints.json_schema, named.schema, of=of))]
            case _:
                return super().wishes()


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1, max_length=MAX_CHOICES * 2**10)]
    """Text, tokens, or a list of either."""
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    """Absent takes what the prompt leaves of the context; 0 only with `echo`, to have the prompt scored."""
    logprobs: Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Tells the log-probabilities of the tokens, and so many alternatives to each."""
    echo: bool | None = None
    """Give the prompt back before the answer."""

    best_of: Positive | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        super().__post_init__()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refused("best_of", "other than n is not available: every answer that is made is given")
        if self.max_tokens == 0 and not self.echo:
            raise Refused("max_tokens", "may only be 0 together with echo: true")
        self.refuse_if_set("suffix")

    def asked(self, **others: Any) -> Asked:
        """Scores of the prompt are wanted where it is given back with log-probabilities."""
        scored = bool(self.echo and self.logprobs is not None)
        return super().asked(count=self.n or 1, top_logprobs=self.logprobs or 0, prompt_logprobs=scored, **others)
