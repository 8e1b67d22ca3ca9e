"""What is asked of a server, and when. Nothing here touches a clock or a socket: the same seed asks the same."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

MOST_REQUESTS = 100_000
"""Of one repeat: what is kept of so many fits in memory."""

MOST_TOKENS = 1 << 20
"""Of one prompt or answer."""

_FIRST_TOKEN, _TOKENS = 100, 1000
"""Prompts are made of the ids [100, 1100): the vocabularies of language models have them, and no special tokens there."""

_TAIL = 3.0
"""Standard deviations, in the logarithm, at which a log-normal length is cut unless its greatest is given."""

_NOUNS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city community name president team minute idea body information back parent face others"
)
_WORDS = _NOUNS.split()
"""Frequent nouns, which most tokenizers hold as one token each."""


class LoadError(ValueError):
    """A load that cannot be asked; the message says what to change."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of numbers of tokens, all in [least, most].

    With a `sigma` above 0 it is log-normal around `middle`, drawn again where a draw falls outside; otherwise every
    number from least to most is as likely as another.
    """

    least: int
    most: int
    middle: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """From `128`, `uniform:32-512`, `lognormal:128,0.6` (median, sigma) or `lognormal:128,0.6,512` (and the greatest).

        Raises LoadError.
        """
        kind, _, rest = text.rpartition(":")
        try:
            if kind == "":
                found = cls(int(rest), int(rest))
            elif kind == "uniform":
                least, most = rest.split("-")
                found = cls(int(least), int(most))
            elif kind == "lognormal":
                middle, sigma, *greatest = rest.split(",")
                found = _log_normal(int(middle), float(sigma), *map(int, greatest))
            else:
                raise ValueError(kind)
        except (ValueError, TypeError, OverflowError):
            raise LoadError(
                f"{text!r} is no length; give one as 128, uniform:32-512 or lognormal:128,0.6 (median, sigma up to 3)"
            ) from None
        if not 1 <= found.least <= found.most <= MOST_TOKENS or (found.sigma and not found.middle <= found.most):
            raise LoadError(f"{text!r} is out of order: lengths rise from at least 1 to at most {MOST_TOKENS}")
        return found

    def draw(self, chance: random.Random) -> int:
        """One length."""
        if not self.sigma:
            return chance.randint(self.least, self.most)
        while True:
            length = round(chance.lognormvariate(math.log(self.middle), self.sigma))
            if self.least <= length <= self.most:
                return length

    def __str__(self) -> str:
        if self.sigma:
            return f"log-normal around {self.middle:g}, at most {self.most}"
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


def _log_normal(middle: int, sigma: float, most: int | None = None) -> Lengths:
    if not 0 < sigma <= 3:
        raise ValueError("sigma")
    return Lengths(1, math.ceil(middle * math.exp(_TAIL * sigma)) if most is None else most, middle, sigma)


@dataclass(frozen=True)
class Request:
    """One completion to ask for."""

    prompt: list[int]
    """Token ids."""
    tokens: int
    """Tokens of the answer."""
    due: float | None = None
    """Seconds after the load's begin at which it arrives; None: when the stream's last one is answered."""

    @property
    def text(self) -> str:
        """The prompt as words, about one a token: equal tokens give equal words, so shared prefixes stay shared."""
        return " ".join(_WORDS[token % len(_WORDS)] for token in self.prompt)


@dataclass(frozen=True)
class Shape:
    """What requests look like."""

    prompt_tokens: Lengths
    tokens: Lengths
    shared_prefix: int = 0
    """Tokens that every prompt begins with, before its own `prompt_tokens`."""

    def __str__(self) -> str:
        shared = f" after {self.shared_prefix} that all share" if self.shared_prefix else ""
        return f"prompts of {self.prompt_tokens} tokens{shared}, answers of {self.tokens}"

    def requests(self, seed: int, part: str) -> Iterator[Request]:
        """Without end; another `part` of a run has other prompts behind the same prefix.

        Prompts are random tokens, so that nothing but the prefix can have been computed before.
        """
        prefix = _tokens(random.Random(f"{seed}, prefix"), self.shared_prefix)
        chance = random.Random(f"{seed}, {part}")
        while True:
            prompt = prefix + _tokens(chance, self.prompt_tokens.draw(chance))
            yield Request(prompt, self.tokens.draw(chance))


@dataclass(frozen=True)
class Load:
    """A closed loop of `streams`, each of which asks `count` times, or an open loop of `count` requests at a `rate`."""

    shape: Shape
    count: int
    streams: int = 0
    rate: float | None = None
    """Requests a second; None: a closed loop."""

    def __post_init__(self) -> None:
        """Refuse what would not end."""
        total = self.count * (self.streams if self.rate is None else 1)
        if not 1 <= total <= MOST_REQUESTS:
            raise LoadError(f"{self} would be {total} requests; ask for 1 to {MOST_REQUESTS} a repeat")

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g}/s"
        return f"{self.streams} stream{'s' if self.streams > 1 else ''}"

    def plan(self, seed: int, repeat: int) -> list[list[Request]]:
        """Sequences that run side by side, each request after the one before it in its sequence has been answered."""
        drawn = self.shape.requests(seed, f"{self}, repeat {repeat}")
        if self.rate is None:
            return [list(islice(drawn, self.count)) for _ in range(self.streams)]
        due = arrivals(self.rate, self.count, random.Random(f"{seed}, {self}, arrivals {repeat}"))
        return [[Request(request.prompt, request.tokens, at)] for at, request in zip(due, drawn, strict=False)]

    def warm_up(self) -> list[list[Request]]:
        """One short answer a stream, in no way like what is measured."""
        prompts = Shape(Lengths(16, 16), Lengths(4, 4)).requests(0, "warm-up")
        return [[next(prompts)] for _ in range(max(1, self.streams))]


def arrivals(rate: float, count: int, chance: random.Random) -> list[float]:
    """Seconds at which `count` requests arrive, in order, within `count / rate` seconds.

    A Poisson process of which the number of events is known has its events at independent uniform times. Knowing the number
    gives every repeat the same load and bounds it in count and in time.
    """
    return sorted(chance.uniform(0, count / rate) for _ in range(count))


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [_FIRST_TOKEN + chance.randrange(_TOKENS) for _ in range(count)]
