"""`POST /v1/embeddings`, as OpenAI has it; and `truncate_prompt_tokens`, which is vLLM's."""

import asyncio
import base64
from typing import Annotated, Literal, cast

import msgspec
import numpy as np
from aiohttp import web
from msgspec import Meta

from runtime.messages import MOST_INPUTS
from server.api.bodies import Positive, read
from server.embedder import Embedder, EmbeddingUsage, Floats
from server.errors import bad_request
from server.service import SERVICE, mismatch

_MANY_NUMBERS = 20_000
"""Numbers of an answer from which on it is written in a thread, so that the streams do not wait for it."""

_encode = msgspec.json.Encoder().encode


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/embeddings`; null means absent."""

    input: str | list[str | int | list[int]]
    """A text, up to 2,048 texts, the tokens of a text, or those of up to 2,048 texts."""
    model: str | None = None
    """A model's id; absent takes the first that is for embeddings."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is that of little-endian float32; absent is float."""
    dimensions: Positive | None = None
    """Only the first so many numbers of each embedding, brought to length 1 again."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    """Cut longer inputs to so many tokens, -1 to as many as the model takes; absent refuses those that are too long for it."""
    user: str | None = None
    """Ignored."""


class Embedding(msgspec.Struct, frozen=True):
    """The embedding of one input."""

    index: int
    embedding: list[float] | str
    """Numbers, or their base64."""
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    """The embeddings of a request's inputs, in their order."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


async def embeddings(request: web.Request) -> web.Response:
    """Give the embedding of each input."""
    service = request.app[SERVICE]
    body = await read(request, EmbeddingBody)
    texts = _texts(body.input)
    async with service.lease(request, body.model, "feature-extraction") as (served, limits):
        if not isinstance(served, Embedder):  # it has been built anew, for something else
            raise mismatch(served.name, served.bundle.task)
        dimensions = _dimensions(served, body.dimensions)
        inputs = await _tokens(served, texts, body.truncate_prompt_tokens)
        vectors = await served.embed(request, inputs, limits)
    if dimensions is not None:
        vectors = shortened(vectors, dimensions)
    tokens = sum(map(len, inputs))
    usage = EmbeddingUsage(tokens, tokens)
    write = _in_base64 if body.encoding_format == "base64" else _in_numbers
    if vectors.size > _MANY_NUMBERS:
        data = await asyncio.to_thread(write, vectors)
    else:
        data = write(vectors)
    answer = EmbeddingList(cast(list[Embedding], data), served.name, usage)
    return web.Response(body=_encode(answer), content_type="application/json")


def shortened(vectors: Floats, dimensions: int) -> Floats:
    """The first `dimensions` numbers of each of `vectors` [inputs, dimensions], brought to length 1; zeros stay zeros."""
    kept = vectors[:, :dimensions]
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return (kept / np.where(norms == 0, 1, norms)).astype(np.float32)


def _texts(given: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    """The inputs, all as text or all as tokens. Raises ApiError 400."""
    entries = [given] if isinstance(given, str) else given
    texts = [each for each in entries if isinstance(each, str)]
    lists = [each for each in entries if isinstance(each, list)]
    numbers = [each for each in entries if isinstance(each, int)]
    if not entries:
        raise bad_request("The value of 'input' is empty; send at least one text.", "input")
    if len(entries) not in (len(texts), len(lists), len(numbers)):
        raise bad_request("The value of 'input' mixes texts and tokens; send all inputs as text, or all as tokens.", "input")
    inputs: list[str] | list[list[int]] = texts or lists or [numbers]
    if len(inputs) > MOST_INPUTS:
        raise bad_request(f"The value of 'input' has {len(inputs)} inputs; up to {MOST_INPUTS} are taken at once.", "input")
    for number, each in enumerate(inputs):
        if not each:
            where = "input" if isinstance(given, str) else f"input[{number}]"
            raise bad_request(f"The value of {where!r} is empty; there is nothing to embed.", where)
    return inputs


def _dimensions(served: Embedder, wanted: int | None) -> int | None:
    encoder = served.bundle.encoder
    if wanted is not None and encoder is not None and wanted > encoder.dimensions:
        raise bad_request(
            f"The value of 'dimensions' is {wanted}; an embedding of {served.name!r} has {encoder.dimensions} numbers.",
            "dimensions",
        )
    return wanted


async def _tokens(served: Embedder, texts: list[str] | list[list[int]], truncate: int | None) -> list[list[int]]:
    """The tokens of each input, none of them too many. Raises ApiError 400."""
    longest = served.context
    if truncate == 0 or (truncate is not None and truncate > longest):
        raise bad_request(
            f"The value of 'truncate_prompt_tokens' is {truncate}; it is -1, or 1 to {longest}, as many as the model takes.",
            "truncate_prompt_tokens",
        )
    most = longest if truncate == -1 else truncate
    if most is not None and most <= served.text.special_tokens and isinstance(texts[0], str):
        raise bad_request(
            f"The value of 'truncate_prompt_tokens' leaves no room: {served.text.special_tokens} tokens stand around a text.",
            "truncate_prompt_tokens",
        )
    words = [text for text in texts if isinstance(text, str)]
    if words:
        inputs = await served.tokenize_all(words, of="input", most=most)
    else:
        inputs = [tokens[:most] for tokens in texts if not isinstance(tokens, str)]
        for number, tokens in enumerate(inputs):
            _check_tokens(served, tokens, f"input[{number}]")
    for number, tokens in enumerate(inputs):
        if not tokens:
            raise bad_request(f"The text of input[{number}] has no tokens; there is nothing to embed.", f"input[{number}]")
        if len(tokens) > longest:
            raise bad_request(
                f"input[{number}] has {len(tokens)} tokens; the model takes up to {longest} of a text. Shorten it, or have it "
                "cut with truncate_prompt_tokens: -1.",
                f"input[{number}]",
                "context_length_exceeded",
            )
    return inputs


def _check_tokens(served: Embedder, tokens: list[int], where: str) -> None:
    vocab = served.bundle.vocab_size
    if min(tokens) < 0 or max(tokens) >= vocab:
        wrong = next(token for token in tokens if not 0 <= token < vocab)
        raise bad_request(f"The token {wrong} of {where} is not between 0 and {vocab - 1}.", where)


def _in_numbers(vectors: Floats) -> list[msgspec.Raw]:
    return [msgspec.Raw(_encode(Embedding(index, vector.tolist()))) for index, vector in enumerate(vectors)]


def _in_base64(vectors: Floats) -> list[msgspec.Raw]:
    little = vectors.astype("<f4", copy=False)
    texts = (base64.b64encode(vector.tobytes()).decode("ascii") for vector in little)
    return [msgspec.Raw(_encode(Embedding(index, text))) for index, text in enumerate(texts)]
