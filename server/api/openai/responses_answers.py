"""What OpenAI's responses are made of, whole and as events."""

from typing import Any, Literal

import msgspec

from server.api.openai.answers import TokenLogprob
from server.api.openai.responses_bodies import ResponseChoice, ResponseTool, TextConfig
from server.generation import Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """A message's text."""

    text: str
    logprobs: list[TokenLogprob]
    annotations: list[Any] = []


class OutputMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call of a function."""

    id: str
    call_id: str
    name: str
    arguments: str
    """JSON, unless the call is incomplete."""
    status: Literal["in_progress", "completed", "incomplete"]


OutputItem = OutputMessage | OutputCall


class ResponseFailure(msgspec.Struct, frozen=True):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class InputTokens(msgspec.Struct, frozen=True):
    """What became of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokens(msgspec.Struct, frozen=True):
    """What the answer's tokens are."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "ResponseUsage":
        """`usage` in the terms of responses."""
        details = InputTokens(usage.prompt_tokens_details.cached_tokens)
        return cls(usage.prompt_tokens, details, usage.completion_tokens, OutputTokens(), usage.total_tokens)


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """A response, complete or not, and what was asked of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Seconds since the epoch."""
    completed_at: int | None = None
    status: Status = "in_progress"
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    background: bool = False
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    reasoning: dict[str, Any]
    service_tier: Literal["default"] = "default"
    store: bool = False
    temperature: float
    text: TextConfig
    tool_choice: ResponseChoice
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """An event of a streamed response; its name is its type."""

    sequence_number: int


class Created(ResponseEvent, frozen=True, kw_only=True, tag="response.created"):
    """There is a response."""

    response: ResponseObject


class InProgress(ResponseEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """It is being made."""

    response: ResponseObject


class Completed(ResponseEvent, frozen=True, kw_only=True, tag="response.completed"):
    """It is complete."""

    response: ResponseObject


class Incomplete(ResponseEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """It reached its limit."""

    response: ResponseObject


class Failed(ResponseEvent, frozen=True, kw_only=True, tag="response.failed"):
    """It failed."""

    response: ResponseObject


class ItemAdded(ResponseEvent, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    output_index: int
    item: OutputItem


class ItemDone(ResponseEvent, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item has ended."""

    output_index: int
    item: OutputItem


class PartAdded(ResponseEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A message's text begins."""

    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class PartDone(ResponseEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A message's text has ended."""

    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextDelta(ResponseEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """More of a message's text."""

    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(ResponseEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """All of a message's text."""

    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDelta(ResponseEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """More of a call's arguments."""

    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(ResponseEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """All of a call's arguments."""

    item_id: str
    output_index: int
    name: str
    arguments: str


class StreamError(ResponseEvent, frozen=True, kw_only=True, tag="error"):
    """What went wrong; `response.failed` follows."""

    code: str | None
    message: str
    param: str | None


EVENTS: tuple[type[ResponseEvent], ...] = (
    Created,
    InProgress,
    ItemAdded,
    PartAdded,
    TextDelta,
    TextDone,
    PartDone,
    ArgumentsDelta,
    ArgumentsDone,
    ItemDone,
    Completed,
    Incomplete,
    Failed,
    StreamError,
)
"""All that there are."""
