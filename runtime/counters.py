"""What an engine's loop counts: totals since its start, as heartbeats tell them."""

from dataclasses import dataclass, field

from runtime import tally


@dataclass
class Counters:
    """What the loop has done since its start."""

    steps: int = 0
    prompt_tokens: int = 0
    """Computed; those found in a slot are not among them."""
    cached_tokens: int = 0
    """Prompt tokens that were found in a slot."""
    generated_tokens: int = 0
    guessed_tokens: int = 0
    """Tokens that were guessed and verified."""
    accepted_tokens: int = 0
    """Of these, the right ones; they are among the generated tokens."""
    step_seconds: float = 0.0
    decode_steps: int = 0
    """Of the steps, those that gave every row its next token."""
    rows: int = 0
    """Rows of these, without those that only came along."""
    queue_seconds: float = 0.0
    """That requests waited for a slot, whether they got one or not; without those that still wait."""
    timeouts: int = 0
    """Requests that ran out of time."""
    finished: int = 0
    """Requests that ended with finish "stop" or "length"."""
    queue_counts: list[int] = field(default_factory=lambda: tally.empty(tally.QUEUE_SECONDS))
    """Of the requests whose waiting `queue_seconds` sums up."""
    step_counts: list[int] = field(default_factory=lambda: tally.empty(tally.STEP_SECONDS))
    """Of the steps."""
    batch_counts: list[int] = field(default_factory=lambda: tally.empty(tally.BATCH_ROWS))
    """Of the decode steps."""

    def waited(self, seconds: float) -> None:
        """A request waits no longer."""
        self.queue_seconds += seconds
        tally.observe(self.queue_counts, tally.QUEUE_SECONDS, seconds)

    def stepped(self, seconds: float) -> None:
        """The engine has done a step."""
        self.steps += 1
        self.step_seconds += seconds
        tally.observe(self.step_counts, tally.STEP_SECONDS, seconds)

    def decoded(self, rows: int) -> None:
        """A step has given each of `rows` rows its next token."""
        self.decode_steps += 1
        self.rows += rows
        tally.observe(self.batch_counts, tally.BATCH_ROWS, rows)
