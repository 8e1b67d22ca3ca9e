"""What a request changes of its tokens' logits: biases, penalties on what was said, and stop tokens that come too early.

Penalties are vLLM's: repetition's is on the tokens of prompt and answer, the two others are on the answer's.
"""

from collections import Counter
from collections.abc import Sequence as Tokens
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.engine import Adjustments, Float32, Int64
from runtime.messages import Generate

Changes = tuple[Int64, Float32, Float32, Float32]
"""Of one row, as `Adjustments` has them: ids, bias, scale and penalty, each [k]."""

BAN = 1e9
"""What is taken off the logit of a stop token that must not come yet. It is finite: where a mask leaves nothing but stop
tokens, one of them comes."""
_ROOM = 64
"""Entries that there is room for at first."""


class Penalties:
    """The changes that one sequence makes, kept up to date token by token.

    Taking a token costs the same however long the answer is; what is said of a step's rows is copied out of arrays.
    """

    def __init__(self, request: Generate, vocab_size: int) -> None:
        sampling = request.sampling
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        self._repetition, self._min_tokens = sampling.repetition_penalty, request.min_tokens
        self._biased = bool(sampling.logit_bias)
        self._counts: Counter[int] = Counter()
        """How often the answer has each token."""
        self._said = 0
        """Tokens of the answer."""
        self._places: dict[int, int] = {}
        """Where each token stands in the arrays."""
        self._ids, self._bias = np.zeros(_ROOM, np.int64), np.zeros(_ROOM, np.float32)
        self._scale, self._penalty = np.ones(_ROOM, np.float32), np.zeros(_ROOM, np.float32)
        for token, bias in sampling.logit_bias.items():
            place = self._place(token)  # which may put longer arrays into these arrays' places
            self._bias[place] = bias
        if self._repetition != 1:
            for token in set(request.prompt):
                place = self._place(token)
                self._scale[place] = self._repetition
        early = set(request.stop_ids) if self._min_tokens > 0 else set()
        self._stops = np.array([self._place(token) for token in sorted(early) if 0 <= token < vocab_size], np.int64)
        """Places of the stop tokens that must not come too early."""

    @staticmethod
    def wanted(request: Generate) -> bool:
        """`request` changes any logits."""
        return bool(request.sampling.logit_bias) or penalized(request) or (request.min_tokens > 0 and bool(request.stop_ids))

    @property
    def over(self) -> bool:
        """Nothing is changed from now on."""
        return self._said >= self._min_tokens and not self._biased and not self._penalizes

    def take(self, token: int) -> None:
        """`token` is the answer's next."""
        self._said += 1
        if not self._penalizes:
            return
        self._counts[token] += 1
        place = self._place(token)
        self._scale[place], self._penalty[place] = self._repetition, self._of(self._counts[token])

    def after(self, guesses: Tokens[int]) -> Changes:
        """What changes for the token that follows the answer so far and `guesses`: ids, bias, scale and penalty, each [k]."""
        count = len(self._places)
        new = Counter(guesses) if self._penalizes else Counter()
        places = {token: self._places.get(token, -1) for token in new}
        unseen = [token for token, place in places.items() if place < 0]
        ids = np.concatenate([self._ids[:count], np.array(unseen, np.int64)])
        bias = np.concatenate([self._bias[:count], np.zeros(len(unseen), np.float32)])
        scale = np.concatenate([self._scale[:count], np.ones(len(unseen), np.float32)])
        penalty = np.concatenate([self._penalty[:count], np.zeros(len(unseen), np.float32)])
        places |= {token: count + i for i, token in enumerate(unseen)}
        for token, times in new.items():
            scale[places[token]], penalty[places[token]] = self._repetition, self._of(self._counts[token] + times)
        if self._said + len(guesses) < self._min_tokens:
            penalty[self._stops] += np.float32(BAN)
        return ids, bias, scale, penalty

    @property
    def _penalizes(self) -> bool:
        return bool(self._frequency or self._presence or self._repetition != 1)

    def _of(self, times: int) -> float:
        """What is taken off the logit of a token that the answer has `times` times, once or more."""
        return self._presence + times * self._frequency

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.resize(self._ids, 2 * place)
            self._bias, self._scale, self._penalty = (
                np.concatenate([array, np.full(place, nothing, np.float32)])
                for array, nothing in ((self._bias, 0), (self._scale, 1), (self._penalty, 0))
            )
        self._ids[place] = token
        return place


def penalized(request: Generate) -> bool:
    """What is said changes what may follow, so that a token's draw is known only once those before it are."""
    sampling = request.sampling
    return bool(sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1)


def together(rows: list[Changes | None]) -> Adjustments:
    """The changes of a step's rows, None for a row without, padded as `Adjustments` wants it."""
    most = max(1 if row is None else len(row[0]) for row in rows)
    shape = len(rows), most
    made = Adjustments(
        np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.ones(shape, np.float32), np.zeros(shape, np.float32)
    )
    arrays: list[npt.NDArray[Any]] = [made.ids, made.bias, made.scale, made.penalty]
    for number, row in enumerate(rows):
        if row is None or not len(row[0]):
            continue
        columns: list[npt.NDArray[Any]] = list(row)
        for array, values in zip(arrays, columns, strict=True):
            array[number, : len(values)] = values
            array[number, len(values) :] = values[0]
    return made
