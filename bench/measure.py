"""What one run of the bench gave: figures, the machine that they were measured on, and ratios of pairs."""

from collections.abc import Sequence
from statistics import median

import msgspec


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` (in [0, 1]) of `values` do not exceed; None where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


class Machine(msgspec.Struct):
    """What the figures were measured on."""

    processor: str
    system: str
    python: str
    cores: int
    """Cores that the bench and every peer may use."""
    read_bandwidth: float
    """Bytes a second that all cores together read from memory."""
    sgemm: float
    """Float32 operations a second of a large matrix product on all cores."""
    date: str
    others: float | None = None
    """Share of all cores' time that processes other than the measured ones took meanwhile."""


class Result(msgspec.Struct):
    """Figures of `streams` concurrent streams, collected over the repeats; seconds throughout."""

    what: str
    """As "engineshed cpu-int4" or "llama.cpp Q4_1", or the address of a server."""
    streams: int
    first_tokens: list[float] = []
    """Times to the first token, one a request."""
    inter_tokens: list[float] = []
    """Times between neighbouring tokens of a stream."""
    rates: list[float] = []
    """Generated tokens a second over all streams, one a repeat."""
    prompt_tokens: int = 0
    tokens: int = 0
    arrivals: float | None = None
    """Requests a second of an open loop; None in a closed loop."""
    start_seconds: float | None = None
    """From the start of the process to its first token."""
    rss: int | None = None
    """Bytes resident of the processes that hold the model, after the run."""
    weights: int | None = None
    """Bytes that one decode step reads of the weights."""
    perplexity: float | None = None
    reference_perplexity: float | None = None
    """Of transformers in float32 over the same text."""
    note: str = ""
    """The setting that was measured."""
    parameters: int | None = None
    """Weights that each token of a prompt is multiplied with."""
    latencies: list[float] = []
    """Times to the last token, one a request that was answered; served only."""
    errors: int = 0
    """Requests that failed; their times are in none of the figures. Served only."""
    cached_share: float | None = None
    """Share of the prompts' tokens that the server says it had computed before; None where it does not say."""

    @property
    def first_token(self) -> float | None:
        """Median time to the first token."""
        return median(self.first_tokens) if self.first_tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median rate."""
        return median(self.rates) if self.rates else None

    def first_token_at(self, share: float) -> float | None:
        """The time to the first token that `share` of the requests keep to."""
        return percentile(self.first_tokens, share)

    def inter_token(self, share: float) -> float | None:
        """The time between tokens that `share` of them keep to."""
        return percentile(self.inter_tokens, share)

    def bandwidth_share(self, machine: Machine) -> float | None:
        """Share of the memory's bandwidth that decode uses: 1 where a token takes as long as one reading of the weights.

        None for several streams, whose steps are not bound by that alone.
        """
        step = self.inter_token(0.5)
        if self.streams != 1 or self.weights is None or not step:
            return None
        return self.weights / machine.read_bandwidth / step

    def sgemm_share(self, machine: Machine) -> float | None:
        """Share of the cores' float32 speed that prefill uses, two operations a parameter and prompt token.

        None for several streams, whose prompts wait for each other. Quantized kernels may exceed 1.
        """
        if self.streams != 1 or self.parameters is None or not self.prompt_tokens or not self.first_token:
            return None
        return 2 * self.parameters * self.prompt_tokens / machine.sgemm / self.first_token


class Ratio(msgspec.Struct):
    """One figure of `what` divided by that of `against`, pair by pair, one value a repeat."""

    what: str
    against: str
    streams: int
    figure: str
    """As "ITL p50", "TTFT" or "tokens/s"."""
    values: list[float] = []
    arrivals: float | None = None
    """Requests a second of an open loop; None in a closed loop."""

    @property
    def median(self) -> float | None:
        """The middle one of the values."""
        return median(self.values) if self.values else None


class Report(msgspec.Struct):
    """A whole run."""

    machine: Machine
    results: list[Result]
    ratios: list[Ratio] = []
    command: str = ""
    """The command line that measured it."""
