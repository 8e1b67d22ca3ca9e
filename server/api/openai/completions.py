"""OpenAI's completions: `POST /v1/completions`."""

import itertools
from collections.abc import Sequence
from functools import cached_property

from aiohttp import web

from runtime.text import Text
from server.api.bodies import read
from server.api.openai.answers import Completion, CompletionChoice, CompletionLogprobs, told
from server.api.openai.bodies import MAX_CHOICES, CompletionBody
from server.api.openai.events import DONE, Events, Frame, head
from server.api.streaming import send
from server.api.writing import event, json
from server.choices import Choices, Whole
from server.errors import bad_request
from server.generation import FinishReason, Piece
from server.served import Served
from server.service import SERVICE


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue prompts, whole or as server-sent events."""
    service = request.app[SERVICE]
    body = await read(request, CompletionBody)
    asked = body.asked()
    async with service.lease(request, body.model) as (served, limits):
        prompts = await _prompts(served, body)
        async with served.answers(request, [prompt.tokens for prompt in prompts], asked, of="prompt", limits=limits) as choices:
            texts = [_Written(served.text, body, prompt) for prompt in prompts for _ in range(asked.count)]
            if body.stream:
                return await send(request, choices, CompletionStream(served, body, choices, texts))
            answers = [
                CompletionChoice(*text.write(whole), index=index)
                for index, (text, whole) in enumerate(zip(texts, await choices.whole(), strict=True))
            ]
            return json(Completion(**head(served, choices, "cmpl"), choices=answers, usage=choices.usage))


class _Prompt:
    """One prompt of a request."""

    def __init__(self, text: str, tokens: list[int]) -> None:
        self.text, self.tokens = text, tokens


class _Written:
    """One answer's text as it is given: behind its prompt if that is to be given back; and its tokens if they are wanted."""

    def __init__(self, text: Text, body: CompletionBody, prompt: _Prompt) -> None:
        self._text = text
        self._prompt: _Prompt | None = prompt if body.echo else None
        self._alternatives = body.logprobs
        self._offset = 0

    def write(self, piece: Piece | Whole) -> tuple[str, FinishReason | None, CompletionLogprobs | None]:
        """Text, finish reason and log-probabilities of the answer's next piece."""
        text, tokens = piece.text, piece.tokens
        logprobs: list[float | None] = [*piece.logprobs]
        tops = piece.tops or [[]] * len(piece.tokens)
        prompt, self._prompt = self._prompt, None
        if prompt is not None:
            text, tokens = prompt.text + text, prompt.tokens + tokens
            logprobs = [None, *(scored.logprob for scored in piece.scored), *logprobs]
            tops = [[], *(scored.tops for scored in piece.scored), *tops]
        if self._alternatives is None:
            return text, piece.finish, None
        offset, self._offset = self._offset, self._offset + len(text)
        return text, piece.finish, self._logprobs(tokens, logprobs, tops, offset)

    def _logprobs(
        self, tokens: list[int], logprobs: list[float | None], tops: list[list[tuple[int, float]]], offset: int
    ) -> CompletionLogprobs:
        texts = [self._text.token_text(token) for token in tokens]
        starts = list(itertools.accumulate(map(len, texts[:-1]), initial=offset)) if tokens else []
        scores = [None if logprob is None else told(logprob) for logprob in logprobs]
        if not self._alternatives:
            return CompletionLogprobs(texts, scores, None, starts)
        named = [
            None
            if score is None
            else {**{self._text.token_text(id): told(logprob) for id, logprob in reversed(top)}, text: score}
            for text, score, top in zip(texts, scores, tops, strict=True)
        ]
        return CompletionLogprobs(texts, scores, named, starts)


class CompletionStream(Events):
    """Completions in chunks."""

    def __init__(self, served: Served, body: CompletionBody, choices: Choices, texts: list[_Written]) -> None:
        super().__init__(served, body, choices, "cmpl")
        self._texts = texts
        self._simple = body.logprobs is None and not body.echo and not self.continuous_usage

    @cached_property
    def _plain(self) -> list[Frame]:
        """Events with nothing but text, of each answer."""
        return [
            Frame(lambda text, index=index: self._chunk(CompletionChoice(text, index=index)))  # type: ignore[misc]
            for index in range(len(self._texts))
        ]

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """The text, and its tokens if they are wanted; at an answer's end its finish reason."""
        if self._simple and piece.finish is None:
            return self._plain[piece.index].around(piece.text)
        text, finish, logprobs = self._texts[piece.index].write(piece)
        words = b""
        if text or (logprobs is not None and logprobs.tokens):
            words = self._chunk(CompletionChoice(text, logprobs=logprobs, index=piece.index), so_far=True)
        if finish is not None:
            words += self._chunk(CompletionChoice("", finish_reason=piece.finish, index=piece.index))
        return words

    def end(self, choices: Choices) -> bytes:
        """The usage if it is wanted, and `[DONE]`."""
        if self.include_usage:
            return event(Completion(**self.head, choices=[], usage=choices.usage)) + DONE
        return DONE

    def _chunk(self, choice: CompletionChoice, so_far: bool = False) -> bytes:
        return event(Completion(**self.head, choices=[choice], usage=self.usage(so_far)))


async def _prompts(served: Served, body: CompletionBody) -> list[_Prompt]:
    """The prompts of a body: a text, tokens, or a list of either. Raises ApiError."""
    given: Sequence[str | int | list[int]] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if any(isinstance(each, int) for each in given):
        if not all(isinstance(each, int) for each in given):
            raise bad_request("The value of 'prompt' mixes tokens with texts or lists; send one kind.", "prompt")
        given = [[each for each in given if isinstance(each, int)]]
    if len(given) * (body.n or 1) > MAX_CHOICES:
        raise bad_request(
            f"The request has {len(given)} prompts and asks for {body.n or 1} answers to each, together more than "
            f"{MAX_CHOICES}; send several requests.",
            "prompt" if len(given) > 1 else "n",
        )
    texts = [each for each in given if isinstance(each, str)]
    tokenized = iter(await served.tokenize_all(texts, of="prompt") if texts else ())
    prompts = []
    for each in given:
        if isinstance(each, str):
            prompts.append(_Prompt(each, next(tokenized)))
        elif isinstance(each, list):
            served.check_tokens(each)
            echoed = body.echo and len(each) < served.context  # a longer one is refused in a moment
            prompts.append(_Prompt(served.text.stream().push(each) if echoed else "", each))
    return prompts
