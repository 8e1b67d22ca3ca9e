"""How fast the engine is at the moment, and what follows for how long running streams may be held up."""

STALL = 1.5
"""Decode steps' time that may be spent between two of them on other sequences' prompts and guesses: a stream's next token
then comes 2.5 times later than usual at the latest."""
LEAST_STALL = 0.075
"""Seconds that may be spent so in any case. With few streams decode steps are short, and prompts in small chunks slow; nobody
reads faster than this."""
LEAST_PREFILL = 16
"""Prompt tokens that are computed in every iteration, however slow that is, so that every prompt gets done."""

_WEIGHT = 0.25
"""Of the newest measurement in an average."""


class Pace:
    """Running averages of what steps took, in seconds."""

    def __init__(self) -> None:
        self._token: float | None = None
        self._decode: float | None = None

    @property
    def stall(self) -> float:
        """Seconds that may pass between two decode steps."""
        return LEAST_STALL if self._decode is None else max(LEAST_STALL, STALL * self._decode)

    def prefill_tokens(self, most: int, spent: float) -> int:
        """Prompt tokens to compute while streams wait that were held up for `spent` seconds already, at most `most`.

        Whole multiples of the least, which suits the kernels.
        """
        if self._token is None:
            return min(LEAST_PREFILL, most)
        fitting = int((self.stall - spent) / self._token)
        return max(min(LEAST_PREFILL, most), min(most, fitting - fitting % LEAST_PREFILL))

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A chunk of a prompt took `seconds`."""
        self._token = _average(self._token, seconds / tokens)

    def decoded(self, seconds: float) -> None:
        """A decode step took `seconds`."""
        self._decode = _average(self._decode, seconds)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
