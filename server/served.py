"""One model as requests use it: its text, and the way to its engines."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from aiohttp import web

from runtime.bundle import Bundle, Variant
from runtime.messages import Generate, Ready
from runtime.text import Text, TextError
from server.access import CLIENT
from server.api.bodies import GenerationBody, Message
from server.attempts import Attempts
from server.doors import Limits
from server.engine_client import EngineClient, EngineUnavailableError
from server.errors import bad_request, unavailable
from server.generation import Generation, sampling
from server.journal import ENTRY
from server.metrics import Metrics
from server.replicas import Prompts, Replica, choose, least_busy

LONG_TEXT = 10_000
"""Characters from which text is tokenized in a thread, so that the streams do not wait for it."""


class Served:
    """One build of a model behind one engine, which may run on several devices."""

    def __init__(
        self, name: str, bundle: Bundle, variant: Variant, text: Text, replicas: Sequence[Replica], metrics: Metrics
    ) -> None:
        self.name = name
        self.bundle = bundle
        self.text = text
        self.over = False
        """Set when no engine will answer any more."""
        self._variant = variant
        self._replicas = replicas
        self._metrics = metrics
        self._prompts = Prompts()
        self._ready: Ready | None = None
        """What the engine that took the last request said of itself."""

    @property
    def connected(self) -> bool:
        """Whether an engine takes requests."""
        return least_busy(self._replicas) is not None

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes with the engine's model file."""
        model = next(file for file in self._variant.files if file.path == self._variant.model)
        return f"fp_{model.sha256[:10]}"

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together: the engine's, or as long as there is none the model's own."""
        connection = least_busy(self._replicas)
        return self.bundle.max_length if connection is None else connection[1].context

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
        self,
        request: web.Request,
        body: GenerationBody,
        prompt: list[int],
        *,
        of: str,
        limits: Limits,
        prediction: Sequence[int] = (),
    ) -> Iterator[Generation]:
        """Ask the engine to continue `prompt`, the tokens of the body's field `of`; leaving the context frees its slot.

        `prediction` is what the client expects as the answer. Raises ApiError: 400 if the prompt is empty, or has no room
        in the context together with max_tokens; 503.
        """
        connection = choose(self._replicas, self._prompts, prompt)
        client, ready = connection or (None, self._ready)
        if ready is None:
            raise unavailable("The engine is not ready. Try again in a moment.")
        self._ready = ready
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
            queue_seconds=limits.queue_seconds,
            total_seconds=limits.total_seconds,
        )
        device = next((replica.device for replica in self._replicas if replica.client is client), self._replicas[0].device)
        with Attempts(wanted, client, self._other) as answer:
            metrics = self._metrics.of(self.name, device)
            generation = Generation(prompt, request[ENTRY].arrived, answer, self.text.stream(body.stops), metrics)
            request[ENTRY].model, request[ENTRY].answer = self.name, generation
            yield generation

    def _other(self) -> EngineClient | None:
        """An engine for a request whose own has stopped; raises EngineUnavailableError where there will be none."""
        connection = least_busy(self._replicas)
        if connection is None and self.over:
            raise EngineUnavailableError("The engine stopped, and will not be started again. Try again later.")
        return None if connection is None else connection[0]


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
