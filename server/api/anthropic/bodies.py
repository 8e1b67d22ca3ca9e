"""The bodies of Anthropic's messages. What is not known is ignored; what is known and impossible, refused."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.messages import Constraint
from server import constraints
from server.api.bodies import MAX_STOPS, Positive, Refused, StopString
from server.api.openai.bodies import MAX_TOOLS, MAX_TURNS
from server.asked import Asked, SamplingParams, seed

MessagesToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A piece of text."""

    text: str


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_result"):
    """What a call gave."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    """Accepted; the content is told as it is."""


class ThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """What the model thought in an earlier turn, which it is not told again."""


class RedactedThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="redacted_thinking"):
    """Likewise."""


Blocks = Annotated[
    list[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock], Meta(max_length=1000)
]


class MessagesTurn(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks

    def __post_init__(self) -> None:
        """Refuse a call that the model did not make, and a result that it did."""
        for block in self.content if not isinstance(self.content, str) else ():
            if isinstance(block, ToolUseBlock) and self.role != "assistant":
                raise Refused("content", f"cannot have tool_use in a message of role {self.role}")
            if isinstance(block, ToolResultBlock) and self.role != "user":
                raise Refused("content", f"cannot have tool_result in a message of role {self.role}")


class MessagesTool(msgspec.Struct, frozen=True):
    """A tool that the model may call."""

    name: MessagesToolName
    input_schema: dict[str, Any]
    """A JSON schema of an object."""
    description: str | None = None
    type: Literal["custom"] | None = None
    """Absent is custom; tools that Anthropic runs are not available."""
    strict: bool | None = None


class AutoChoice(msgspec.Struct, frozen=True, tag_field="type", tag="auto"):
    """The model decides."""

    disable_parallel_tool_use: bool | None = None


class AnyChoice(msgspec.Struct, frozen=True, tag_field="type", tag="any"):
    """Some tool must be called."""

    disable_parallel_tool_use: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True, tag_field="type", tag="tool"):
    """This tool must be called."""

    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(msgspec.Struct, frozen=True, tag_field="type", tag="none"):
    """No tool may be called."""


class SchemaOutput(msgspec.Struct, frozen=True):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    """What the answer is to be."""

    format: SchemaOutput | None = None


class Thinking(msgspec.Struct, frozen=True):
    """Whether the model is to think before it answers."""

    type: Literal["disabled", "enabled", "adaptive", "between_tools"]


class MessagesMetadata(msgspec.Struct, frozen=True):
    """Of the request."""

    user_id: Annotated[str, Meta(max_length=512)] | None = None
    """Accepted; who asks is told by the API key."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`, and what it shares with `POST /v1/messages`."""

    model: str
    messages: Annotated[list[MessagesTurn], Meta(min_length=1, max_length=MAX_TURNS)]
    """An assistant's turn at the end is continued."""
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoice | NoChoice | None = None
    """Absent is auto where there are tools."""
    thinking: Thinking | None = None
    """Only disabled."""
    output_config: OutputConfig | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        if self.thinking is not None and self.thinking.type != "disabled":
            raise Refused("thinking", "may only be disabled: how much a model thinks is its own matter here")
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise Refused("tools", "names a tool twice")
        if not self.must_call:
            return
        if not names:
            raise Refused("tool_choice", "is only allowed together with tools")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.name not in names:
            raise Refused("tool_choice", f"names {self.tool_choice.name!r}, which is none of the tools")
        if self.form is not None:
            raise Refused("output_config.format", "cannot be had together with a tool_choice that requires a call")

    @property
    def must_call(self) -> bool:
        """Whether the answer must call a tool."""
        return isinstance(self.tool_choice, AnyChoice | ToolChoice)

    @property
    def form(self) -> SchemaOutput | None:
        """What the answer must keep to."""
        return self.output_config.format if self.output_config is not None else None


class MessagesBody(Conversation, frozen=True, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Positive
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Absent is the model's own, as `/v1/models` shows it; so are top_p and top_k."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    """0 keeps all tokens."""
    stream: bool | None = None
    metadata: MessagesMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    """Accepted; priority is a matter of the API key."""

    def asked(self) -> Asked:
        """How the answer is to be made. Raises ApiError 400 where what it is to keep to is none."""
        of = "output_config.format.schema"
        constraint: Constraint | None = None if self.form is None else constraints.json_schema(self.form.schema, of=of)
        return Asked(
            sampling=SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=seed(None)),
            max_tokens=self.max_tokens,
            stops=tuple(self.stop_sequences or ()),
            constraint=constraint,
            form=of,
        )
