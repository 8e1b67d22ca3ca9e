"""The engine: one compiled model on one device, with its KV slots. Its only verb is a step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

MOST_ALTERNATIVES = 20
"""What `Draw.alternatives` may be at most; `runtime.messages` has it, too, which a bare GPU machine cannot import."""


MOST_NAMED = 1024
"""Tokens of a row that `Draw.adjustments` may change beside those that stand in the row's slot."""


class EngineError(Exception):
    """The engine cannot be loaded or run; the message says what to do."""


class DeviceLost(EngineError):
    """The device failed in a way that this process cannot recover from: whatever it is asked next fails, too."""


@dataclass(frozen=True)
class Adjustments:
    """Changes to the logits of some tokens, before one is chosen; every array is [rows, k].

    With x = logit + bias, a token's logit becomes (x / scale where x is positive, x * scale elsewhere) - penalty. A row that
    changes fewer tokens than others repeats one of its entries as it stands, or has (any token, 0, 1, 0) where it has none.
    """

    ids: Int64
    bias: Float32
    scale: Float32
    penalty: Float32


@dataclass(frozen=True)
class Draw:
    """How the next token is chosen at each of a step's logit rows; every array is [rows] where nothing else is said.

    What `mask` and `adjustments` leave is sampled from; the log-probabilities that a step gives are the model's own.
    """

    temperature: Float32
    top_k: Int64
    top_p: Float32
    min_p: Float32
    uniform: Float32
    """In [0, 1): where in the remaining distribution the token lies. See runtime/sampling.py."""
    forced: Int64
    """The token to take whatever its probability, for its log-probability's sake; negative to choose freely."""
    mask: Int32 | Callable[[], Int32] | None = None
    """Which tokens may be chosen, [rows, ceil(vocab / 32)]: token t where bit t % 32 of word t // 32 is set; None allows all.
    Each row allows one token at least. What takes time to find may be given as a function, which must not fail: an
    engine on a GPU calls it once the model's work is under way, one on a CPU, whose cores all compute, before."""
    adjustments: Adjustments | None = None
    alternatives: int = 0
    """How many of the most likely tokens `Engine.alternatives` shall tell of each row."""

    @property
    def adorned(self) -> bool:
        """Something is wanted beyond what most steps do: a mask, adjustments, or alternatives."""
        return self.mask is not None or self.adjustments is not None or self.alternatives > 0

    @staticmethod
    @lru_cache(maxsize=256)
    def greedy(rows: int) -> "Draw":
        """The most likely token at each of `rows` rows; its arrays are shared, so not to be written to."""
        return Draw.force(np.full(rows, -1, np.int64))

    @classmethod
    def force(cls, tokens: Int64) -> "Draw":
        """The given tokens [rows], which makes a step score them; the most likely one where it is negative."""
        zeros = np.zeros(len(tokens), np.float32)
        return cls(zeros, np.zeros(len(tokens), np.int64), np.ones(len(tokens), np.float32), zeros, zeros, tokens)


@dataclass(frozen=True)
class Batch:
    """New tokens for neighbouring slots, all of them at once."""

    first_slot: int
    input_ids: Int64
    """[batch, seq]; batch is 1 where seq is more than 1 (one prompt's chunk)."""
    kv_lengths: Int32
    """[batch]: tokens in each slot once these are written, so row b's tokens stand at kv_lengths[b]-seq ... ."""
    logit_rows: Int64
    """[rows]: indices into the flattened [batch * seq] whose next token is wanted; none in a chunk that is not the last."""
    draw: Draw
    rope_lengths: Int32 | None = None
    """[batch]: tokens that each row is to have when it is complete, which its position factors are chosen for; None where
    that is `kv_lengths`. Only the side of `Engine.length_boundaries` matters on which it lies."""


class Engine(Protocol):
    """What runs a `Batch`. Not thread-safe: one loop owns it."""

    slots: int
    context: int
    """Tokens a slot holds."""
    vocab_size: int
    many_cost: float
    """By how much a short step with several rows is longer than one with one row, beside `row_cost` a row."""
    row_cost: float
    """By how much each further row makes it longer; both as shares of a step with one row."""
    step_cost: float
    """How long a step with one row takes, in a unit that is the same for all engines of a machine."""
    chunk: int
    """Prompt tokens that a step should take, at most."""
    rows: int
    """Logit rows that a step should have, at most."""
    runs_ahead: bool
    """The engine makes use of `ahead`."""
    length_boundaries: tuple[int, ...]
    """Row lengths past which the model computes every position in another way, ascending: the keys and values of a row that
    grows past one are to be computed anew. Empty for most models."""

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        """Write the new tokens' keys and values, choose tokens: (token ids [rows], log-probabilities [rows]).

        `ahead` says that the same rows will most likely be decoded once more, with these draws: an engine that runs ahead
        begins with that step before it hands this one's tokens out. Where another is asked for instead, its outcome is dropped.
        """
        ...

    def alternatives(self) -> tuple[Int64, Float32]:
        """Of the step whose tokens were given last, for each row the `Draw.alternatives` most likely tokens by the model's own
        distribution, likeliest first, and their log-probabilities: both [rows, alternatives].
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens' keys and values from one slot to another."""
        ...

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """Swap the keys and values of two slots, each given as (slot, tokens that stand in it)."""
        ...

    def close(self) -> None:
        """Give the device memory back."""
        ...
