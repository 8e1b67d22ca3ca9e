"""What a run of the GPU bench found, as it is kept in its JSON file."""

from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Bandwidth:
    """What the GPU's memory was seen to do, in bytes a second."""

    copy: float
    """Read and written by a copy within the GPU."""
    read: float
    """Read by a sum."""

    @property
    def limit(self) -> float:
        """The larger of the two: the memory has done it, and against the smaller one a share would flatter."""
        return max(self.copy, self.read)


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on."""

    gpu: str
    compute_capability: str
    memory: int
    """Bytes of the GPU."""
    driver: str
    versions: dict[str, str]
    date: str


@dataclass
class Decode:
    """Decode steps of `batch` rows; a list holds one value a round, in seconds a step."""

    what: str
    batch: int
    tokens: float
    """In each slot, on average over the steps."""
    read: int = 0
    """Bytes that a step must read: the weights once, and every row's keys and values; 0 where it is not known."""
    steps: list[float] = field(default_factory=list)
    """From one step's tokens to the next one's: with the step ahead where the engine has one."""
    host: list[float] = field(default_factory=list)
    """The part of `steps` in which the process does not wait for the GPU."""
    alone: list[float] = field(default_factory=list)
    """As `steps`, without a step ahead."""
    gpu: list[float] = field(default_factory=list)
    """What the GPU computes on a step that was put on its stream as a whole before it began."""

    @property
    def step(self) -> float | None:
        """Median of `steps`."""
        return median(self.steps) if self.steps else None

    @property
    def rate(self) -> float | None:
        """Tokens a second over all rows."""
        return self.batch / self.step if self.step else None

    @property
    def idle(self) -> float | None:
        """Of a step, when the GPU has nothing to do: the median step less what the GPU computes on it."""
        return median(self.steps) - median(self.gpu) if self.steps and self.gpu else None

    @property
    def idle_alone(self) -> float | None:
        """The same without a step ahead: all that launching a step and reading its tokens costs."""
        return median(self.alone) - median(self.gpu) if self.alone and self.gpu else None

    def share(self, bandwidth: Bandwidth | None) -> float | None:
        """Of the memory's limit: 1 where a step takes as long as reading what it must read."""
        return self.read / self.step / bandwidth.limit if bandwidth is not None and self.read and self.step else None


@dataclass
class FirstToken:
    """Seconds from a prompt of `prompt` tokens to the first token of its answer, one value a repeat."""

    what: str
    prompt: int
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Tokens:
    """How an engine's greedy tokens compare with transformers'; see `export.verify.Agreement`."""

    what: str
    compared: int
    equal: int
    ties: int
    distinct: int
    """Different tokens among those compared: few of them would prove little."""
    first: str
    """The first real difference in words; empty without one."""


@dataclass(frozen=True)
class Failure:
    """A part that gave no figure."""

    part: str
    reason: str


@dataclass
class Report:
    """A whole run."""

    machine: Machine
    command: str
    bandwidth: Bandwidth | None = None
    tokens: list[Tokens] = field(default_factory=list)
    decode: list[Decode] = field(default_factory=list)
    first_tokens: list[FirstToken] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """That the run took."""
