"""The proof before a bundle is published: its engine's greedy tokens against transformers', and its perplexity."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from export.step import plain_attention
from runtime.engine import Batch, Draw, Engine, Int64

TOKENS = 24
"""Greedy tokens a prompt."""
CHUNK = 16
"""Prompt tokens a step: small, so that every prompt but the shortest is prefilled in several."""
TIE = 1e-4
"""Two logits closer than this share of the row's spread are a tie, which rounding decides."""
TIES = {"fp32": TIE, "fp16": 3e-3, "bf16": 2e-2}
"""The same by precision, for those that are to agree everywhere: a logit is the sum of products rounded to 11 or 8 bits."""
COARSE_TIE = 0.2
"""The same for quantized variants, where only an engine that is wrong altogether is to be seen."""
MAX_CHANGE = {"fp32": 1e-3, "fp16": 1e-2}
"""Share by which a perplexity may differ from the reference's, by precision: rounding changes one in float32 by a hundredth
of it."""
WINDOW = 1024
"""Tokens that perplexity conditions on at the most: the text is read in windows of this length."""

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had never seen a mountain. One morning",
    "1, 2, 3, 4, 5, 6, 7,",
    "Q: What is the difference between a list and a tuple in Python?\nA:",
    'Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with '
    "the License. You may obtain a copy of the License at",
)
"""Continued by both; of varied lengths, so that the batch is ragged."""


@dataclass(frozen=True)
class Agreement:
    """How an engine's tokens compare with the reference's, each judged after the engine's own past."""

    compared: int
    equal: int
    ties: int
    first: str
    """Where the first real difference is, in words; empty without one."""

    def __add__(self, other: "Agreement") -> "Agreement":
        """Both together; the first difference is this one's, if it has any."""
        sums = self.compared + other.compared, self.equal + other.equal, self.ties + other.ties
        return Agreement(*sums, self.first or other.first)

    @property
    def different(self) -> int:
        """Tokens that are neither the reference's nor tied with it."""
        return self.compared - self.equal - self.ties


def continue_prompts(engine: Engine, prompts: list[list[int]], count: int = TOKENS, chunk: int = CHUNK) -> list[list[int]]:
    """`count` greedy tokens after each prompt: prefilled one by one in chunks, then decoded together as a ragged batch."""
    answers = []
    for slot, prompt in enumerate(prompts):
        tokens: Int64 = np.zeros(0, np.int64)
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            end = start + len(part)
            rows = np.array([len(part) - 1] if end == len(prompt) else [], np.int64)
            batch = Batch(slot, np.array([part], np.int64), np.array([end], np.int32), rows, Draw.greedy(len(rows)))
            tokens, _ = engine.step(batch)
        answers.append([int(tokens[0])])
    rows = np.arange(len(prompts), dtype=np.int64)
    for step in range(1, count):
        lengths = np.array([len(prompt) + step for prompt in prompts], np.int32)
        last = np.array([[answer[-1]] for answer in answers], np.int64)
        tokens, _ = engine.step(Batch(0, last, lengths, rows, Draw.greedy(len(prompts))))
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.append(token)
    return answers


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: list[int], boundaries: tuple[int, ...] = ()) -> torch.Tensor:
    """transformers' own logits [len(tokens), vocab] float32, each after the tokens up to it, in plain passes without a cache.

    One pass says all of them, but where the model computes rows longer than one of `boundaries` in another way: then those of
    the shorter rows come from a pass that ends there.
    """
    found: list[torch.Tensor] = []
    with plain_attention(model):
        done = 0
        for end in (*(boundary for boundary in boundaries if boundary < len(tokens)), len(tokens)):
            logits = model(input_ids=torch.tensor([tokens[:end]]), use_cache=False).logits[0]
            found.append(logits[done:].float())
            done = end
    return torch.cat(found)


def compare(
    model: PreTrainedModel,
    prompts: list[list[int]],
    answers: list[list[int]],
    tie: float = TIE,
    boundaries: tuple[int, ...] = (),
    share: Callable[[float], None] = lambda share: None,
    *,
    padding: int | None = None,
) -> Agreement:
    """Judge each token of `answers` by `model`'s own logits after the prompt and the answer before it; see
    `reference_logits`. `share` is told how many of their tokens were judged, from 0 to 1. An answer ends at `padding`.
    """
    found = Agreement(0, 0, 0, "")
    tokens, done = sum(map(len, prompts)), 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        answer = up_to(answer, padding)
        logits = reference_logits(model, prompt + answer[:-1], boundaries)[len(prompt) - 1 :]
        one = judge(logits, torch.tensor(answer), tie)
        where = f"prompt {number} of {len(prompt)} tokens, {one.first}" if one.first else ""
        found += replace(one, first=where)
        done += len(prompt)
        share(done / max(tokens, 1))
    return found


def up_to(answer: list[int], padding: int | None) -> list[int]:
    """`answer` as far as it can be judged: to its first `padding`, behind which the model counts positions otherwise."""
    return answer[: answer.index(padding) + 1] if padding in answer else answer


def judge(logits: torch.Tensor, tokens: torch.Tensor, tie: float) -> Agreement:
    """`tokens` [count] int64 beside the likeliest ones by the reference's `logits` [count, vocab] in the same places."""
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    best, where = logits.max(-1)
    gap = (best - chosen) / (best - logits.min(-1).values).clamp(min=1e-30)
    same = where == tokens
    tied = ~same & (gap < tie)
    wrong = torch.nonzero(~same & ~tied)
    first = (
        f"token {int(wrong[0])}: {int(tokens[wrong[0]])} where transformers has {int(where[wrong[0]])}" if len(wrong) else ""
    )
    return Agreement(len(tokens), int(same.sum()), int(tied.sum()), first)


def engine_perplexity(
    engine: Engine,
    tokens: list[int],
    window: int = WINDOW,
    chunk: int = 128,
    share: Callable[[float], None] = lambda share: None,
) -> float:
    """exp of the mean negative log-probability of `tokens` through the engine, each after those before it in its window.

    `share` is told how many of them were read, from 0 to 1.
    """
    total, count = 0.0, 0
    window = min(window, engine.context)
    for start in range(0, len(tokens), window):
        part = np.array(tokens[start : start + window], np.int64)
        for at in range(0, len(part), chunk):
            ids = part[at : at + chunk]
            targets = part[at + 1 : at + 1 + chunk]
            end = np.array([at + len(ids)], np.int32)
            rows, whole = np.arange(len(targets), dtype=np.int64), np.array([len(part)], np.int32)
            _, logprobs = engine.step(Batch(0, ids[None], end, rows, Draw.force(targets), whole))
            total, count = total - float(logprobs.sum()), count + len(targets)
            share((start + at + len(ids)) / len(tokens))
    return _exp(total / count)


@torch.no_grad()
def reference_perplexity(
    model: PreTrainedModel, tokens: list[int], window: int = WINDOW, share: Callable[[float], None] = lambda share: None
) -> float:
    """The same through `model`."""
    total, count = 0.0, 0
    with plain_attention(model):
        for start in range(0, len(tokens), window):
            part = torch.tensor([tokens[start : start + window]])
            logits = model(input_ids=part, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
            count += part.shape[1] - 1
            share(min(start + window, len(tokens)) / len(tokens))
    return _exp(total / count)


def _exp(power: float) -> float:
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf
