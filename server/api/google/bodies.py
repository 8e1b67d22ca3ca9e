"""The bodies of Google's Gemini API. What is not known is ignored; what is known and impossible, refused."""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.messages import MOST_ALTERNATIVES, Constraint
from server import constraints
from server.api.bodies import MAX_STOPS, Penalty, Positive, Refused, StopString
from server.api.google.schema import json_schema
from server.api.openai.bodies import MAX_TOOLS, MAX_TURNS
from server.asked import Asked, SamplingParams, seed
from server.errors import bad_request

MAX_CANDIDATES = 8
"""Answers to one request."""

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z_][a-zA-Z0-9_.:-]{0,127}$")]


class FunctionCall(msgspec.Struct, frozen=True, rename="camel"):
    """A call that the model made."""

    name: str
    args: dict[str, Any] | None = None
    id: str | None = None


class FunctionResponse(msgspec.Struct, frozen=True, rename="camel"):
    """What a call gave."""

    name: str
    response: dict[str, Any]
    id: str | None = None


class GeminiPart(msgspec.Struct, frozen=True, rename="camel"):
    """A piece of a turn: one of text, functionCall and functionResponse."""

    text: str | None = None
    function_call: FunctionCall | None = None
    function_response: FunctionResponse | None = None
    thought: bool | None = None
    """What the model thought in an earlier turn, which it is not told again."""
    inline_data: Any = None
    file_data: Any = None
    executable_code: Any = None
    code_execution_result: Any = None

    def __post_init__(self) -> None:
        """Refuse what is no text, and what is of two kinds or none."""
        _refuse(self, "inline_data", "file_data", "executable_code", "code_execution_result", why="the models here read text")
        kinds = [name for name in ("text", "function_call", "function_response") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise Refused(_camel(kinds[1]), f"cannot stand beside {_camel(kinds[0])} in one part")
        if not kinds and not self.thought:
            raise Refused("text", "is required in a part without functionCall and functionResponse")


class GeminiContent(msgspec.Struct, frozen=True, rename="camel"):
    """One turn of a conversation."""

    parts: Annotated[list[GeminiPart], Meta(min_length=1, max_length=1000)]
    role: Literal["user", "model", "function", "system"] | None = None
    """Absent is the user."""

    def __post_init__(self) -> None:
        """Refuse a call that the model did not make, and a result that it did."""
        for part in self.parts:
            if part.function_call is not None and self.role != "model":
                raise Refused("parts", "can have functionCall only in a content of role model")
            if part.function_response is not None and self.role == "model":
                raise Refused("parts", "cannot have functionResponse in a content of role model")


class FunctionDeclaration(msgspec.Struct, frozen=True, rename="camel"):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """Google's Schema of an object."""
    parameters_json_schema: dict[str, Any] | None = None
    """In its place, a JSON schema."""

    def __post_init__(self) -> None:
        """Refuse two schemas."""
        if self.parameters is not None and self.parameters_json_schema is not None:
            raise Refused("parametersJsonSchema", "cannot be had together with parameters")


class GeminiTool(msgspec.Struct, frozen=True, rename="camel"):
    """Functions that the model may call; tools that Google runs are not available."""

    function_declarations: Annotated[list[FunctionDeclaration], Meta(max_length=MAX_TOOLS)] | None = None
    google_search: Any = None
    google_search_retrieval: Any = None
    google_maps: Any = None
    enterprise_web_search: Any = None
    retrieval: Any = None
    file_search: Any = None
    code_execution: Any = None
    computer_use: Any = None
    url_context: Any = None
    mcp_servers: Any = None

    def __post_init__(self) -> None:
        """Refuse the tools that Google runs."""
        names = [name for name in self.__struct_fields__ if name != "function_declarations"]
        _refuse(self, *names, why="only functions can be called")


class FunctionCallingConfig(msgspec.Struct, frozen=True, rename="camel"):
    """Whether functions are called, and which."""

    mode: Literal["MODE_UNSPECIFIED", "AUTO", "ANY", "NONE"] | None = None
    """Absent is AUTO."""
    allowed_function_names: Annotated[list[str], Meta(max_length=MAX_TOOLS)] | None = None

    def __post_init__(self) -> None:
        """Refuse names that bind nothing."""
        if self.allowed_function_names and self.mode != "ANY":
            raise Refused("allowedFunctionNames", "is only allowed together with mode: ANY")


class GeminiToolConfig(msgspec.Struct, frozen=True, rename="camel"):
    """How tools are used."""

    function_calling_config: FunctionCallingConfig | None = None


class GenerationConfig(msgspec.Struct, frozen=True, rename="camel"):
    """How the answers are to be made; null means absent."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """Absent is the model's own, as the list of models shows it; so are topP and topK."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    """0 keeps all tokens."""
    candidate_count: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)] | None = None
    max_output_tokens: Positive | None = None
    """Absent takes what the prompt leaves of the context."""
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Absent is random."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    response_mime_type: Literal["text/plain", "application/json", "text/x.enum"] | None = None
    response_schema: dict[str, Any] | None = None
    """Google's Schema of the answer."""
    response_json_schema: dict[str, Any] | bool | None = None
    """In its place, a JSON schema."""
    response_logprobs: bool | None = None
    """Tell the tokens' log-probabilities."""
    logprobs: Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Alternatives to each token."""
    thinking_config: dict[str, Any] | None = None
    """Accepted; how much a model thinks is its own matter."""
    response_modalities: list[str] | None = None
    """Only TEXT."""
    speech_config: Any = None
    image_config: Any = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        _refuse(self, "speech_config", "image_config", why="the models here write text")
        if any(modality.upper() != "TEXT" for modality in self.response_modalities or ()):
            raise Refused("responseModalities", "may only be TEXT")
        if self.logprobs and not self.response_logprobs:
            raise Refused("logprobs", "is only allowed together with responseLogprobs: true")
        if self.response_schema is not None and self.response_json_schema is not None:
            raise Refused("responseJsonSchema", "cannot be had together with responseSchema")
        given = "responseSchema" if self.response_schema is not None else "responseJsonSchema"
        if self.response_mime_type == "text/x.enum":
            if self.response_schema is None:
                raise Refused("responseMimeType", "text/x.enum is only allowed together with a responseSchema that has an enum")
        elif self.response_mime_type != "application/json" and (
            self.response_schema is not None or self.response_json_schema is not None
        ):
            raise Refused(given, "is only allowed together with responseMimeType: application/json")

    @property
    def formed(self) -> bool:
        """Whether the answer keeps to a form."""
        return self.response_mime_type not in (None, "text/plain")

    def form(self) -> tuple[str, Constraint | None]:
        """What the answer keeps to, and the body's field that says so. Raises ApiError 400."""
        of = "generationConfig.responseSchema"
        if self.response_mime_type == "text/x.enum":
            options = (self.response_schema or {}).get("enum")
            if not isinstance(options, list) or not options or not all(isinstance(each, str) and each for each in options):
                raise bad_request(f"The value of '{of}.enum' is wrong: expected a list of texts.", f"{of}.enum")
            return of, constraints.choice(options, of=f"{of}.enum")
        if not self.formed:
            return of, None
        if self.response_json_schema is not None:
            of = "generationConfig.responseJsonSchema"
            return of, constraints.json_schema(self.response_json_schema, of=of)
        if self.response_schema is not None:
            return of, constraints.json_schema(json_schema(self.response_schema, of=of), of=of)
        return "generationConfig.responseMimeType", constraints.json_object()

    def asked(self) -> Asked:
        """How the answers are to be made. Raises ApiError 400 where what they are to keep to is none."""
        of, constraint = self.form()
        return Asked(
            sampling=SamplingParams(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=seed(self.seed),
                frequency_penalty=self.frequency_penalty or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
            ),
            max_tokens=self.max_output_tokens,
            limit="generationConfig.maxOutputTokens",
            stops=tuple(self.stop_sequences or ()),
            top_logprobs=self.logprobs or 0,
            constraint=constraint,
            form=of,
            count=self.candidate_count or 1,
        )


