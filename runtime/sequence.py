"""One request on its way through the engine."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from runtime.engine import Int64
from runtime.grammar import Matcher
from runtime.messages import Finish, Generate, Scored
from runtime.penalties import Penalties, penalized
from runtime.speculation import DRAFT_MEMORY, DRAFT_PRIOR, MEMORY, Lookup


@dataclass(eq=False)
class Sequence:
    """A prompt, the tokens that answer it so far, and how much of both the engine has seen."""

    owner: bytes
    """The front end that asked; with `request.id` it names the sequence."""
    request: Generate
    arrived: float = 0.0
    """Seconds by the loop's clock."""
    started: float | None = None
    """When it was given a slot, by the same clock; None while it waits."""
    slot: int = -1
    computed: int = 0
    """Tokens whose keys and values stand in the slot."""
    cached: int = 0
    """Of these, prompt tokens whose keys and values stood in a slot already."""
    counted: int = 0
    """Tokens of the prompt up to which it has been counted as computed: a prompt that was paused may come there again."""
    tokens: list[int] = field(default_factory=list)
    replayed: int = 0
    """Of these, those computed anew together with the prompt when the row had grown past one of the engine's boundaries."""
    finish: Finish | None = None
    matcher: Matcher | None = None
    """Its way through the grammar of its constraint; None where it has none, and until that is compiled."""
    penalties: Penalties | None = None
    """What it changes of its tokens' logits; None where it changes nothing, and until it has a slot."""
    scored: list[Scored] = field(default_factory=list)
    """The prompt's tokens from the second on, as far as they are scored, where that is wanted."""
    lookup: Lookup | None = None
    """Guesses from the sequence's own tokens; None where it wants none."""
    draft_share: float = DRAFT_PRIOR
    """Of a draft engine's recent guesses, the share that was right."""
    turn: int = 0
    """The iteration in which guesses of it were verified last."""

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end the answer, beside those that end an answer to its grammar."""
        return frozenset(self.request.stop_ids)

    @cached_property
    def prompt(self) -> Int64:
        """The prompt as an array."""
        return np.array(self.request.prompt, np.int64)

    @property
    def prefix(self) -> Int64:
        """What is prefilled: the prompt, and the answer's tokens that are computed anew."""
        return np.concatenate([self.prompt, np.array(self.tokens[: self.replayed], np.int64)]) if self.replayed else self.prompt

    @property
    def scores_prompt(self) -> bool:
        """The prompt's own tokens are to be scored, and are not yet."""
        return self.request.prompt_logprobs and not self.replayed

    @property
    def reusable(self) -> Int64:
        """Of the prefix, what need not be computed where it stands in a slot.

        The last token is always computed, for its logits, and never alone: a lone row would come out with other bits.
        """
        return self.prefix[: 0 if self.scores_prompt else -2]

    @property
    def foreseeable(self) -> bool:
        """How the token after the next is drawn is known before the next one is."""
        return self.matcher is None and not penalized(self.request)

    @property
    def key(self) -> tuple[bytes, str]:
        """What names the sequence in this worker."""
        return self.owner, self.request.id

    @property
    def length(self) -> int:
        """Prompt and answer together."""
        return len(self.prompt) + len(self.tokens)

    @property
    def prefix_length(self) -> int:
        """Tokens of the prefix."""
        return len(self.prompt) + self.replayed

    @property
    def prefix_left(self) -> int:
        """Tokens of the prefix that are not computed yet."""
        return max(0, self.prefix_length - self.computed)

    @property
    def served(self) -> int:
        """Tokens that the engine worked on for it: computed prompt tokens and the answer's."""
        return (len(self.prompt) if self.tokens else self.computed) - self.cached + len(self.tokens)

    @property
    def deadline(self) -> float:
        """When its time is up, by the loop's clock: that of waiting while it waits, that of everything; inf where unlimited."""
        request = self.request
        end = self.arrived + (request.total_seconds or math.inf)
        return end if self.started is not None else min(end, self.arrived + (request.queue_seconds or math.inf))

    def timeout(self, now: float) -> str:
        """Which limit it has reached at `now`, its deadline or later, in a sentence for whoever asked."""
        request = self.request
        taken, total = now - self.arrived, f"its limit for everything is {request.total_seconds:g} s (total_seconds)"
        if self.started is not None:
            return f"the request took {taken:.2f} s, {self.started - self.arrived:.2f} s of them waiting for a slot; {total}"
        waiting = f"its limit for waiting is {request.queue_seconds:g} s (queue_seconds)"
        queued = now >= self.arrived + (request.queue_seconds or math.inf)
        return f"the request waited {taken:.2f} s for a slot; {waiting if queued else total}"

    def most(self, context: int) -> int:
        """Tokens that it has at the end if nothing cuts the answer short: prompt and answer together."""
        return min(len(self.request.prompt) + self.request.max_tokens, context)

    def accept(self, token: int, context: int) -> bool:
        """Take the engine's next token; sets `finish` when it was the last. False when the token ends the answer unseen."""
        if self.matcher is not None and self.matcher.failure:
            self.finish = "unmet"
            return False
        if token in self.stop_ids or (self.matcher is not None and token in self.matcher.stop_ids):
            self.finish = "stop"
            return False
        self.tokens.append(token)
        if self.penalties is not None:
            self.penalties.take(token)
            if self.penalties.over:
                self.penalties = None
        if self.matcher is not None and self.matcher.take(token):
            self.finish = "unmet" if self.matcher.failure else "stop"
        elif len(self.tokens) >= self.request.max_tokens or self.length >= context:
            self.finish = "length"
        return True

    def count_prompt(self, end: int) -> int:
        """How many of the prefix's tokens from `computed` up to `end` are the prompt's, and computed for the first time."""
        end = min(end, len(self.prompt))
        new = max(0, end - max(self.computed, self.counted))
        self.counted = max(self.counted, end)
        return new

    def guess(self, count: int) -> list[int]:
        """The `count` tokens that its own say will come next; with a grammar those that it forces, maybe fewer or none."""
        if self.matcher is not None:
            return self.matcher.forced[:count]
        return [] if self.lookup is None else self.lookup.guess(count)

    def note(self, tokens: list[int]) -> None:
        """Learn from the tokens that came what can be expected next."""
        if self.lookup is not None:
            self.lookup.extend(tokens)
        self.draft_share += (DRAFT_PRIOR - self.draft_share) / DRAFT_MEMORY

    def judge_draft(self, guesses: int, right: int) -> None:
        """Note that the first `right` of a draft engine's `guesses` were right; those after a wrong one tell nothing."""
        for index in range(min(guesses, right + 1)):
            self.draft_share += ((index < right) - self.draft_share) / MEMORY
