"""How answers are to be made, whichever API asked for them: what is left of a body once it has been parsed."""

import secrets

import msgspec

from runtime.messages import Constraint, Sampling

_APART = 0x9E3779B97F4A7C15
"""Between the seeds of two answers to one request: far, so that another request's seed plus one is none of them."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """How one or several answers to a prompt are to be made."""

    sampling: Sampling = Sampling()
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

    def nth(self, index: int) -> Sampling:
        """The sampling of the answer at `index`: each has a seed of its own, the first one the request's."""
        if not index:
            return self.sampling
        return msgspec.structs.replace(self.sampling, seed=(self.sampling.seed + index * _APART) % 2**63)


def seed(wanted: int | None) -> int:
    """The engine's form of a client's seed, which may be negative; a random one where there is none."""
    return secrets.randbits(63) if wanted is None else wanted % 2**63