Contents = Annotated[list[GeminiContent], Meta(min_length=1, max_length=MAX_TURNS)]


class GenerateContentBody(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`POST /v1beta/models/{model}:generateContent` and `:streamGenerateContent`."""

    contents: Contents
    system_instruction: GeminiContent | None = None
    tools: Annotated[list[GeminiTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_config: GeminiToolConfig | None = None
    generation_config: GenerationConfig | None = None
    safety_settings: list[Any] | None = None
    """Accepted; nothing is filtered here."""
    cached_content: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is of the right type and yet impossible."""
        if self.cached_content:
            raise Refused("cachedContent", "is not available: prompts that begin alike share their rows without being told to")
        names = [declaration.name for declaration in self.declarations]
        if len(names) > MAX_TOOLS:
            raise Refused("tools", f"declares {len(names)} functions, more than {MAX_TOOLS}")
        if len(set(names)) < len(names):
            raise Refused("tools", "declares a function twice")
        if self.calling.mode != "ANY":
            return
        if not names:
            raise Refused("toolConfig.functionCallingConfig.mode", "may only be ANY where tools declare functions")
        unknown = set(self.calling.allowed_function_names or ()) - set(names)
        if unknown:
            of = "toolConfig.functionCallingConfig.allowedFunctionNames"
            raise Refused(of, f"names {min(unknown)!r}, which is none of the functions")
        if self.config.formed:
            raise Refused("generationConfig.responseMimeType", "may only be text/plain where a function must be called")

    @property
    def declarations(self) -> list[FunctionDeclaration]:
        """The functions of all tools."""
        return [declaration for tool in self.tools or () for declaration in tool.function_declarations or ()]

    @property
    def calling(self) -> FunctionCallingConfig:
        """Whether functions are called, and which."""
        wanted = self.tool_config.function_calling_config if self.tool_config is not None else None
        return wanted or FunctionCallingConfig()

    @property
    def config(self) -> GenerationConfig:
        """How the answers are to be made."""
        return self.generation_config or GenerationConfig()


class CountTokensBody(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`POST /v1beta/models/{model}:countTokens`: contents, or a whole request."""

    contents: Contents | None = None
    system_instruction: GeminiContent | None = None
    tools: Annotated[list[GeminiTool], Meta(max_length=MAX_TOOLS)] | None = None
    generate_content_request: GenerateContentBody | None = None

    def __post_init__(self) -> None:
        """Refuse both, and neither."""
        if self.contents is None and self.generate_content_request is None:
            raise Refused("contents", "is required where there is no generateContentRequest")
        if self.contents is not None and self.generate_content_request is not None:
            raise Refused("generateContentRequest", "cannot be had together with contents")

    @property
    def asked(self) -> GenerateContentBody:
        """The request whose prompt is counted."""
        if self.generate_content_request is not None:
            return self.generate_content_request
        return GenerateContentBody(contents=self.contents or [], system_instruction=self.system_instruction, tools=self.tools)


_OPAQUE = frozenset(
    ("args", "response", "parameters", "parametersJsonSchema", "responseSchema", "responseJsonSchema", "safetySettings")
)
"""Fields in which the names are the client's own."""
_EXACT = 2**53
"""Below which a whole number is the same as a float."""


def normal(value: Any) -> Any:
    """A body with its fields' names in camelCase and its whole numbers without a fraction, as Google's JSON allows either.

    https://protobuf.dev/programming-guides/json/
    """
    match value:
        case dict():
            named = ((_camel(name), each) for name, each in value.items())
            return {name: each if name in _OPAQUE else normal(each) for name, each in named}
        case list():
            return [normal(each) for each in value]
        case float() if value.is_integer() and abs(value) < _EXACT:
            return int(value)
        case _:
            return value


def _camel(name: str) -> str:
    return re.sub("_([a-z0-9])", lambda found: found[1].upper(), name) if "_" in name else name


def _refuse(struct: msgspec.Struct, *names: str, why: str) -> None:
    for name in names:
        if getattr(struct, name) is not None:
            raise Refused(_camel(name), f"is not available on this server: {why}")
