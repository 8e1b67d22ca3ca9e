"""`GET /openapi.json`: what the routes take and answer, in OpenAPI 3.1, from the very types that parse and write the bodies.

https://spec.openapis.org/oas/v3.1.1.html
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from aiohttp import web

from server.access import METRICS, OPEN, in_gemini
from server.api import field_docs
from server.api.admin import ModelStatus, ServerStatus
from server.api.anthropic import answers as messages_answers
from server.api.anthropic.answers import MessagesAnswer, TokenCount
from server.api.anthropic.bodies import Conversation, MessagesBody
from server.api.bodies import MAX_BODY, GenerateBody
from server.api.error_shapes import GeminiError, MessagesError
from server.api.generate import NDJSON, LastLine, Line
from server.api.google import gemini
from server.api.google.answers import CountTokensAnswer, GeminiModel, GeminiModelList, GenerateContentAnswer
from server.api.google.bodies import CountTokensBody, GenerateContentBody
from server.api.openai import responses_answers
from server.api.openai.answers import ChatChunk, ChatCompletion, Completion, Model, ModelList
from server.api.openai.bodies import ChatBody, CompletionBody
from server.api.openai.embeddings import EmbeddingBody, EmbeddingList
from server.api.openai.responses_answers import ResponseObject
from server.api.openai.responses_bodies import ResponsesBody
from server.api.tokenizing import DetokenizeBody, Detokenized, TokenizeBody, Tokenized
from server.errors import ErrorBody
from server.journal import HEADER
from server.page import site

VERSION = "1"
"""Of the interface: the number in its paths."""

JSON = "application/json"
SSE = "text/event-stream"
TEXT = "text/plain"
HTML = "text/html"

Schema = dict[str, Any]


class Status(msgspec.Struct, frozen=True):
    """How the server is."""

    status: Literal["ok", "ready", "degraded"]
    models: dict[str, str] = {}
    """Of those that cannot be served: why."""


@dataclass(frozen=True)
class Stream:
    """An answer that comes piece by piece, each of them one of `items` in JSON."""

    description: str
    items: tuple[type[msgspec.Struct], ...] = ()


@dataclass(frozen=True)
class Operation:
    """What one route takes and answers."""

    id: str
    summary: str
    answers: Mapping[str, type[msgspec.Struct] | Stream]
    """With status 200, by media type."""
    body: type[msgspec.Struct] | None = None
    parameters: tuple[Schema, ...] = ()
    errors: tuple[int, ...] = field(default=())
    """Statuses other than 200, besides those of a missing key and of a body that cannot be read."""
    error: type[msgspec.Struct] = ErrorBody
    """What these have as their body."""


_OUTCOMES = {
    400: "The body is no JSON, a value is wrong or asks for what this server does not do, or the prompt does not fit the "
    "context; `param` names the field.",
    401: "An API key is needed, and none or an unknown one was sent.",
    403: "The key is no admin key.",
    404: "There is no such model or file.",
    408: "The client read too slowly, and the answer was given up.",
    409: "It cannot be done; the message says why.",
    413: f"The body is larger than {MAX_BODY} bytes.",
    429: "The queue is full.",
    500: "The engine failed on this request.",
    503: "The model cannot be had now: it is quarantined, has no room or was not loaded in time; or the server shuts down.",
    504: "The request ran out of the time that it may wait or take.",
}
"""When each status other than 200 comes."""

_GENERATING = (404, 408, 429, 500, 503, 504)
_EMBEDDING = (404, 429, 500, 503, 504)
_LOADING = (404, 429, 503)
_NAMED_EVENTS = "Server-sent events, the data of each JSON with the event's name as its type."
_CHUNKS = "Server-sent events, the data of each JSON but for the last, [DONE]. What goes wrong on the way is an event `error`."
_MODEL_NAME: Schema = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "The model's id.",
    "schema": {"type": "string", "minLength": 1},
}
_MODEL_ID: Schema = {**_MODEL_NAME, "name": "model"}
_ALT: Schema = {
    "name": "alt",
    "in": "query",
    "description": "How the stream is written: as an array or as server-sent events.",
    "schema": {"enum": ["json", "sse"], "default": "json"},
}

_GEMINI_PIECES = (GenerateContentAnswer, GeminiError)
_GEMINI_METHODS: tuple[
    tuple[str, str, Mapping[str, type[msgspec.Struct] | Stream], type[msgspec.Struct], tuple[Schema, ...], tuple[int, ...]], ...
] = (
    (
        "generateContent",
        "Answer a conversation whole.",
        {JSON: GenerateContentAnswer},
        GenerateContentBody,
        (_MODEL_ID,),
        _GENERATING,
    ),
    (
        "streamGenerateContent",
        "Answer a conversation as a stream: one JSON array, or server-sent events.",
        {
            JSON: Stream("An array, whose elements come as they are made.", _GEMINI_PIECES),
            SSE: Stream("Server-sent events, the data of each JSON.", _GEMINI_PIECES),
        },
        GenerateContentBody,
        (_MODEL_ID, _ALT),
        _GENERATING,
    ),
    (
        "countTokens",
        "Count a conversation's tokens.",
        {JSON: CountTokensAnswer},
        CountTokensBody,
        (_MODEL_ID,),
        _LOADING,
    ),
)
"""What is done with a model by Google's API."""

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "chat_completions",
        "Answer a chat, whole or as a stream.",
        {JSON: ChatCompletion, SSE: Stream(_CHUNKS, (ChatChunk, ErrorBody))},
        body=ChatBody,
        errors=_GENERATING,
    ),
    ("POST", "/v1/completions"): Operation(
        "completions",
        "Continue a prompt, whole or as a stream.",
        {JSON: Completion, SSE: Stream(_CHUNKS, (Completion, ErrorBody))},
        body=CompletionBody,
        errors=_GENERATING,
    ),
    ("POST", "/v1/generate"): Operation(
        "generate",
        f"Continue a prompt: its text as it comes or, for those who accept {NDJSON}, an object a line.",
        {
            TEXT: Stream("The text. A connection that breaks off says that it is not complete."),
            NDJSON: Stream("Lines, the last of which tells why the answer ended.", (Line, LastLine, ErrorBody)),
        },
        body=GenerateBody,
        errors=_GENERATING,
    ),
    ("POST", "/v1/embeddings"): Operation(
        "embeddings", "Give the embedding of each input.", {JSON: EmbeddingList}, body=EmbeddingBody, errors=_EMBEDDING
    ),
    ("POST", "/v1/responses"): Operation(
        "responses",
        "Answer a conversation, whole or as a stream.",
        {JSON: ResponseObject, SSE: Stream(_NAMED_EVENTS, responses_answers.EVENTS)},
        body=ResponsesBody,
        errors=_GENERATING,
    ),
    ("GET", "/v1/responses/{id}"): Operation(
        "stored_response",
        "None is stored, so that there is none.",
        {},
        parameters=({**_MODEL_NAME, "name": "id", "description": "A response's id."},),
        errors=(404,),
    ),
    ("POST", "/v1/messages"): Operation(
        "messages",
        "Answer a conversation, whole or as a stream.",
        {JSON: MessagesAnswer, SSE: Stream(_NAMED_EVENTS, (*messages_answers.EVENTS, MessagesError))},
        body=MessagesBody,
        errors=_GENERATING,
        error=MessagesError,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "count_message_tokens",
        "Count a conversation's tokens.",
        {JSON: TokenCount},
        body=Conversation,
        errors=_LOADING,
        error=MessagesError,
    ),
    ("GET", "/v1beta/models"): Operation("gemini_models", "List the models.", {JSON: GeminiModelList}, error=GeminiError),
    ("GET", "/v1beta/models/{model}"): Operation(
        "gemini_model",
        "Describe a model.",
        {JSON: GeminiModel},
        parameters=(_MODEL_ID,),
        errors=(404,),
        error=GeminiError,
    ),
    **{
        ("POST", f"/{version}/models/{{model}}:{method}"): Operation(
            f"{version}_{method}",
            summary,
            answers,
            body=body,
            parameters=parameters,
            errors=errors,
            error=GeminiError,
        )
        for version in gemini.VERSIONS
        for method, summary, answers, body, parameters, errors in _GEMINI_METHODS
    },
    ("POST", "/tokenize"): Operation(
        "tokenize", "Tell the tokens of a prompt or a chat.", {JSON: Tokenized}, body=TokenizeBody, errors=_LOADING
    ),
    ("POST", "/detokenize"): Operation(
        "detokenize", "Tell the text of tokens.", {JSON: Detokenized}, body=DetokenizeBody, errors=_LOADING
    ),
    ("GET", "/v1/models"): Operation("models", "List the models.", {JSON: ModelList}),
    ("GET", "/v1/models/{model}"): Operation(
        "model", "Describe a model.", {JSON: Model}, parameters=(_MODEL_ID,), errors=(404,)
    ),
    ("GET", "/healthz"): Operation("health", "Say that the HTTP process lives.", {JSON: Status}),
    ("GET", "/readyz"): Operation("readiness", "Say whether requests are taken.", {JSON: Status}, errors=(503,)),
    ("GET", METRICS): Operation(
        "metrics", "Numbers for Prometheus, in its text format.", {TEXT: Stream("The numbers.")}, errors=(503,)
    ),
    ("GET", "/admin/status"): Operation(
        "status", "Tell what the server does and holds.", {JSON: ServerStatus}, errors=(403, 503)
    ),
    **{
        ("POST", f"/admin/models/{{name}}/{action}"): Operation(
            action, summary, {JSON: ModelStatus}, parameters=(_MODEL_NAME,), errors=(403, 404, 409)
        )
        for action, summary in (
            ("load", "Load a model, or wait until it is loaded."),
            ("unload", "Have a model's answers finish, and end its processes."),
            ("reload", "Load a model's bundle as it is now, and have it take the place of the one that is loaded."),
        )
    },
    ("GET", "/openapi.json"): Operation("openapi", "This description.", {JSON: Stream("OpenAPI 3.1.")}),
    ("GET", site.INDEX): Operation("page", "The page: a playground, and the engines live.", {HTML: Stream("The page.")}),
    ("GET", site.DOCS): Operation("docs", "This description, to read.", {HTML: Stream("The page.")}),
    ("GET", site.ICON): Operation("icon", "The page's icon.", {site.MEDIA[".svg"]: Stream("The icon.")}),
    ("GET", site.FILES): Operation(
        "part",
        "A file that these pages are made of.",
        {media: Stream("The file.") for media in site.MEDIA.values()},
        parameters=({**_MODEL_NAME, "name": "file", "description": "The file's name."},),
        errors=(404,),
    ),
}
"""Every route, by method and path. HEAD goes where GET does."""


