"""An engine's greedy answers through the decode loop that serves them, so that what is proved is what runs."""

import math
from collections.abc import Callable
from typing import Any

from runtime.engine import Batch, DeviceLost, Draw, Engine, EngineError, Float32, Int64
from runtime.loop import Loop
from runtime.messages import Generate

_OWNER = b"verify"


class _Strict:
    """An engine whose first failure ends everything; the loop would otherwise end one answer, log why, and go on."""

    def __init__(self, engine: Engine, chunk: int) -> None:
        self._engine, self.chunk = engine, chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        try:
            return self._engine.step(batch, ahead)
        except EngineError as error:
            raise DeviceLost(str(error)) from error


def answer(
    engine: Engine,
    prompts: list[list[int]],
    count: int,
    chunk: int,
    share: Callable[[float], None] = lambda share: None,
) -> list[list[int]]:
    """`count` greedy tokens after each of `prompts`, which arrive together and share the slots, prefilled `chunk` a step.

    `share` is told how many of the steps are done, from 0 to 1. Raises EngineError.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    tokens = sum(map(len, prompts)) + count * len(prompts)
    loop = Loop(_Strict(engine, chunk), queue=len(prompts), queue_tokens=tokens, speculation=False)
    for number, prompt in enumerate(prompts):
        refused = loop.submit(_OWNER, Generate(str(number), prompt, count, speculation=False))
        if refused is not None:
            raise EngineError(f"the decode loop does not take a prompt of {len(prompt)} tokens: {refused.message}")
    steps = sum(math.ceil(len(prompt) / chunk) for prompt in prompts) + count
    done = 0
    while loop.busy:
        for news in loop.step():
            answers[int(news.row.id)] += news.row.tokens
        done += 1
        share(min(done / steps, 1.0))
    return answers
