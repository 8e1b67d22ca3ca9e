"""Guesses by a smaller engine that reads along.

Its slots are the engine's: what is copied or exchanged there is copied and exchanged here, and prompts are prefilled in
both. It draws with the request's own settings and random numbers, so that it guesses what the larger engine will draw
wherever the two distributions are alike, for sampled requests as for greedy ones.
"""

import numpy as np

from runtime.engine import Batch, Engine, EngineError, Int64
from runtime.radix import common
from runtime.sampling import Place, draw
from runtime.sequence import Sequence


class Drafter:
    """Guesses with the engine `draft` what `engine` will say. Raises EngineError where the two do not fit."""

    def __init__(self, draft: Engine, engine: Engine) -> None:
        if (draft.slots, draft.context) != (engine.slots, engine.context):
            raise EngineError("the draft engine must have as many slots of the same length as the engine")
        if draft.vocab_size != engine.vocab_size:
            raise EngineError(
                f"the draft engine has a vocabulary of {draft.vocab_size} tokens, the engine one of {engine.vocab_size}; "
                "take a draft engine of the same family"
            )
        self._engine = draft
        self.cost = draft.step_cost / engine.step_cost
        """Of a guess, in steps of `engine`."""
        self._known: list[Int64] = [np.zeros(0, np.int64)] * draft.slots
        """The tokens whose rows stand in each slot here, from position 0."""

    def copy(self, source: int, target: int, length: int) -> None:
        """See `runtime.engine.Engine.copy`."""
        known = self._known[source][:length]
        self._engine.copy(source, target, len(known))
        self._known[target] = known

    def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """See `runtime.engine.Engine.exchange`; the lengths are those that stand here."""
        one, other = first[0], second[0]
        self._engine.exchange((one, len(self._known[one])), (other, len(self._known[other])))
        self._known[one], self._known[other] = self._known[other], self._known[one]

    def read(self, slot: int, tokens: Int64) -> None:
        """Compute the rows of `tokens`, the first ones of the sequence in `slot`, as far as they are not there."""
        missing = self._missing(slot, tokens)
        if missing:
            self._step(slot, tokens, missing, [])

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        """The `count` tokens that are expected next."""
        tokens = np.concatenate([sequence.prompt, np.array(sequence.tokens, np.int64)])
        guesses: list[int] = []
        missing = max(1, self._missing(sequence.slot, tokens))
        while len(guesses) < count:
            guesses.append(self._step(sequence.slot, tokens, missing, [Place(sequence, guesses)]))
            tokens, missing = np.append(tokens, guesses[-1]), 1
        return guesses

    def _missing(self, slot: int, tokens: Int64) -> int:
        """How many of the last `tokens` have no rows in `slot`."""
        return len(tokens) - common(self._known[slot], tokens)

    def _step(self, slot: int, tokens: Int64, new: int, rows: list[Place]) -> int:
        """Compute the last `new` of `tokens`; gives the token drawn after them, if `rows` wants one."""
        batch = Batch(
            first_slot=slot,
            input_ids=tokens[None, len(tokens) - new :],
            kv_lengths=np.array([len(tokens)], np.int32),
            logit_rows=np.array([new - 1] if rows else [], np.int64),
            draw=draw(rows, tell=False),
        )
        self._known[slot] = self._known[slot][:0]  # nothing is sure there until the step is done
        drawn, _ = self._engine.step(batch)
        self._known[slot] = tokens
        return int(drawn[0]) if rows else -1
