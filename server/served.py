"""One model as requests use it: its text, and the way to its engines."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import msgspec
from aiohttp import web

from runtime.bundle import Bundle, SamplingDefaults, Variant
from runtime.messages import Generate, Ready
from runtime.text import Text, TextError
from server import constraints
from server.access import CLIENT
from server.asked import Asked
from server.attempts import Attempts
from server.checker import CHECKER
from server.choices import Choices
from server.doors import Limits
from server.engine_client import EngineClient, EngineUnavailableError
from server.errors import bad_request, unavailable
from server.fingerprint import fingerprint, together
from server.generation import Generation
from server.journal import ENTRY
from server.metrics import Metrics
from server.replicas import Prompts, Replica, choose, least_busy, ready_ones
from server.tools import format_of

LONG_TEXT = 10_000
"""Characters from which text is tokenized in a thread, so that the streams do not wait for it."""


class Served:
    """One build of a model behind one engine, which may run on several devices."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        variant: Variant,
        text: Text,
        replicas: Sequence[Replica],
        metrics: Metrics,
        *,
        sampling: SamplingDefaults | None = None,
    ) -> None:
        """`sampling` is how tokens are drawn where a request does not say; None takes what the model's authors recommend."""
        self.name = name
        self.sampling = bundle.sampling if sampling is None else sampling
        self.bundle = bundle
        self.text = text
        self.over = False
        """Set when no engine will answer any more."""
        self.tools = format_of(bundle.tools, text.special_id)
        """How the model writes calls."""
        self._vocabulary = constraints.vocabulary(text.folder, bundle)
        self._variant = variant
        self._replicas = replicas
        self._metrics = metrics
        self._prompts = Prompts()
        self._fingerprints: dict[tuple[str, str], str] = {}
        """By variant and kernels, in which engines on several devices may differ."""
        self._ready: Ready | None = None
        """What the engine that took the last request said of itself."""

    @property
    def connected(self) -> bool:
        """Whether an engine takes requests."""
        return least_busy(self._replicas) is not None

    def fingerprint(self, engines: Iterable[Ready]) -> str:
        """OpenAI's system_fingerprint of what `engines` give; see `server.fingerprint`."""
        return together(self._fingerprint(engine) for engine in engines)

    def _fingerprint(self, engine: Ready) -> str:
        variant = self.bundle.by_name.get(engine.variant, self._variant)
        key = (variant.name, engine.kernels)
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(self.bundle, variant, engine.kernels, self.sampling)
        return self._fingerprints[key]

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together: the engine's, or as long as there is none the model's own."""
        connection = least_busy(self._replicas)
        return self.bundle.max_length if connection is None else connection[1].context

    def check_tokens(self, tokens: list[int], *, of: str = "prompt") -> None:
        """Raise ApiError 400 if one of the `tokens` in the body's field `of` is not in the vocabulary."""
        for token in (min(tokens), max(tokens)) if tokens else ():
            if not 0 <= token < self.bundle.vocab_size:
                raise bad_request(f"The token {token} in {of!r} is not between 0 and {self.bundle.vocab_size - 1}.", of)

    def _check_ids(self, of: str, tokens: Iterable[int]) -> None:
        for token in tokens:
            if token >= self.bundle.vocab_size:
                raise bad_request(f"The token {token} in {of!r} is none of the vocabulary's {self.bundle.vocab_size}.", of)

    async def tokenize(self, text: str, *, of: str = "prompt", special: bool = True) -> list[int]:
        """The tokens of the text in the body's field `of`, with the beginning-of-sequence token if `special` and the model
        has one; raises ApiError 400.
        """
        return (await self.tokenize_all([text], of=of, special=special))[0]

    async def tokenize_all(
        self, texts: Sequence[str], *, of: str, special: bool = True, most: int | None = None
    ) -> list[list[int]]:
        """The tokens of each of the texts in the body's field `of`, cut to `most` where that is given; raises ApiError 400."""
        long = sum(map(len, texts)) > LONG_TEXT
        return (
            await asyncio.to_thread(self._encode, texts, of, special, most) if long else self._encode(texts, of, special, most)
        )

    def _encode(self, texts: Sequence[str], of: str, special: bool, most: int | None) -> list[list[int]]:
        tokens = []
        for number, text in enumerate(texts):
            try:
                tokens.append(self.text.encode(text, special=special) if most is None else self.text.encode_within(text, most))
            except TextError as error:
                if len(texts) == 1:
                    raise bad_request(str(error), of) from None
                raise bad_request(f"Of {of}[{number}]: {error}.", f"{of}[{number}]") from None
        return tokens

    @asynccontextmanager
    async def answers(
        self,
        request: web.Request,
        prompts: Sequence[list[int]],
        asked: Asked,
        *,
        of: str,
        limits: Limits,
        prediction: Sequence[int] = (),
        calling: Collection[str] | None = None,
    ) -> AsyncIterator[Choices]:
        """Have the engine continue each of `prompts`, the tokens of the body's field `of`; leaving the context frees the slots.

        `prediction` is what the client expects as the answer; `calling` names the tools that the answers may call. Raises
        ApiError, here or while the answers are read: 400 if a prompt is empty, has no room in the context together with
        max_tokens, or cannot be answered in the form that is asked for; 429, 503 and 504 as well.
        """
        self._check_ids("logit_bias", asked.sampling.logit_bias)
        self._check_ids("stop_token_ids", asked.stop_ids)
        arrived = request[ENTRY].arrived
        if asked.constraint is not None:
            left = limits.after(time.perf_counter() - arrived)
            await request.app[CHECKER].check(
                asked.constraint, self._vocabulary, of=asked.form, client=request[CLIENT].name, limits=left
            )
        ready = [connection[1] for connection in ready_ones(self._replicas)] or [self._last()]
        for prompt in prompts:  # before the first of them is answered
            _room(ready[0], asked, prompt, of)
        limits = msgspec.structs.replace(limits.after(time.perf_counter() - arrived), total_seconds=limits.total_seconds)
        start = partial(self._generate, request, asked, of, limits, prediction, calling)
        starts = [[partial(start, prompt, nth) for nth in range(asked.count)] for prompt in prompts]
        async with Choices(starts, sum(each.slots for each in ready)) as choices:
            request[ENTRY].model, request[ENTRY].answer = self.name, choices
            yield choices

    def _last(self) -> Ready:
        """What the engine said of itself that took the last request. Raises ApiError 503 where none has."""
        if self._ready is None:
            raise unavailable("The engine is not ready. Try again in a moment.")
        return self._ready

    @contextmanager
    def _generate(
        self,
        request: web.Request,
        asked: Asked,
        of: str,
        limits: Limits,
        prediction: Sequence[int],
        calling: Collection[str] | None,
        prompt: list[int],
        nth: int,
    ) -> Iterator[Generation]:
        """`limits`: its `total_seconds` are counted from the request's arrival, for all of its answers."""
        client, ready = choose(self._replicas, self._prompts, prompt) or (None, self._last())
        self._ready = ready
        total = limits.after(time.perf_counter() - request[ENTRY].arrived).total_seconds
        room = _room(ready, asked, prompt, of)
        wanted = Generate(
            id="",
            prompt=prompt,
            max_tokens=max(room, 1),
            sampling=asked.nth(nth, self.sampling),
            stop_ids=[*asked.stop_ids, *(() if asked.ignore_eos else self.bundle.stop_ids)],
            min_tokens=asked.min_tokens,
            top_logprobs=asked.top_logprobs,
            prompt_logprobs=asked.prompt_logprobs,
            constraint=asked.constraint,
            speculation=asked.speculation,
            prediction=list(prediction[: ready.context]),
            client=request[CLIENT].name,
            priority=request[CLIENT].priority,
            queue_seconds=limits.queue_seconds,
            total_seconds=total,
        )
        with Attempts(wanted, client, self._other) as answer:
            metrics = self._metrics.of(self.name, self._device(client))
            text = self.text.stream(asked.stops, keep=() if calling is None else self.tools.special)
            parser = None if calling is None else self.tools.parser(calling)
            yield Generation(prompt, request[ENTRY].arrived, answer, text, metrics, parser, silent=not room)

    def _device(self, client: EngineClient | None) -> str:
        """What the engine behind `client` runs on."""
        return next((replica.device for replica in self._replicas if replica.client is client), self._replicas[0].device)

    def _other(self) -> EngineClient | None:
        """An engine for a request that has lost or had none; raises EngineUnavailableError where there will be none."""
        connection = least_busy(self._replicas)
        if connection is None and self.over:
            raise EngineUnavailableError("The engine stopped, and will not be started again. Try again later.")
        return None if connection is None else connection[0]


def _room(ready: Ready, asked: Asked, prompt: list[int], of: str) -> int:
    """The most tokens that the answer may have."""
    context, length = ready.context, len(prompt)
    name, wanted = asked.limit, asked.max_tokens
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
