"""Which sequence holds which KV slot, and which prompts' rows still stand in them.

Of a model that computes long rows in another way than short ones, a prompt of one kind cannot use the rows of the other.

A decode step runs over neighbouring slots, so the decoding sequences hold the first ones without a gap: a slot that falls
free is filled by the last of them. What stood in it goes to that one's old place, so that a later prompt that begins alike
finds its rows.

Only rows that prefill wrote are reused. Computed by the same operators, they are the very bits that the new request would
have computed itself, in whatever chunks of two and more: reuse never changes a token. A lone row takes other kernels, so the
rows of decode steps and of prompts of one token are not reused.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from runtime.engine import Int64
from runtime.radix import Radix
from runtime.sequence import Sequence

BLOCK = 16
"""Prompts share rows in whole blocks of so many tokens: whoever would find out another's prompt by the time that his own takes
must guess as many of its tokens at once."""
_NOTHING: Int64 = np.zeros(0, np.int64)


class Memory(Protocol):
    """What holds the slots' keys and values."""

    def copy(self, source: int, target: int, length: int) -> None:
        """See `runtime.engine.Engine.copy`."""
        ...

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """See `runtime.engine.Engine.exchange`."""
        ...


class Slots:
    """The `count` slots of `memories`, which all hold the same sequences; `boundaries` are those of
    `Engine.length_boundaries`.
    """

    def __init__(self, count: int, memories: Iterable[Memory], boundaries: tuple[int, ...] = ()) -> None:
        self._count = count
        self._boundaries = boundaries
        self.memories = list(memories)
        self._prompts = [_NOTHING] * count
        """The tokens of the prompt whose prefilled rows stand in each slot, from position 0."""
        self._kinds = [0] * count
        """As what kind of row, by `kind`, these were computed."""
        self._index = [Radix() for _ in range(len(boundaries) + 1)]
        """Over `_prompts`, by kind."""
        self._used = [0] * count
        """Grows with every use; the free slot with the least is overwritten first."""
        self._clock = itertools.count(1)
        self.decoding: list[Sequence] = []
        """Sequence i of this list holds slot i."""
        self.prefilling: Sequence | None = None

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self._count - len(self.decoding) - (self.prefilling is not None)

    def kind(self, length: int) -> int:
        """How many of the boundaries a row of `length` tokens has passed."""
        return bisect_left(self._boundaries, length)

    def room(self, sequence: Sequence) -> float:
        """Tokens that `sequence` may have before its rows must be computed anew; inf where that is never."""
        if not self._boundaries:
            return math.inf
        kind = self.kind(sequence.prefix_length)
        return self._boundaries[kind] if kind < len(self._boundaries) else math.inf

    @property
    def held(self) -> Iterable[Sequence]:
        """Every sequence that holds a slot."""
        return [*self.decoding, *([self.prefilling] if self.prefilling else [])]

    def start(self, sequence: Sequence) -> None:
        """Give `sequence` a slot to be prefilled in, with the rows of its prompt that stand in any slot already.

        There must be a free slot and no other prefill under way. Sets the sequence's `computed` and `cached`.
        """
        if not self.free or self.prefilling is not None:
            raise RuntimeError("no slot for a prefill")
        target = len(self.decoding)
        kind = self.kind(sequence.prefix_length)
        common, sources = self._index[kind].longest(sequence.reusable)
        length = common - common % BLOCK
        source = target if target in sources else max(sources, key=self._used.__getitem__, default=target)
        whole = source > target and length == len(self._prompts[source])
        if whole or source == self._oldest():  # what stands there is used up, or would be overwritten next
            self._swap(source, target)
        else:
            if length < len(self._prompts[target]):
                self._save(target)
            if source != target:
                self._copy(source, target, length)
                self._touch(source)
        self._hold(target, sequence.prefix[:length], kind)
        self._touch(target)
        if sequence.slot < 0:  # else its own rows are among them
            sequence.cached = length
        sequence.slot, sequence.computed = target, length
        self.prefilling = sequence

    def prefilled(self, sequence: Sequence) -> None:
        """Note that the rows of the sequence's prefix up to `computed` stand in its slot."""
        if sequence.prefix_length > 1:
            self._hold(sequence.slot, sequence.prefix[: sequence.computed], self.kind(sequence.prefix_length))

    def promote(self) -> Sequence:
        """The prefilled sequence decodes from now on; it is returned."""
        sequence = self.prefilling
        if sequence is None:
            raise RuntimeError("no prefill is under way")
        self.prefilling = None
        self._move(sequence, len(self.decoding))
        self.decoding.append(sequence)
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Take the slot back from `sequence`."""
        self._touch(sequence.slot)
        if sequence is self.prefilling:
            self.prefilling = None
            return
        last = self.decoding.pop()
        if last is not sequence:
            slot = sequence.slot
            self._move(last, slot)
            self.decoding[slot] = last

    def pause(self) -> Sequence:
        """Take the slot back from the sequence that is prefilled; when it starts again it finds what stands there by then."""
        sequence = self.prefilling
        if sequence is None:
            raise RuntimeError("no prefill is under way")
        self.release(sequence)
        return sequence

    def restart(self, sequence: Sequence) -> None:
        """Take the slot back from `sequence`, which decodes; whatever it has of tokens is to be prefilled when it starts
        again.
        """
        self.release(sequence)
        sequence.replayed, sequence.computed = len(sequence.tokens), 0

    def forget(self) -> None:
        """Trust no row that stands in a slot; for after an engine has failed."""
        for slot in range(self._count):
            self._hold(slot, _NOTHING, 0)

    def check(self) -> None:
        """Raise RuntimeError where the books do not agree; cheap enough for every idle moment."""
        for slot, sequence in enumerate(self.decoding):
            if sequence.slot != slot:
                raise RuntimeError(f"sequence {sequence.key} stands at slot {slot} and believes to be at {sequence.slot}")
        if self.free < 0:
            raise RuntimeError("more sequences hold slots than there are")

    def _oldest(self) -> int:
        """The slot that nobody holds and nobody used for longest."""
        return min(range(len(self.decoding), self._count), key=self._used.__getitem__)

    def _save(self, slot: int) -> None:
        """Before `slot` is overwritten: copy its rows over those that have been idle longest, if these are not its own."""
        oldest, prompt = self._oldest(), self._prompts[slot]
        if oldest != slot and len(prompt):
            self._copy(slot, oldest, len(prompt))
            self._hold(oldest, prompt, self._kinds[slot])
            self._used[oldest] = self._used[slot]

    def _move(self, sequence: Sequence, slot: int) -> None:
        """Put `sequence` into `slot`, and the prompt rows that stand there into its old place."""
        old, sequence.slot = sequence.slot, slot
        self._swap(old, slot, keep=sequence.computed)

    def _swap(self, one: int, other: int, keep: int = 0) -> None:
        """Exchange two slots: the prompt rows of both, and the first `keep` rows of `one` at least."""
        if one == other:
            return
        first, second = self._prompts[one], self._prompts[other]
        kind, other_kind = self._kinds[one], self._kinds[other]
        for memory in self.memories:
            memory.exchange((one, max(keep, len(first))), (other, len(second)))
        self._hold(one, second, other_kind)
        self._hold(other, first, kind)
        self._used[one], self._used[other] = self._used[other], self._used[one]

    def _copy(self, source: int, target: int, length: int) -> None:
        for memory in self.memories:
            memory.copy(source, target, length)

    def _hold(self, slot: int, prompt: Int64, kind: int) -> None:
        self._index[self._kinds[slot]].hold(slot, _NOTHING)
        self._prompts[slot], self._kinds[slot] = prompt, kind
        self._index[kind].hold(slot, prompt)

    def _touch(self, slot: int) -> None:
        self._used[slot] = next(self._clock)
