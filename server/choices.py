"""The answers to one request, of which there may be several: one stream of pieces, each with its answer's index."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from runtime.messages import Ready, Scored
from server.generation import FinishReason, Generation, Piece, PromptDetails, Usage
from server.tools import Arguments, CallStarted

_AHEAD = 64
"""Pieces that may wait to be sent; behind them the answers' own readers wait, and fall behind like any slow client."""

Start = Callable[[], AbstractContextManager[Generation]]
"""Sends an answer's request to the engine; leaving the context ends it."""


@dataclass
class Call:
    """A whole call of a tool."""

    name: str
    arguments: str
    """JSON."""


@dataclass
class Whole:
    """A whole answer."""

    text: str = ""
    finish: FinishReason | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take the answer's next piece."""
        self.text += piece.text
        self.finish = piece.finish
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.tops += piece.tops
        self.scored += piece.scored
        for part in piece.parts:
            match part:
                case CallStarted(_, name):
                    self.calls.append(Call(name, ""))
                case Arguments(index, text):
                    self.calls[index].arguments += text


class Choices:
    """An async iterator of the pieces of all answers; inside its context the answers are made, behind it they have ended."""

    def __init__(self, prompts: Sequence[Sequence[Start]], width: int) -> None:
        """`prompts` starts each prompt's answers; `width` of them run at the same time, more would only fill the queue."""
        self._starts = [start for starts in prompts for start in starts]
        self.count = len(self._starts)
        """How many answers there are."""
        self._firsts = [sum(map(len, prompts[:index])) for index in range(len(prompts))]
        self._generations: dict[int, Generation] = {}
        self._running = asyncio.Semaphore(width)
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue(_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = 0
        self._stack = ExitStack()

    @property
    def engines(self) -> list[Ready]:
        """What the engines that give the answers said of themselves, for each answer that has begun."""
        return [generation.engine for generation in self._generations.values() if generation.engine is not None]

    @property
    def usage(self) -> Usage:
        """The tokens so far: each prompt's once, those of all answers."""
        each = {index: generation.usage for index, generation in self._generations.items()}
        if len(each) == 1 and 0 in each:
            return each[0]
        prompts = [each[index] for index in self._firsts if index in each]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        cached = sum(usage.prompt_tokens_details.cached_tokens for usage in prompts)
        completion = sum(usage.completion_tokens for usage in each.values())
        return Usage(prompt, completion, prompt + completion, PromptDetails(cached))

    async def __aenter__(self) -> Self:
        """Start; raises ApiError where a lone answer cannot be."""
        if len(self._starts) == 1:
            self._generations[0] = self._stack.enter_context(self._starts[0]())
        else:
            self._tasks = [asyncio.create_task(self._run(index)) for index in range(len(self._starts))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._starts.clear()  # They hold the request, which holds this: garbage that would wait for the collector.

    def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces, once; those of one answer in their order."""
        return self if self._tasks else self._generations[0]  # which spares a lone answer a coroutine a piece

    async def __anext__(self) -> Piece:
        """The next piece of any answer; raises ApiError where one of them ends without a finish reason."""
        if not self._tasks:
            return await anext(self._generations[0])
        if self._ended == len(self._tasks):
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        self._ended += piece.finish is not None
        return piece

    async def whole(self) -> list[Whole]:
        """The answers, in the order of their indices."""
        answers = [Whole() for _ in range(self.count)]
        async for piece in self:
            answers[piece.index].add(piece)
        return answers

    async def _run(self, index: int) -> None:
        async with self._running:
            try:
                with self._starts[index]() as generation:
                    self._generations[index] = generation
                    async for piece in generation:
                        await self._pieces.put(msgspec.structs.replace(piece, index=index))
            except Exception as error:  # raised again where the pieces are read
                await self._pieces.put(error)