async def openapi(request: web.Request) -> web.Response:
    """Describe the routes."""
    return web.Response(body=_encoded(), content_type=JSON)


def document() -> Schema:
    """The OpenAPI document."""
    types = sorted(
        {type_ for operation in OPERATIONS.values() for type_ in _types(operation)}, key=lambda type_: type_.__name__
    )
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    field_docs.describe(types, schemas)
    paths: dict[str, Schema] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "engineshed",
            "version": VERSION,
            "description": "Another path gets status 404, another method of one of these paths 405.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "headers": _HEADERS, "securitySchemes": _KEYS},
    }


_HEADERS: Schema = {
    "request-id": {
        "description": f"The request's id in the server's log: the client's own, from its header {HEADER}, or a new one.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    "retry-after": {"description": "Seconds until it may be worth another try.", "schema": {"type": "integer", "minimum": 1}},
    "challenge": {"description": "How a key is to be sent.", "schema": {"type": "string"}},
}
_KEYS: Schema = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "x-goog-api-key": {"type": "apiKey", "in": "header", "name": "x-goog-api-key"},
    "key": {"type": "apiKey", "in": "query", "name": "key"},
}
_IN_ADDRESS = "key"
"""The one of these that only Google's API takes."""
_EVENT: Schema = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
"""A server-sent event as it is parsed."""
_NEEDLESS: Schema = {}
"""A security requirement that is always met: a server without keys asks for none."""


@cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


def _types(operation: Operation) -> list[type[msgspec.Struct]]:
    """Those of its bodies and answers, and of every error."""
    found: list[type[msgspec.Struct]] = [operation.error]
    if operation.body is not None:
        found.append(operation.body)
    for answer in operation.answers.values():
        found += answer.items if isinstance(answer, Stream) else [answer]
    return found


def _operation(path: str, operation: Operation) -> Schema:
    statuses = set(operation.errors)
    described: Schema = {"operationId": operation.id, "summary": operation.summary}
    if path not in OPEN:
        keys = [name for name in _KEYS if name != _IN_ADDRESS or in_gemini(path)]
        described["security"] = [_NEEDLESS, *({name: []} for name in keys)]
        statuses.add(401)
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": _reference(operation.body)}}}
        statuses |= {400, 413}
    described["responses"] = {str(status): _error(status, operation.error) for status in sorted(statuses)}
    if operation.answers:
        described["responses"]["200"] = {
            "description": operation.summary,
            "headers": _headers(200),
            "content": {media: _content(media, each) for media, each in operation.answers.items()},
        }
    return described


def _content(media: str, answer: type[msgspec.Struct] | Stream) -> Schema:
    if not isinstance(answer, Stream):
        return {"schema": _reference(answer)}
    if media == SSE:  # OpenAPI 3.1 has no word for a stream; tools that know this one take its schema for that of an event.
        content: Schema = {"schema": {**_EVENT, "description": answer.description}}
    else:
        content = {"schema": {"type": "object" if media == JSON else "string", "description": answer.description}}
    if answer.items and media == JSON:
        content["schema"] = {"type": "array", "items": {"anyOf": [_reference(item) for item in answer.items]}}
    elif answer.items:
        content["x-item-schema"] = {"anyOf": [_reference(item) for item in answer.items]}
    return content


def _error(status: int, body: type[msgspec.Struct]) -> Schema:
    return {
        "description": f"{HTTPStatus(status).phrase}. {_OUTCOMES[status]}",
        "headers": _headers(status),
        "content": {JSON: {"schema": _reference(body)}},
    }


def _headers(status: int) -> Schema:
    names = {HEADER: "request-id"}
    if status in (429, 503):
        names["Retry-After"] = "retry-after"
    if status == 401:
        names["WWW-Authenticate"] = "challenge"
    return {header: {"$ref": f"#/components/headers/{name}"} for header, name in names.items()}


def _reference(type_: type[msgspec.Struct]) -> Schema:
    return {"$ref": f"#/components/schemas/{type_.__name__}"}
