"""Google's Gemini API: `/v1beta/models`, and what is done with one of them."""

import secrets
from collections import OrderedDict, defaultdict
from typing import Any, Literal

import msgspec
from aiohttp import web

from server import fleet
from server.api.bodies import as_written, read
from server.api.error_shapes import GeminiError
from server.api.google.answers import (
    AnswerContent,
    AnswerPart,
    CalledFunctionPart,
    Candidate,
    CountTokensAnswer,
    FinishedBecause,
    GeminiModel,
    GeminiModelList,
    GenerateContentAnswer,
    LogprobsResult,
    UsageMetadata,
)
from server.api.google.bodies import CountTokensBody, FunctionDeclaration, GeminiContent, GenerateContentBody, normal
from server.api.google.schema import json_schema
from server.api.streaming import Form, send
from server.api.writing import SSE, decoded, encode, event, json
from server.asked import Asked, SamplingParams
from server.choices import Choices
from server.conversation import Chat, Fields, converse, tokenize
from server.errors import ApiError, bad_request
from server.generation import Piece
from server.journal import ENTRY
from server.served import Served
from server.service import SERVICE, Service
from server.tools import Arguments, CallEnded, CallStarted, Content, Tool


async def generate_content(request: web.Request) -> web.StreamResponse:
    """Answer whole."""
    body = await read(request, GenerateContentBody, normal)
    async with converse(request, request.match_info["model"], chat(body, body.config.asked())) as (served, choices):
        writer = _Writer(served, body, choices)
        async for piece in choices:
            writer.add(piece)
        return json(writer.whole())


async def stream_generate_content(request: web.Request) -> web.StreamResponse:
    """Answer piece by piece: an array of JSON objects or, with `alt=sse`, server-sent events."""
    alt = request.query.get("alt", "json")
    if alt not in ("json", "sse"):
        raise bad_request(f"The parameter 'alt' is {alt!r}; it may be json or sse.", "alt")
    body = await read(request, GenerateContentBody, normal)
    async with converse(request, request.match_info["model"], chat(body, body.config.asked())) as (served, choices):
        writer = _Writer(served, body, choices)
        form: Form = Events(writer) if alt == "sse" else Array(writer)
        return await send(request, choices, form)


async def count_tokens(request: web.Request) -> web.Response:
    """Count the tokens of a conversation."""
    body = await read(request, CountTokensBody, normal)
    async with request.app[SERVICE].lease(request, request.match_info["model"]) as (served, _):
        request[ENTRY].model = served.name
        return json(CountTokensAnswer(len(await tokenize(served, chat(body.asked, Asked())))))


async def models(request: web.Request) -> web.Response:
    """List the models."""
    service = request.app[SERVICE]
    return json(GeminiModelList([_model(service, model) for model in service.roster.models]))


async def model(request: web.Request) -> web.Response:
    """Describe one model."""
    service = request.app[SERVICE]
    return json(_model(service, service.model(request.match_info["model"])))


def _model(service: Service, model: fleet.Offer) -> GeminiModel:
    context, sampling = service.roster.holding(model)
    generates, used = model.task == "text-generation", SamplingParams().over(sampling)
    return GeminiModel(
        f"models/{model.name}",
        model.name,
        "1",
        model.name,
        context,
        context,
        list(METHODS) if generates else [],
        *((used.temperature, used.top_p, used.top_k) if generates else ()),
    )


def chat(body: GenerateContentBody, asked: Asked) -> Chat:
    """The conversation, to be answered as `asked`. Raises ApiError."""
    calling = body.calling
    allowed = calling.allowed_function_names
    tools = [
        _tool(declaration, f"tools[{at}].functionDeclarations[{index}].parameters")
        for at, tool in enumerate(body.tools or ())
        for index, declaration in enumerate(tool.function_declarations or ())
        if not allowed or declaration.name in allowed
    ]
    messages = _turns(body.contents)
    if not messages:
        raise bad_request("The value of 'contents' has nothing but thoughts; there is nothing to answer.", "contents")
    continued = messages[-1]["role"] == "assistant"
    if body.system_instruction is not None:
        words = "\n".join(part.text for part in body.system_instruction.parts if part.text is not None)
        messages = [{"role": "system", "content": words}, *messages]
    return Chat(
        messages=messages,
        asked=asked,
        tools=tuple(tools),
        choice=_CHOICES[calling.mode or "AUTO"],
        continue_final_message=continued,
        fields=Fields(messages="contents"),
    )


_CHOICES: dict[str, Literal["none", "auto", "required"]] = {
    "MODE_UNSPECIFIED": "auto",
    "AUTO": "auto",
    "ANY": "required",
    "NONE": "none",
}


def _tool(declaration: FunctionDeclaration, of: str) -> Tool:
    schema = declaration.parameters_json_schema
    if schema is None and declaration.parameters is not None:
        schema = json_schema(declaration.parameters, of=of)
    return Tool(declaration.name, declaration.description, schema)


def _turns(contents: list[GeminiContent]) -> list[dict[str, Any]]:
    """The turns as the messages of a chat. Calls without an id get one, by which results find them: the first one of a
    name answers the first call of it. The parts of a model's turn are the pieces of a stream, and those of others paragraphs.
    """
    turns: list[dict[str, Any]] = []
    unanswered: dict[str, OrderedDict[str, None]] = defaultdict(OrderedDict)
    made = 0
    for content in contents:
        role = {"model": "assistant", "system": "system"}.get(content.role or "user", "user")
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for part in content.parts:
            if part.thought:
                continue
            if part.text is not None:
                texts.append(part.text)
            elif (call := part.function_call) is not None:
                id = call.id or f"call_{made}"
                made += 1
                unanswered[call.name][id] = None
                function = {"name": call.name, "arguments": as_written(call.args or {}, of="contents")}
                calls.append({"id": id, "type": "function", "function": function})
            elif (result := part.function_response) is not None:
                ids = unanswered[result.name]
                id = result.id or next(iter(ids), f"call_{result.name}")
                ids.pop(id, None)
                told = as_written(result.response, of="contents")
                turns.append({"role": "tool", "tool_call_id": id, "name": result.name, "content": told})
        if texts or calls:
            words = ("" if role == "assistant" else "\n").join(texts)
            turns.append({"role": role, "content": words, **({"tool_calls": calls} if calls else {})})
    return turns


