"""What Google's Gemini API answers."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from runtime.text import Text
from server.api.openai.answers import told
from server.generation import Piece, Usage

FinishedBecause = Literal["STOP", "MAX_TOKENS", "MALFORMED_FUNCTION_CALL"]


class CalledFunctionPart(msgspec.Struct, frozen=True, rename="camel"):
    """A call of a function."""

    id: str
    name: str
    args: dict[str, Any]


class AnswerPart(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A piece of an answer: text, or a call."""

    text: str | UnsetType = UNSET
    function_call: CalledFunctionPart | UnsetType = UNSET


class AnswerContent(msgspec.Struct, frozen=True, rename="camel"):
    """What an answer says."""

    parts: list[AnswerPart]
    role: Literal["model"] = "model"


class LogprobsCandidate(msgspec.Struct, frozen=True, rename="camel"):
    """A token in its place."""

    token: str
    token_id: int
    log_probability: float


class TopCandidates(msgspec.Struct, frozen=True, rename="camel"):
    """The likeliest tokens in one place."""

    candidates: list[LogprobsCandidate]
    """Likeliest first."""


class LogprobsResult(msgspec.Struct, frozen=True, rename="camel"):
    """The chosen tokens."""

    chosen_candidates: list[LogprobsCandidate]
    top_candidates: list[TopCandidates]
    """To each of them."""

    @classmethod
    def of(cls, piece: Piece, text: Text) -> "LogprobsResult":
        """Those of `piece`."""

        def candidate(id: int, logprob: float) -> LogprobsCandidate:
            return LogprobsCandidate(text.token_text(id), id, told(logprob))

        return cls(
            [candidate(*chosen) for chosen in zip(piece.tokens, piece.logprobs, strict=True)],
            [TopCandidates([candidate(*each) for each in top]) for top in piece.tops],
        )

    def extend(self, more: "LogprobsResult") -> None:
        """Add the tokens that follow."""
        self.chosen_candidates.extend(more.chosen_candidates)
        self.top_candidates.extend(more.top_candidates)


class Candidate(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One answer, or its part in a stream's piece."""

    content: AnswerContent
    finish_reason: FinishedBecause | UnsetType = UNSET
    index: int = 0
    logprobs_result: LogprobsResult | UnsetType = UNSET


class UsageMetadata(msgspec.Struct, frozen=True, rename="camel"):
    """Tokens so far."""

    prompt_token_count: int
    candidates_token_count: int
    """Of all answers."""
    total_token_count: int
    cached_content_token_count: int
    """Of the prompt, those whose keys and values were reused."""

    @classmethod
    def of(cls, usage: Usage) -> "UsageMetadata":
        """`usage` in Google's terms."""
        cached = usage.prompt_tokens_details.cached_tokens
        return cls(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, cached)


class GenerateContentAnswer(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Answers, whole or a piece of a stream."""

    candidates: list[Candidate]
    usage_metadata: UsageMetadata
    model_version: str
    response_id: str


class CountTokensAnswer(msgspec.Struct, frozen=True, rename="camel"):
    """The tokens of a conversation, laid out for the model."""

    total_tokens: int


class GeminiModel(msgspec.Struct, frozen=True, rename="camel"):
    """A model that can be asked for."""

    name: str
    """models/ and its id."""
    base_model_id: str
    version: str
    display_name: str
    input_token_limit: int
    """Tokens of prompt and answer together."""
    output_token_limit: int
    supported_generation_methods: list[str]
    temperature: float | UnsetType = UNSET
    """Where a request does not say; so are topP and topK. Absent for embeddings."""
    top_p: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    """0 keeps all tokens."""


class GeminiModelList(msgspec.Struct, frozen=True, rename="camel"):
    """The models that can be asked for."""

    models: list[GeminiModel]
