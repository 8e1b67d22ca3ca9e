"""What the routes share: the model that is served, its text, and the way to its engine."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from aiohttp import web

from runtime.bundle import Bundle, Variant
from runtime.messages import Generate, Ready
from runtime.text import Text, TextError
from server.access import CLIENT
from server.attempts import Attempts
from server.bodies import GenerationBody, Message
from server.engine_client import EngineClient
from server.errors import ApiError, bad_request, unavailable
from server.generation import Generation, sampling
from server.journal import ENTRY
from server.metrics import Metrics
from server.replicas import Prompts, Replica, choose, least_busy

LONG_TEXT = 10_000
"""Characters from which text is tokenized in a thread, so that the streams do not wait for it."""


@dataclass
class Service:
    """One model behind one engine, which may run on several devices."""

    bundle: Bundle
    variant: Variant
    text: Text
    replicas: Sequence[Replica]
    metrics: Metrics = field(init=False)
    queue_seconds: float = 0.0
    """How long a request may wait for a slot; 0 sets no limit."""
    total_seconds: float = 0.0
    """How long it may take altogether, likewise."""
    draining: bool = False
    """Set when the server stops: what runs goes on, nothing new is taken."""

    def __post_init__(self) -> None:
        """Begin to count."""
        self.metrics = Metrics(self.replicas)
        self._prompts = Prompts()

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes with the engine's model file."""
        model = next(file for file in self.variant.files if file.path == self.variant.model)
        return f"fp_{model.sha256[:10]}"

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together: the engine's, or as long as there is none the model's own."""
        connection = least_busy(self.replicas)
        return self.bundle.max_length if connection is None else connection[1].context

    def check_ready(self) -> None:
        """Raise ApiError 503 while no request can be taken."""
        self._connection()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 unless `name` is the model that is served, or None."""
        if name is not None and name != self.bundle.name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self.bundle.name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_tokens(self, tokens: list[int]) -> None:
        """Raise ApiError 400 if one of a prompt's `tokens` is not in the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.bundle.vocab_size:
                raise bad_request(f"The prompt's token {token} is not between 0 and {self.bundle.vocab_size - 1}.", "prompt")

    async def tokenize(self, text: str, *, of: str = "prompt", special: bool = True) -> list[int]:
        """The tokens of the text in the body's field `of`, with the beginning-of-sequence token if `special` and the model
        has one; raises ApiError 400.
        """
        encode = partial(self.text.encode, text, special=special)
        try:
            return await asyncio.to_thread(encode) if len(text) > LONG_TEXT else encode()
        except TextError as error:
            raise bad_request(str(error), of) from None

    async def tokenize_chat(self, messages: list[Message]) -> list[int]:
        """The tokens of a chat in the model's own template, up to where its answer begins; raises ApiError 400."""
        turns = [{"role": "system" if turn.role == "developer" else turn.role, "content": turn.text} for turn in messages]
        try:
            if sum(len(turn["content"]) for turn in turns) > LONG_TEXT:
                return await asyncio.to_thread(self.text.chat, turns)
            return self.text.chat(turns)
        except TextError as error:
            raise bad_request(str(error), "messages") from None

    @contextmanager
    def generate(
        self, request: web.Request, body: GenerationBody, prompt: list[int], *, of: str, prediction: Sequence[int] = ()
    ) -> Iterator[Generation]:
        """Ask the engine to continue `prompt`, the tokens of the body's field `of`; leaving the context frees its slot.

        `prediction` is what the client expects as the answer. Raises ApiError: 400 if the prompt is empty, or has no room
        in the context together with max_tokens; 503.
        """
        client, ready = self._connection(prompt)
        wanted = Generate(
            id="",
            prompt=prompt,
            max_tokens=_room(ready, body, prompt, of),
            sampling=sampling(body),
            stop_ids=[] if body.ignore_eos else list(self.bundle.stop_ids),
            speculation=body.speculation is not False,
            prediction=list(prediction[: ready.context]),
            client=request[CLIENT].name,
            priority=request[CLIENT].priority,
            queue_seconds=self.queue_seconds,
            total_seconds=self.total_seconds,
        )
        with Attempts(wanted, client, self._other) as answer:
            generation = Generation(prompt, request[ARRIVED], answer, self.text.stream(body.stops), self.metrics)
            request[ENTRY].model, request[ENTRY].answer = self.bundle.name, generation
            yield generation

    def _other(self) -> EngineClient | None:
        """An engine for a request whose own has stopped; also while this server drains, for it was taken before."""
        connection = least_busy(self.replicas)
        return None if connection is None else connection[0]

    def _connection(self, prompt: Sequence[int] = ()) -> tuple[EngineClient, Ready]:
        if self.draining:
            raise unavailable("The server is shutting down.")
        connection = choose(self.replicas, self._prompts, prompt)
        if connection is None:
            raise unavailable("The engine is not ready: it is loading or being restarted. Try again in a moment.")
        return connection


SERVICE = web.AppKey("service", Service)
ARRIVED = web.RequestKey("arrived", float)
STATUS = web.RequestKey("status", int)
"""The status that a stream would have had, had its error come before its first byte."""


def _room(ready: Ready, body: GenerationBody, prompt: list[int], of: str) -> int:
    """The most tokens that the answer may have."""
    context, length = ready.context, len(prompt)
    name, wanted = body.limit
    if not prompt:
        raise bad_request("The prompt is empty; there is nothing to continue.", of)
    if length >= context:
        raise bad_request(
            f"The prompt has {length} tokens; with at least one for the answer that is more than the {context} "
            "tokens of the context. Shorten the prompt.",
            of,
            "context_length_exceeded",
        )
    if wanted is not None and length + wanted > context:
        raise bad_request(
            f"The prompt has {length} tokens and {name} is {wanted}: together {length + wanted}, more than the "
            f"{context} tokens of the context. Ask for at most {context - length}, or leave {name} out.",
            name,
            "context_length_exceeded",
        )
    return context - length if wanted is None else wanted
