"""Guesses at the next tokens, which one step of the engine then verifies all at once.

A guess is only ever an offer: a step over it draws the model's own token at every place, each with the random number that
the place would have had anyway, and guesses count as far as they are what was drawn. For a greedy request that leaves
the most likely tokens. For a sampled one it is rejection sampling with a proposal that is certain of itself (Leviathan,
Kalman and Matias, "Fast inference from transformers via speculative decoding", ICML 2023): a guess x is taken with the
probability p(x) that the model gives it, and what comes in its place is distributed as p without x.

How much is guessed depends on the request's own tokens and on how many decode beside it, never on the clock.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

MOST_GUESSES = 15
"""With the token before them they fill 16 rows, a multiple of every kernel's tile."""
LEAST_GAIN = 1.1
"""Tokens a unit of time, against a plain step's, from which on guessing pays; covers what the estimates leave out."""

MEMORY = 16
"""Guesses over which a request's share of right ones is averaged."""
DRAFT_PRIOR = 0.7
"""The share of right guesses that a draft engine is credited with at first, and again in time while it does not guess."""
DRAFT_MEMORY = 64
"""Steps over which that credit comes back."""

_LONGEST = 3
"""Tokens of the n-grams that are looked up first; then shorter ones."""
_SHORTEST = 2
_PRIOR = 0.3
"""What that share is taken for at first."""
_PREDICTED = 0.7
"""The same where the client has said what to expect."""
_DOUBT = 2.0
"""Guesses for which that share counts beside those of the run that is being copied."""


class Lookup:
    """Guesses that a request's tokens go on as they once did: what followed the last tokens when they stood there before.

    (Saxena, "Prompt lookup decoding", 2023.) It is right where an answer copies: when a text is edited, quoted, or
    continued in its own pattern. What it would have guessed is compared with every token that comes, also while nothing is
    guessed, so that finding out costs no step.
    """

    def __init__(self, prompt: Tokens[int], prediction: Tokens[int] = ()) -> None:
        """For a request with `prompt`, whose answer is expected to be much like `prediction`."""
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """Where each n-gram was followed last."""
        self._at: int | None = None
        """Where the token stands that is expected next."""
        self._run = 0
        """Expectations that came true since `_at` was found."""
        self._share = _PRIOR
        for token in (*prediction, *prompt):
            self._append(token)
        self._find()
        if prediction:
            self._at, self._share = 0, _PREDICTED

    @property
    def confidence(self) -> float:
        """How likely the next guess is right, 0 where there is none."""
        return 0.0 if self._at is None else (self._run + _DOUBT * self._share) / (self._run + _DOUBT)

    def extend(self, tokens: Tokens[int]) -> None:
        """Take note of the tokens that came."""
        for token in tokens:
            self._append(token)
            if self._at is not None:
                right = token == self._tokens[self._at]
                self._share += (right - self._share) / MEMORY
                if right:
                    self._run, self._at = self._run + 1, self._at + 1
                    continue
            self._find()

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that are expected next, maybe none."""
        if self._at is None:
            return []
        guesses = self._tokens[self._at : self._at + most]
        period = len(self._tokens) - self._at
        while len(guesses) < most:  # what repeats itself will go on repeating itself
            guesses.append(guesses[len(guesses) - period])
        return guesses

    def _append(self, token: int) -> None:
        tokens = self._tokens
        end = len(tokens)
        for size in range(_SHORTEST, _LONGEST + 1):
            if end >= size:
                self._ends[tuple(tokens[end - size :])] = end
        tokens.append(token)

    def _find(self) -> None:
        """Look for the last tokens where they stood before, the longer run of them first."""
        self._run, self._at = 0, None
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            at = self._ends.get(tuple(self._tokens[-size:]))
            if at is not None:
                self._at = at
                return


@dataclass(frozen=True)
class Plan:
    """How many tokens to guess; none where guessing does not pay."""

    count: int = 0
    gain: float = 1.0
    """Tokens a unit of time that are expected of it, against a plain step's."""
    drafted: bool = False
    """By the draft engine rather than from the sequence's own tokens."""


def worthwhile(
    confidence: float, cost: float, most: int, *, fixed: float = 0.0, plain: float = 1.0, drafted: bool = False
) -> Plan:
    """How many guesses, at most `most`, make the most tokens a unit of time.

    The unit is a step for one token. Guesses make a step longer by `fixed` and each by `cost`; `plain` is what a token costs
    without guesses, less than 1 where several sequences share a step. A step with k guesses gives one token and, each guess
    being right with probability `confidence` where those before it were, confidence + confidence**2 + ... more.
    """
    count, best = 0, plain
    expected = right = 1.0
    for guesses in range(1, min(most, MOST_GUESSES) + 1):
        right *= confidence
        expected += right
        gain = plain * expected / (1 + fixed + guesses * cost)
        if gain <= best and guesses > 1:
            break
        count, best = guesses, gain
    return Plan(count, best, drafted) if best > LEAST_GAIN else NONE


NONE = Plan()
