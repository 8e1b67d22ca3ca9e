"""What tools and their calls are, whatever the model's way of writing them."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

ToolName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call, as OpenAI's `tools[].function` has it."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments; None where it takes none."""
    strict: bool | None = None
    """Where the answer is constrained: refuse a schema that the grammar cannot express, instead of being lenient with it."""

    @property
    def described(self) -> dict[str, Any]:
        """The tool as OpenAI writes it, for a chat template."""
        function: dict[str, Any] = {"name": self.name, "description": self.description or ""}
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class ConversationError(Exception):
    """A chat or its tools cannot be put to the model; the message is a sentence for the client."""


class Call(msgspec.Struct, frozen=True):
    """One call of a tool."""

    name: str
    arguments: str
    """A JSON object, as text."""


class Content(msgspec.Struct, frozen=True):
    """Text that belongs to no call."""

    text: str


class CallStarted(msgspec.Struct, frozen=True):
    """The model calls a tool; its arguments follow."""

    index: int
    """0 for the answer's first call."""
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """More of a call's arguments: all of them, one behind the other, are their JSON text exactly."""

    index: int
    text: str


class CallEnded(msgspec.Struct, frozen=True):
    """A call's arguments are over."""

    index: int
    complete: bool = True
    """They are a whole JSON object; False where the answer broke off, or went on as no JSON does."""


Event = Content | CallStarted | Arguments | CallEnded
