"""What Anthropic's messages are made of, whole and as events."""

from typing import Any, Literal

import msgspec

from server.generation import Usage

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(msgspec.Struct, frozen=True):
    """Tokens of a message."""

    input_tokens: int
    """Of the prompt, without those that were cached."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    """Of the prompt, those whose keys and values were reused."""
    output_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "MessagesUsage":
        """`usage` in the terms of messages."""
        cached = usage.prompt_tokens_details.cached_tokens
        return cls(usage.prompt_tokens - cached, 0, cached, usage.completion_tokens)


class SaidText(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A piece of text."""

    text: str


class ToolUse(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class MessagesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A message of the model; at the start of a stream it is empty."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[SaidText | ToolUse] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class TokenCount(msgspec.Struct, frozen=True):
    """The tokens of a conversation, laid out for the model."""

    input_tokens: int


class MessageStart(msgspec.Struct, frozen=True, tag_field="type", tag="message_start"):
    """A message begins."""

    message: MessagesAnswer


class BlockStart(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_start"):
    """A block of it begins."""

    index: int
    content_block: SaidText | ToolUse


class MoreText(msgspec.Struct, frozen=True, tag_field="type", tag="text_delta"):
    """More of a text."""

    text: str


class MoreInput(msgspec.Struct, frozen=True, tag_field="type", tag="input_json_delta"):
    """More of a call's input."""

    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_delta"):
    """More of a block."""

    index: int
    delta: MoreText | MoreInput


class BlockStop(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_stop"):
    """A block has ended."""

    index: int


class Ending(msgspec.Struct, frozen=True):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag_field="type", tag="message_delta"):
    """How the message ended."""

    delta: Ending
    usage: MessagesUsage


class MessageStop(msgspec.Struct, frozen=True, tag_field="type", tag="message_stop"):
    """The message is complete."""


class Ping(msgspec.Struct, frozen=True, tag_field="type", tag="ping"):
    """Nothing: the connection lives."""


MessagesEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping
EVENTS: tuple[type[MessagesEvent], ...] = (
    MessageStart,
    BlockStart,
    BlockDelta,
    BlockStop,
    MessageDelta,
    MessageStop,
    Ping,
)
"""All that there are, besides errors."""
