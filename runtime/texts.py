"""One request for embeddings on its way through the engine, and which of its texts are computed together.

A row of a batch is as long as the batch's longest text. So texts are taken in the order of their lengths, the longest first,
and a batch ends where a shorter text would be more padding than it is worth.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from runtime.engine import Float32, Int64
from runtime.messages import Embed

_PADDING = 32
"""Tokens of padding in a row that cost less than a batch of its own: a batch reads every weight once."""
_PADDING_SHARE = 0.25
"""Of the longest text, likewise."""


@dataclass(eq=False)
class Texts:
    """A request: its texts, and the embeddings that there are so far."""

    owner: bytes
    """The front end that asked; with `request.id` it names the request."""
    request: Embed
    arrived: float
    """Seconds by the loop's clock."""
    turn: int
    """When it led a batch last, or arrived: the smallest leads the next one."""
    started: float | None = None
    """When its first text was computed."""
    vectors: Float32 | None = None
    """[inputs, dimensions], from then on."""
    left: list[int] = field(default_factory=list)
    """Indices of the inputs that are not computed yet, the longest last."""
    tokens: int = 0
    """Of these."""

    def __post_init__(self) -> None:
        lengths = [len(text) for text in self.request.inputs]
        self.left = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.tokens = sum(lengths)

    @property
    def key(self) -> tuple[bytes, str]:
        """What names the request in this worker."""
        return self.owner, self.request.id

    @property
    def deadline(self) -> float:
        """When its time is up, by the loop's clock: of waiting until it starts, then of everything; inf where unlimited."""
        end = self.arrived + (self.request.total_seconds or math.inf)
        return end if self.started is not None else min(end, self.arrived + (self.request.queue_seconds or math.inf))

    def timeout(self, now: float) -> str:
        """Which limit it has reached at `now`, in a sentence for whoever asked."""
        request, taken = self.request, now - self.arrived
        if self.started is None and now >= self.arrived + (request.queue_seconds or math.inf):
            return f"the request waited {taken:.2f} s; its limit for waiting is {request.queue_seconds:g} s (queue_seconds)"
        done = len(request.inputs) - len(self.left)
        return (
            f"the request took {taken:.2f} s, in which {done} of {len(request.inputs)} texts were computed; its limit for "
            f"everything is {request.total_seconds:g} s (total_seconds)"
        )

    def longest(self, most: int | None = None) -> int:
        """Tokens of the longest text that is left and has at most `most`; 0 where there is none."""
        count = len(self.left) if most is None else self._up_to(most)
        return len(self.request.inputs[self.left[count - 1]]) if count else 0

    def take(self, longest: int, rows: int) -> list[int]:
        """Up to `rows` of the texts that are left, for a batch of rows of `longest` tokens: the longest that fit, and none for
        which the padding would not pay."""
        least = longest - padding(longest)
        at = end = self._up_to(longest)
        while at > 0 and end - at < rows and len(self.request.inputs[self.left[at - 1]]) >= least:
            at -= 1
        taken = self.left[at:end]
        del self.left[at:end]
        self.tokens -= sum(len(self.request.inputs[index]) for index in taken)
        return taken

    def _up_to(self, most: int) -> int:
        """How many of the texts that are left have at most `most` tokens."""
        return bisect_right(self.left, most, key=lambda index: len(self.request.inputs[index]))


def padding(longest: int) -> int:
    """Tokens by which a text may be shorter than its batch's longest."""
    return max(_PADDING, int(longest * _PADDING_SHARE))


@dataclass(frozen=True)
class Batch:
    """Texts that are computed together."""

    parts: list[tuple[Texts, list[int]]]
    """Of each request, the indices of its inputs; the request that leads comes first."""

    @property
    def tokens(self) -> int:
        """Of the texts, without padding."""
        return sum(len(texts.request.inputs[index]) for texts, indices in self.parts for index in indices)

    def arrays(self) -> tuple[Int64, Int64]:
        """input_ids [batch, seq], padded with token 0, and lengths [batch]."""
        rows = [texts.request.inputs[index] for texts, indices in self.parts for index in indices]
        lengths = np.array([len(row) for row in rows], np.int64)
        ids = np.zeros((len(rows), int(lengths.max())), np.int64)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = row
        return ids, lengths
