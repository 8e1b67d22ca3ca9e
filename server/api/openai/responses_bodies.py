"""The body of OpenAI's responses. What is not known is ignored; what is known and impossible, refused."""

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.messages import MOST_ALTERNATIVES
from server import constraints
from server.api.bodies import GenerationBody, Make, Positive, Refused
from server.api.openai.bodies import MAX_TOOLS, MAX_TURNS
from server.tools.calls import ToolName

LOGPROBS = "message.output_text.logprobs"

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class InputTextPart(msgspec.Struct, frozen=True, tag_field="type", tag="input_text"):
    """A piece of what is said to the model."""

    text: str


class OutputTextPart(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """A piece of what the model has said."""

    text: str


class OutputRefusalPart(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    """A refusal, as an earlier answer may have had one."""

    refusal: str


class ReasoningPart(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """A piece of an item of reasoning."""

    text: str


Parts = Annotated[list[InputTextPart | OutputTextPart | OutputRefusalPart | ReasoningPart], Meta(max_length=1000)]


class Item(msgspec.Struct, frozen=True):
    """One item of the input; without a type it is a message."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    """Reasoning is not put to the model again."""
    role: Literal["developer", "system", "user", "assistant"] | None = None
    content: str | Parts | None = None
    call_id: str | None = None
    """Which call is made, or answered."""
    name: str | None = None
    """Of the function that is called."""
    arguments: str | None = None
    """JSON."""
    output: str | Parts | None = None
    """What a call gave."""

    def __post_init__(self) -> None:
        """Refuse an item without what its type needs."""
        for name in _NEEDED[self.type]:
            if getattr(self, name) is None:
                raise Refused(name, f"is required in an item of type {self.type}")
        if self.type != "reasoning":
            for name in ("content", "output"):
                if any(isinstance(part, ReasoningPart) for part in getattr(self, name) or ()):
                    raise Refused(name, f"cannot have reasoning_text in an item of type {self.type}")


_NEEDED: dict[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


class AnyText(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Any text."""


class JsonText(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """A JSON object."""


class SchemaText(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that keeps to a schema."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any] | bool
    description: str | None = None
    strict: bool | None = None
    """Accepted; the answer always keeps to the schema."""


class TextConfig(msgspec.Struct, frozen=True):
    """What the answer's text is to be."""

    format: AnyText | JsonText | SchemaText | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted."""


class ResponseTool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; absent takes none."""
    strict: bool | None = None
    description: str | None = None


class FunctionChoice(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """The function that must be called."""

    name: str


class AllowedTool(msgspec.Struct, frozen=True):
    """One of the tools."""

    type: Literal["function"]
    name: str


class AllowedChoice(msgspec.Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    """The tools that may be called, of those that are told of."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


ResponseChoice = Literal["none", "auto", "required"] | FunctionChoice | AllowedChoice
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]


class ResponseStreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides its events."""

    include_obfuscation: bool | None = None
    """OpenAI's padding against listeners; there is none here."""


class ResponsesBody(GenerationBody, frozen=True, kw_only=True):
    """`POST /v1/responses`."""

    input: str | Annotated[list[Item], Meta(min_length=1, max_length=MAX_TURNS)]
    """What the user says, or the conversation so far."""
    instructions: str | None = None
    """Said by the system before all of the input."""
    max_output_tokens: Positive | None = None
    """Absent takes what the prompt leaves of the context."""
    include: list[Include] | None = None
    """Log-probabilities with `message.output_text.logprobs`; there is nothing that the others could add."""
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Alternatives to each token, which are told with its log-probability."""
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseChoice | None = None
    """Absent is auto where there are tools."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may call several tools; absent is yes."""
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Metadata | None = None
    """Given back with the answer."""
    user: str | None = None
    """Accepted; who asks is told by the API key."""
    store: bool | None = None
    """Accepted; nothing is stored."""
    reasoning: dict[str, Any] | None = None
    """Accepted; how much a model thinks is its own matter."""
    truncation: Literal["disabled", "auto"] | None = None
    """Only disabled."""
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    """Accepted; priority is a matter of the API key."""

    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        super().__post_init__()
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise Refused(name, "cannot be followed: this server stores no responses; send the whole conversation as input")
        if self.background:
            raise Refused("background", "is not available on this server: it stores no responses; leave it out, or stream")
        if self.prompt is not None:
            raise Refused("prompt", "is not available on this server, which stores no prompts; send instructions and input")
        if self.truncation == "auto":
            raise Refused("truncation", "may only be disabled: a conversation is not shortened here")
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options", "is only allowed together with stream: true")
        self._check_tools()

    def _check_tools(self) -> None:
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise Refused("tools", "names a function twice")
        if self.tool_choice in (None, "none", "auto"):
            return
        if not names:
            raise Refused("tool_choice", "is only allowed together with tools")
        unknown = self.chosen - set(names)
        if unknown:
            raise Refused("tool_choice", f"names {min(unknown)!r}, which is none of the tools")
        if self.must_call and (wishes := self.wishes()):
            raise Refused(wishes[0][0], "cannot be had together with a tool_choice that requires a call")

    @property
    def chosen(self) -> set[str]:
        """The functions that tool_choice names."""
        match self.tool_choice:
            case FunctionChoice(name):
                return {name}
            case AllowedChoice(_, tools):
                return {tool.name for tool in tools}
            case _:
                return set()

    @property
    def must_call(self) -> bool:
        """Whether the answer must call a tool."""
        match self.tool_choice:
            case FunctionChoice():
                return True
            case AllowedChoice(mode):
                return mode == "required"
            case choice:
                return choice == "required"

    @property
    def limit(self) -> tuple[str, int | None]:
        """The name that responses have for it wins where it is given."""
        return super().limit if self.max_output_tokens is None else ("max_output_tokens", self.max_output_tokens)

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities are told."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def wishes(self) -> list[tuple[str, Make]]:
        """With that of `text.format`."""
        match self.text.format if self.text is not None else None:
            case JsonText():
                return [*super().wishes(), ("text.format", constraints.json_object)]
            case SchemaText(_, schema):
                of = "text.format.schema"
                return [*super().wishes(), (of, partial(constraints.json_schema, schema, of=of))]
            case _:
                return super().wishes()
