"""What the two OpenAI routes for generating share in how they write answers: their heads, and the events of a stream."""

import secrets
import time
from collections.abc import Callable
from functools import cached_property
from typing import TypedDict

from msgspec import UNSET, UnsetType

from server.api.openai.bodies import OpenAIBody
from server.api.writing import SSE, encode
from server.choices import Choices
from server.errors import ApiError
from server.generation import Usage
from server.served import Served

DONE = b"data: [DONE]\n\n"


class Head(TypedDict):
    """What every answer and every chunk says of itself."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def head(served: Served, choices: Choices, prefix: str) -> Head:
    """That of an answer, once engines have begun to give `choices`; its id begins with `prefix`."""
    return Head(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=served.name,
        system_fingerprint=served.fingerprint(choices.engines),
    )


class Events:
    """Server-sent events, the last of which is `[DONE]`."""

    content_type = SSE

    def __init__(self, served: Served, body: OpenAIBody, choices: Choices, prefix: str) -> None:
        self.text = served.text
        self.include_usage = body.include_usage
        self.continuous_usage = body.continuous_usage
        self._served, self._choices, self._prefix = served, choices, prefix

    @cached_property
    def head(self) -> Head:
        """Found with the first event: before, nobody knows which engines answer."""
        return head(self._served, self._choices, self._prefix)

    def usage(self, so_far: bool = False) -> Usage | UnsetType | None:
        """What a chunk before the last says of the usage; `so_far`, where it is wanted of every chunk with text."""
        if so_far and self.continuous_usage:
            return self._choices.usage
        return None if self.include_usage else UNSET

    def error(self, error: ApiError) -> bytes:
        """An `error` event."""
        return b"event: error\ndata: " + error.encode() + b"\n\n"


class Frame:
    """An event without its text, which is all that differs from one to the next of a stream."""

    def __init__(self, event: Callable[[str], bytes]) -> None:
        mark = secrets.token_hex(16)
        self._before, _, self._after = event(mark).partition(encode(mark))

    def around(self, text: str) -> bytes:
        """The event that carries `text`."""
        return self._before + encode(text) + self._after
