"""How answers are to be made, whichever API asked for them: what is left of a body once it has been parsed."""

import secrets

import msgspec

from runtime.bundle import SamplingDefaults
from runtime.messages import Constraint, Sampling

SILENT = SamplingDefaults(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
"""OpenAI's defaults: what holds where neither a request nor anybody who serves the model says anything."""
_APART = 0x9E3779B97F4A7C15
"""Between the seeds of two answers to one request: far, so that another request's seed plus one is none of them."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says of how tokens are drawn; None where it leaves that to the model."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """0 keeps all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    logit_bias: dict[int, float] = {}
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def over(self, defaults: SamplingDefaults) -> Sampling:
        """How tokens are drawn: as the request says and, where it is silent, as `defaults` and OpenAI's have it."""
        behind = msgspec.structs.asdict(defaults.over(SILENT))
        own = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return Sampling(**(behind | own))


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """How one or several answers to a prompt are to be made."""

    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    """None takes what the prompt leaves of the context."""
    limit: str = "max_tokens"
    """What the body's field for it is called."""
    min_tokens: int = 0
    stops: tuple[str, ...] = ()
    """Strings before the first of which the answer ends."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's own."""
    ignore_eos: bool = False
    """Go on past the model's own end of an answer."""
    top_logprobs: int = 0
    """Alternatives that are told with each token."""
    prompt_logprobs: bool = False
    """Score the prompt's tokens."""
    constraint: Constraint | None = None
    form: str = "response_format"
    """The body's field that the constraint is from."""
    speculation: bool = True
    count: int = 1
    """Answers to each prompt."""

    def nth(self, index: int, defaults: SamplingDefaults) -> Sampling:
        """The sampling of the answer at `index`, of a model that has `defaults`.

        Each answer has a seed of its own, the first one the request's.
        """
        sampling = self.sampling.over(defaults)
        return msgspec.structs.replace(sampling, seed=(sampling.seed + index * _APART) % 2**63) if index else sampling


def seed(wanted: int | None) -> int:
    """The engine's form of a client's seed, which may be negative; a random one where there is none."""
    return secrets.randbits(63) if wanted is None else wanted % 2**63
