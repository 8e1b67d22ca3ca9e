"""What one measurement gave."""

from statistics import median

import msgspec


class Result(msgspec.Struct):
    """Figures of `streams` concurrent streams, collected over the repeats; seconds throughout."""

    what: str
    streams: int
    first_tokens: list[float] = []
    """Times to the first token, one a stream and repeat."""
    inter_tokens: list[float] = []
    """Times between neighbouring tokens of a stream."""
    rates: list[float] = []
    """Tokens a second over all streams, one a repeat."""
    limit: float | None = None
    """Least time between tokens of one stream: reading the weights once."""
    perplexity: float | None = None

    @property
    def first_token(self) -> float:
        """Median time to the first token."""
        return median(self.first_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Median rate."""
        return median(self.rates)

    def inter_token(self, share: float) -> float:
        """The time between tokens that `share` of them keep to."""
        ordered = sorted(self.inter_tokens)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