class _Answer:
    """One answer as it is made."""

    def __init__(self) -> None:
        self.parts: list[AnswerPart] = []
        """All so far, texts that follow one another as one."""
        self.finish: FinishedBecause | None = None
        self.logprobs = LogprobsResult([], [])
        self._name, self._arguments = "", list[str]()
        """The function that was called last, and its arguments as far as they have come."""
        self._malformed = False

    def add(self, piece: Piece) -> list[AnswerPart]:
        """Take the answer's next piece; gives what it completes."""
        new: list[AnswerPart] = []
        for part in piece.said:
            match part:
                case Content(text):
                    new.append(AnswerPart(text=text))
                case CallStarted(_, name):
                    self._name, self._arguments = name, []
                case Arguments(_, text):
                    self._arguments.append(text)
                case CallEnded(_, complete):
                    self._end_call(complete, new)
        if piece.finish is not None:
            stopped: FinishedBecause = "MALFORMED_FUNCTION_CALL" if self._malformed else "STOP"
            self.finish = "MAX_TOKENS" if piece.finish == "length" else stopped
        for each in new:
            last = self.parts[-1] if self.parts else None
            if last is not None and isinstance(last.text, str) and isinstance(each.text, str):
                self.parts[-1] = AnswerPart(text=last.text + each.text)
            else:
                self.parts.append(each)
        return new

    def _end_call(self, complete: bool, parts: list[AnswerPart]) -> None:
        """A call is told once it is whole; one that is not, as where the answer is cut in it, is never."""
        args = decoded("".join(self._arguments)) if complete else None
        if args is None:
            self._malformed = True
        else:
            parts.append(AnswerPart(function_call=CalledFunctionPart(f"call_{secrets.token_hex(12)}", self._name, args)))


class _Writer:
    """Answers as they are made, and in the shape in which they are told."""

    def __init__(self, served: Served, body: GenerateContentBody, choices: Choices) -> None:
        self._served = served
        self._logprobs = bool(body.config.response_logprobs)
        self._choices = choices
        self._id = secrets.token_urlsafe(16)
        self._answers = [_Answer() for _ in range(choices.count)]

    def add(self, piece: Piece) -> Candidate | None:
        """Take the next piece; gives what it adds, if that shows anything."""
        answer = self._answers[piece.index]
        parts = answer.add(piece)
        logprobs = LogprobsResult.of(piece, self._served.text) if self._logprobs and piece.tokens else None
        if logprobs is not None:
            answer.logprobs.extend(logprobs)
        if not parts and logprobs is None and piece.finish is None:
            return None
        return Candidate(
            content=AnswerContent(parts),
            finish_reason=answer.finish or msgspec.UNSET,
            index=piece.index,
            logprobs_result=msgspec.UNSET if logprobs is None else logprobs,
        )

    def tell(self, *candidates: Candidate) -> GenerateContentAnswer:
        """`candidates`, and what goes with them."""
        return GenerateContentAnswer(
            candidates=list(candidates),
            usage_metadata=UsageMetadata.of(self._choices.usage),
            model_version=self._served.name,
            response_id=self._id,
        )

    def whole(self) -> GenerateContentAnswer:
        """The answers, once they have ended."""
        return self.tell(
            *(
                Candidate(
                    content=AnswerContent(answer.parts),
                    finish_reason=answer.finish or msgspec.UNSET,
                    index=index,
                    logprobs_result=answer.logprobs if self._logprobs else msgspec.UNSET,
                )
                for index, answer in enumerate(self._answers)
            )
        )


class Events:
    """Server-sent events, the data of each an answer's piece."""

    content_type = SSE

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """What the piece adds, if that shows anything."""
        added = self._writer.add(piece)
        return b"" if added is None else event(self._writer.tell(added))

    def end(self, choices: Choices) -> bytes:
        """Nothing: the stream is over once every answer has its reason."""
        return b""

    def error(self, error: ApiError) -> bytes:
        """An event with an error."""
        return event(GeminiError.of(error))


class Array:
    """One JSON array, whose elements come as they are made."""

    content_type = "application/json"

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._separator = b""

    def begin(self) -> bytes:
        """The array's beginning."""
        return b"["

    def piece(self, piece: Piece) -> bytes:
        """What the piece adds, if that shows anything."""
        added = self._writer.add(piece)
        return b"" if added is None else self._element(encode(self._writer.tell(added)))

    def end(self, choices: Choices) -> bytes:
        """The array's end."""
        return b"]"

    def error(self, error: ApiError) -> bytes:
        """An element with an error, and the array's end."""
        return self._element(encode(GeminiError.of(error))) + b"]"

    def _element(self, element: bytes) -> bytes:
        separator, self._separator = self._separator, b",\n"
        return separator + element


VERSIONS = ("v1beta", "v1")
"""Of Google's API, with the same bodies and answers; the models of v1 are told by OpenAI's route."""
METHODS = {
    "generateContent": generate_content,
    "streamGenerateContent": stream_generate_content,
    "countTokens": count_tokens,
}
"""What is done with a model."""
