"""Which sequence holds which KV slot, and which prompts' rows still stand in them.

A decode step runs over neighbouring slots, so the decoding sequences hold the first ones without a gap: a slot that falls
free is filled by the last of them. What stood in it goes to that one's old place, so that a later prompt that begins alike
finds its rows.

Rows are reused in whole chunks of a prompt's prefill only. Computed by the same operators on the same shapes, they are the
very bits that the new request would have computed itself: reuse never changes a token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from runtime.engine import Engine, Int64
from runtime.sequence import Sequence


@dataclass
class _Rows:
    """What stands in a slot."""

    prompt: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """The prompt's tokens whose rows were prefilled in whole chunks, from position 0."""
    used: int = 0
    """Grows with every use; the free slot with the least is overwritten first."""

    def common(self, prompt: Int64, chunk: int) -> int:
        """Leading tokens of `prompt` whose rows stand here, in whole chunks."""
        length = min(len(self.prompt), len(prompt))
        differing = np.flatnonzero(self.prompt[:length] != prompt[:length])
        same = int(differing[0]) if len(differing) else length
        return same - same % chunk


class Slots:
    """The slots of `engine`, whose prompts are prefilled in chunks of `chunk` tokens."""

    def __init__(self, engine: Engine, chunk: int) -> None:
        self._engine, self._chunk = engine, chunk
        self._rows = [_Rows() for _ in range(engine.slots)]
        self._clock = count(1)
        self.decoding: list[Sequence] = []
        """Sequence i of this list holds slot i."""
        self.prefilling: Sequence | None = None

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self._engine.slots - len(self.decoding) - (self.prefilling is not None)

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
        # The last token is always computed: its logits are wanted.
        source, length = self._longest(sequence.prompt[:-1])
        target = len(self.decoding)
        if length:
            self._touch(source)
        if source < target:  # a running sequence keeps its rows
            self._save(target)
            self._engine.copy(source, target, length)
        else:
            self._swap(source, target)
            if length < len(self._rows[target].prompt):
                self._save(target)
        self._rows[target] = _Rows(sequence.prompt[:length])
        self._touch(target)
        sequence.slot, sequence.computed, sequence.cached = target, length, length
        self.prefilling = sequence

    def prefilled(self, sequence: Sequence) -> None:
        """Note that the rows of the sequence's prompt up to `computed` stand in its slot."""
        whole = sequence.computed - sequence.computed % self._chunk
        self._rows[sequence.slot].prompt = sequence.prompt[:whole]

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

    def forget(self) -> None:
        """Trust no row that stands in a slot; for after an engine has failed."""
        for rows in self._rows:
            rows.prompt = rows.prompt[:0]

    def check(self) -> None:
        """Raise RuntimeError where the books do not agree; cheap enough for every idle moment."""
        for slot, sequence in enumerate(self.decoding):
            if sequence.slot != slot:
                raise RuntimeError(f"sequence {sequence.key} stands at slot {slot} and believes to be at {sequence.slot}")
        if self.free < 0:
            raise RuntimeError("more sequences hold slots than there are")

    def _longest(self, prompt: Int64) -> tuple[int, int]:
        """The slot where most of `prompt` stands, the target itself where it is as good, and how much that is."""
        target = len(self.decoding)
        lengths = [rows.common(prompt, self._chunk) for rows in self._rows]
        best = max(lengths)
        return (target, best) if lengths[target] == best else (lengths.index(best), best)

    def _save(self, slot: int) -> None:
        """Before `slot` is overwritten: copy its rows over those that have been idle longest, if these are not its own."""
        oldest = min(range(len(self.decoding), self._engine.slots), key=lambda index: self._rows[index].used)
        rows = self._rows[slot]
        if oldest != slot and len(rows.prompt):
            self._engine.copy(slot, oldest, len(rows.prompt))
            self._rows[oldest] = _Rows(rows.prompt, rows.used)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self._engine.exchange((one, len(self._rows[one].prompt)), (other, len(self._rows[other].prompt)))
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]

    def _move(self, sequence: Sequence, slot: int) -> None:
        """Put `sequence` into `slot`, and the prompt rows that stand there into its old place."""
        old = sequence.slot
        if old == slot:
            return
        self._engine.exchange((old, sequence.computed), (slot, len(self._rows[slot].prompt)))
        self._rows[old], self._rows[slot] = self._rows[slot], self._rows[old]
        sequence.slot = slot

    def _touch(self, slot: int) -> None:
        self._rows[slot].used = next(self._clock)
