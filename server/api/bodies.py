"""The bodies that clients send, parsed once at the border into types that cannot be wrong."""

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from server.errors import bad_request

MAX_BODY = 4 * 2**20
"""Bytes of a request's body; more is refused with status 413."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
"""Characters of a stop string: preparing one takes time in proportion, in which every other stream waits."""

Positive = Annotated[int, Meta(ge=1)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)]


class TextPart(msgspec.Struct, frozen=True):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True):
    """One turn of a chat."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string, its parts on lines of their own."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


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
    continuous_usage_stats: bool = False
    """vLLM's: with the usage wanted, every chunk carries that so far."""


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that all generating routes share; null means absent."""

    model: str | None = None
    """A model's id; absent takes the one that is served."""
    max_tokens: Positive | None = None
    """Absent takes what the prompt leaves of the context."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """Absent is 1."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Absent is random."""
    stop: Stop | None = None
    ignore_eos: bool | None = None
    """vLLM's and llama.cpp's: go on past the model's own end of an answer."""
    speculation: bool | None = None
    """Whether tokens may be guessed and verified several at a time; absent is yes."""

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer's tokens, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class OpenAIBody(GenerationBody, frozen=True, kw_only=True):
    """What OpenAI's two routes share.

    The last group names what this server does not do yet: a value that would change the answer is refused
    rather than ignored.
    """

    n: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        if self.stream_options is not None and not self.stream:
            raise _Refused("stream_options", "is only allowed together with stream: true")
        if self.n is not None and self.n != 1:
            raise _Refused("n", f"is {self.n}, but one answer a request is all that is available; send {self.n} requests")
        self.refuse_if_set("frequency_penalty", "presence_penalty", "logit_bias")

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
                raise _Refused(name, "is not available on this server; leave it out")


class ResponseFormat(msgspec.Struct, frozen=True):
    """The form of the answer; only plain text is available."""

    type: Literal["text"]


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prediction: Prediction | None = None

    response_format: ResponseFormat | None = None
    tools: list[msgspec.Raw] | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        super().__post_init__()
        if self.top_logprobs:
            raise _Refused(
                "top_logprobs", "above 0 is not available; logprobs: true gives the chosen tokens' log-probabilities"
            )
        self.refuse_if_set("tools")

    @property
    def limit(self) -> tuple[str, int | None]:
        """OpenAI's newer name wins where it is given."""
        return super().limit if self.max_completion_tokens is None else ("max_completion_tokens", self.max_completion_tokens)


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | int]
    """Text, a list with one text, or token ids."""
    logprobs: Annotated[int, Meta(ge=0)] | None = None

    best_of: Positive | None = None
    echo: bool | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        super().__post_init__()
        if self.logprobs:
            raise _Refused("logprobs", "above 0 is not available; 0 tells the chosen tokens' own")
        if self.best_of is not None and self.best_of != 1:
            raise _Refused("best_of", "above 1 is not available")
        self.refuse_if_set("echo", "suffix")


class GenerateBody(GenerationBody, frozen=True, kw_only=True):
    """`POST /v1/generate`."""

    prompt: str


Body = TypeVar("Body", bound=msgspec.Struct)


async def read(request: web.Request, type_: type[Body]) -> Body:
    """The request's body as a `type_`; raises ApiError 400 that names the field at fault."""
    try:
        raw = await request.read()
    except web.RequestPayloadError as error:
        raise bad_request(f"The body cannot be read: {error}.") from None
    try:
        return msgspec.json.decode(raw, type=type_)
    except msgspec.ValidationError as error:
        message, param = _explain(str(error))
        raise bad_request(message, param) from None
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8 (byte {error.start}: {error.reason}).") from None
    except RecursionError:
        raise bad_request("The body's JSON is nested too deeply.") from None
    except msgspec.DecodeError as error:
        if _HIGH_SURROGATE_ALONE.search(raw) or "surrogate" in str(error):
            raise bad_request("The body has a lone surrogate (\\ud800 to \\udfff), which is not a character.") from None
        raise bad_request(f"The body is not valid JSON: {error}.") from None


class _Refused(ValueError):
    """A field whose value is of the right type and impossible; msgspec turns it into a ValidationError with this text."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r} {reason} - at `$.{name}`")


_HIGH_SURROGATE_ALONE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
_VALIDATION = re.compile(r"(?s)(?P<reason>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


def _explain(message: str) -> tuple[str, str | None]:
    """msgspec's sentence as one for the client, and the field that it is about."""
    match = _VALIDATION.fullmatch(message)
    reason, path = (match["reason"], match["path"]) if match else (message, None)
    missing = _MISSING.fullmatch(reason)
    if missing:
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return f"The field {param!r} is required.", param
    if not path:
        return f"The body is wrong: {reason}.", None
    if reason.startswith(f"{path!r} "):
        return f"{reason}.", path
    return f"The value of {path!r} is wrong: {reason[0].lower()}{reason[1:]}.", path
