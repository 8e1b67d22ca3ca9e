"""Which sequence holds which KV slot: those that decode hold the first ones, without a gap.

A decode step runs over neighbouring slots, so an idle slot between two running ones would be computed for nothing. A slot
that falls free is therefore filled by the last decoding sequence, whose keys and values are copied.
"""

from collections.abc import Iterable

from runtime.engine import Engine
from runtime.sequence import Sequence


class Slots:
    """The slots of `engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
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
        """Give `sequence` a slot to be prefilled in; there must be a free one and no other prefill under way."""
        if not self.free or self.prefilling is not None:
            raise RuntimeError("no slot for a prefill")
        sequence.slot, sequence.computed = len(self.decoding), 0
        self.prefilling = sequence

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
        if sequence is self.prefilling:
            self.prefilling = None
            return
        last = self.decoding.pop()
        if last is not sequence:
            self._move(last, sequence.slot)
            self.decoding[sequence.slot] = last

    def check(self) -> None:
        """Raise RuntimeError where the books do not agree; cheap enough for every idle moment."""
        for slot, sequence in enumerate(self.decoding):
            if sequence.slot != slot:
                raise RuntimeError(f"sequence {sequence.key} stands at slot {slot} and believes to be at {sequence.slot}")
        if self.free < 0:
            raise RuntimeError("more sequences hold slots than there are")

    def _move(self, sequence: Sequence, slot: int) -> None:
        if sequence.slot != slot:
            self._engine.copy(sequence.slot, slot, sequence.computed)
            sequence.slot = slot
