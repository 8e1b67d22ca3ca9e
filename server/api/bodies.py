"""The bodies that clients send, parsed once at the border into types that cannot be wrong."""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from runtime.messages import Constraint
from server import constraints
from server.asked import Asked, SamplingParams, seed
from server.errors import bad_request

MAX_BODY = 4 * 2**20
"""Bytes of a request's body; more is refused with status 413."""
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_STOP_LENGTH = 1000
"""Characters of a stop string: preparing one takes time in proportion, in which every other stream waits."""

Positive = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)]
Make = Callable[[], Constraint]
"""Raises ApiError 400."""


class StructuredOutputs(msgspec.Struct, frozen=True):
    """vLLM's: what the answer must be; one of them."""

    json: str | dict[str, Any] | bool | None = None
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """In Lark."""
    json_object: bool | None = None


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that the routes for generating share; null means absent."""

    model: str | None = None
    """A model's id; absent takes the one that is served."""
    max_tokens: Positive | None = None
    """Absent takes what the prompt leaves of the context."""
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    """vLLM's: until the answer has so many tokens, it does not end by itself."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """Absent is the model's own, as `/v1/models` shows it; so are top_p, top_k, min_p and repetition_penalty."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 keep all tokens."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Absent is random."""
    frequency_penalty: Penalty | None = None
    """Taken off a token's logit for each time that the answer has it already."""
    presence_penalty: Penalty | None = None
    """Taken off the logit of every token that the answer has already."""
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    """vLLM's and llama.cpp's: divides the logit of every token that prompt or answer have already; 1 changes nothing."""
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    """By token id: added to its logit."""
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=MAX_STOPS)] | None = None
    """vLLM's: tokens that end the answer."""
    ignore_eos: bool | None = None
    """vLLM's and llama.cpp's: go on past the model's own end of an answer."""
    speculation: bool | None = None
    """Whether tokens may be guessed and verified several at a time; absent is yes."""
    guided_json: str | dict[str, Any] | bool | None = None
    """vLLM's: a JSON schema that the answer keeps to, as an object or as text."""
    guided_regex: str | None = None
    """vLLM's: a regular expression that the whole answer matches."""
    guided_choice: list[str] | None = None
    """vLLM's: texts of which the answer is one."""
    guided_grammar: str | None = None
    """vLLM's: a grammar in Lark, which the answer keeps to."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's newer form of the four."""

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        name, most = self.limit
        if most is not None and self.min_tokens is not None and self.min_tokens > most:
            raise Refused("min_tokens", f"is {self.min_tokens}, more than {name}, which is {most}")
        wishes = [of for of, _ in self.wishes()]
        if len(wishes) > 1:
            raise Refused(wishes[1], f"cannot be had together with {wishes[0]}: an answer keeps to one form")

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer's tokens, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are drawn; a seed that is not given is another each time."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed(self.seed),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items() if bias},
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
        )

    def wishes(self) -> list[tuple[str, Make]]:
        """What the answer is to keep to: in which field, and what makes a constraint of it."""
        flat = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        wishes = list(zip(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), flat, strict=True))
        makers: list[Any] = [_schema, constraints.regex, constraints.choice, constraints.lark]
        outputs = self.structured_outputs or StructuredOutputs()
        nested = (outputs.json, outputs.regex, outputs.choice, outputs.grammar)
        wishes += zip((f"structured_outputs.{name}" for name in ("json", "regex", "choice", "grammar")), nested, strict=True)
        if outputs.json_object:
            wishes.append(("structured_outputs.json_object", {"type": "object"}))
        return [
            (of, partial(make, value, of=of))
            for (of, value), make in zip(wishes, [*makers, *makers, _schema], strict=False)
            if value is not None
        ]

    def asked(self, **others: Any) -> Asked:
        """How the answers are to be made; `others` are further fields of `Asked`.

        Raises ApiError 400 where what they are to keep to is none.
        """
        limit, most = self.limit
        form, make = next(iter(self.wishes()), ("", None))
        return Asked(
            sampling=self.sampling,
            max_tokens=most,
            limit=limit,
            min_tokens=self.min_tokens or 0,
            stops=self.stops,
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            constraint=None if make is None else make(),
            form=form,
            speculation=self.speculation is not False,
            **others,
        )


class GenerateBody(GenerationBody, frozen=True, kw_only=True):
    """`POST /v1/generate`."""

    prompt: str


Body = TypeVar("Body", bound=msgspec.Struct)


async def read(request: web.Request, type_: type[Body], normal: Callable[[Any], Any] | None = None) -> Body:
    """The request's body as a `type_`; raises ApiError 400 that names the field at fault.

    `normal` puts JSON that may be written in several ways into the one that `type_` has.
    """
    try:
        raw = await request.read()
    except web.RequestPayloadError as error:
        raise bad_request(f"The body cannot be read: {error}.") from None
    try:
        if normal is None:
            return msgspec.json.decode(raw, type=type_)
        return msgspec.convert(normal(msgspec.json.decode(raw)), type_)
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


def as_written(value: dict[str, Any], *, of: str) -> str:
    """`value` as JSON with the spaces that models write, for the prompt. Raises ApiError 400 where it is nested too deeply."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise bad_request(f"The value of {of!r} is nested too deeply.", of) from None


def _schema(schema: str | dict[str, Any] | bool, *, of: str) -> Constraint:
    """A JSON schema given as JSON or as text that is JSON."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
            raise bad_request(f"The value of {of!r} is no JSON schema: {error}.", of) from None
    return constraints.json_schema(schema, of=of)


class Refused(ValueError):
    """A field whose value is of the right type and impossible; msgspec turns it into a ValidationError with this text."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r} {reason} - at `$.{name}`")


_HIGH_SURROGATE_ALONE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
_VALIDATION = re.compile(r"(?s)(?P<reason>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


def _explain(message: str) -> tuple[str, str | None]:
    """msgspec's sentence as one for the client, and the field that it is about."""
    match = _VALIDATION.fullmatch(message)
    reason, path = (match["reason"], match["path"]) if match else (message, None)
    inner = _VALIDATION.fullmatch(reason)
    if path and inner and inner["path"]:  # what a struct inside the body refused
        reason = inner["reason"].replace(repr(inner["path"]), repr(path := f"{path}.{inner['path']}"), 1)
    missing = _MISSING.fullmatch(reason)
    if missing:
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return f"The field {param!r} is required.", param
    if not path:
        return f"The body is wrong: {reason}.", None
    if reason.startswith(f"{path!r} "):
        return f"{reason}.", path
    return f"The value of {path!r} is wrong: {reason[0].lower()}{reason[1:]}.", path
