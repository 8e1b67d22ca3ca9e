"""The bodies that OpenAI's clients expect as answers, whole and in chunks."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from runtime.bundle import SamplingDefaults, Task
from runtime.text import Text
from server.choices import Whole
from server.fleet import ModelState
from server.generation import FinishReason, Piece, Usage


class Alternative(msgspec.Struct, frozen=True):
    """One of the likeliest tokens in a chosen token's place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One chosen token of a chat's answer or of a response."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]
    """Likeliest first."""


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The chosen tokens of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, piece: Piece | Whole, text: Text) -> "ChatLogprobs":
        """Those of `piece`."""
        return cls(token_logprobs(piece, text))


def token_logprobs(piece: Piece | Whole, text: Text) -> list[TokenLogprob]:
    """The tokens of `piece`."""
    tops = piece.tops or [[]] * len(piece.tokens)
    return [
        TokenLogprob(
            text.token_text(token),
            told(logprob),
            list(text.token_bytes(token)),
            [Alternative(text.token_text(id), told(each), list(text.token_bytes(id))) for id, each in top],
        )
        for token, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True)
    ]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The tokens of a completion, those of its prompt among them if that is given back."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for a prompt's first token, before which there is nothing."""
    top_logprobs: list[dict[str, float] | None] | None
    """By token: the likeliest ones in its place, and itself; null where no alternatives were asked for."""
    text_offset: list[int]
    """Where each token begins, in characters from the text's start."""


def told(logprob: float) -> float:
    """A log-probability as JSON can say it: what cannot be chosen at all is OpenAI's -9999."""
    return max(logprob, -9999.0)


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is called, or a part of what it is given."""

    arguments: str
    """JSON."""
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a function."""

    id: str
    function: FunctionDelta
    type: Literal["function"] = "function"


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a call; its id and its name come first."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The answer of a chat."""

    content: str | None
    """Null where the answer only calls tools."""
    tool_calls: list[ToolCall] | UnsetType = UNSET
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the answer of a chat."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer of a whole chat completion."""

    message: AssistantMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None
    index: int = 0


class ChatDelta(msgspec.Struct, frozen=True):
    """One answer's part in a chunk."""

    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None
    index: int = 0


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer of a completion, or its part in a chunk."""

    text: str
    finish_reason: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None
    index: int = 0


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What every answer of the two generating routes says of itself."""

    id: str
    created: int
    """Seconds since the epoch."""
    model: str
    system_fingerprint: str
    """Changes with the engine."""
    usage: Usage | UnsetType | None = UNSET
    """Null in a stream's chunks before the last, if it was asked for."""


class ChatCompletion(Envelope, frozen=True, kw_only=True):
    """A whole chat completion."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Envelope, frozen=True, kw_only=True):
    """One event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatDelta]


class Completion(Envelope, frozen=True, kw_only=True):
    """A whole completion, or one event of a streamed one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be asked for."""

    id: str
    created: int
    max_model_len: int
    """Tokens of prompt and answer together."""
    state: ModelState
    """cold: it is loaded when it is asked for; quarantined: it crashed too often, and is not loaded again by itself."""
    reason: str | None = None
    """Why it is waiting, quarantined or refused."""
    task: Task = "text-generation"
    """What it is for: answers, or embeddings (feature-extraction)."""
    sampling: SamplingDefaults | None = None
    """How tokens are drawn where a request does not say; null for embeddings."""
    object: Literal["model"] = "model"
    owned_by: str = "engineshed"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that can be asked for."""

    data: list[Model]
    object: Literal["list"] = "list"
