"""`engineshed chat`: a conversation in the terminal, with a server that runs."""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from yarl import URL

from runtime.bundle import SamplingDefaults
from server import client_key
from server.api.openai.answers import ChatChunk, Model, ModelList
from server.asked import SILENT
from server.errors import ErrorBody

HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


class ChatError(Exception):
    """The server did not answer; the message is for the person at the terminal."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = f"Chat with a running server: {HELP}. An API key is taken from {client_key.VARIABLE}."
    parser.add_argument("--url", type=_address, default=URL("http://127.0.0.1:8000"), help="the server (default: %(default)s)")
    parser.add_argument("--model", help="model to ask for (default: the server's first)")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token (default: the model's)")
    parser.add_argument("--max-tokens", type=int, help="most tokens of one answer (default: what the context has room for)")
    parser.add_argument("--seed", type=int, help="the same seed and conversation give the same answer (default: random)")


def run(args: argparse.Namespace) -> int:
    """Talk until the person leaves; gives the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    errors = Console(highlight=False, soft_wrap=True, stderr=True)
    try:
        model = asyncio.run(_model(args.url, args.model))
    except ChatError as error:
        errors.print(f"engineshed chat: {error}", markup=False)
        return 1
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing and history
    wishes = {"temperature": args.temperature, "max_tokens": args.max_tokens, "seed": args.seed}
    given = {name: wish for name, wish in wishes.items() if wish is not None}
    conversation = Conversation(args.url, model.id, args.system, given)
    console.print(f"[bold]{model.id}[/bold] at {args.url}{_drawing(model, args.temperature)}. {HELP}.")
    while (line := _read(console)) is not None:
        match line.strip():
            case "":
                pass
            case "/exit" | "/quit":
                break
            case "/clear":
                conversation.clear()
                console.print("The conversation is forgotten.", style="dim")
            case command if command.startswith("/"):
                console.print(f"There is no {command.split()[0]}: {HELP}.", style="dim", markup=False)
            case text:
                _answer(console, conversation, text)
    return 0


class Conversation:
    """What has been said, and the server that says the next thing."""

    def __init__(self, url: URL, model: str, system: str | None, wishes: dict[str, Any]) -> None:
        self._url = url / "v1/chat/completions"
        self._fixed = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **wishes}
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self._turns: list[dict[str, str]] = []
        self.tokens = 0
        """Of the last answer, as far as the server said."""

    def clear(self) -> None:
        """Forget all but the system prompt."""
        self._turns = []

    async def say(self, text: str) -> AsyncIterator[str]:
        """The answer to `text`, piece by piece; raises ChatError. Left early, what has come of it stays said."""
        asked = [*self._turns, {"role": "user", "content": text}]
        answer = ""
        self.tokens = 0
        body = {**self._fixed, "messages": [*self._system, *asked]}
        try:
            async for chunk in _chunks(self._url, body):
                if chunk.usage:
                    self.tokens = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    if choice.delta.content:
                        answer += choice.delta.content
                        yield choice.delta.content
        finally:
            if answer:
                self._turns = [*asked, {"role": "assistant", "content": answer}]


def _read(console: Console) -> str | None:
    """A line from the person, "" after Ctrl-C, or None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except KeyboardInterrupt:
        console.print()
        return ""
    except EOFError:
        return None


def _answer(console: Console, conversation: Conversation, text: str) -> None:
    async def show() -> None:
        async for piece in conversation.say(text):
            console.print(piece, end="", markup=False)

    begin = time.perf_counter()
    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
        return
    except ChatError as error:
        console.print(f"\n{error}", style="red", markup=False)
        return
    seconds = time.perf_counter() - begin
    console.print(f"\n{conversation.tokens} tokens in {seconds:.1f} s", style="dim")


def _drawing(model: Model, temperature: float | None) -> str:
    """How the model's tokens are drawn, as far as it is not the plainest way; `temperature` is the person's own."""
    if model.sampling is None:
        return ""
    used = SamplingDefaults(temperature=temperature).over(model.sampling)
    values = msgspec.structs.asdict(used)
    told = [f"{name} {value:g}" for name, value in values.items() if name == "temperature" or value != getattr(SILENT, name)]
    if used.temperature == 0:  # of what is left, only the penalty still decides what that is
        told = ["always the likeliest token", *(part for part in told if part.startswith("repetition_penalty"))]
    return f", {', '.join(told)}"


async def _model(url: URL, wanted: str | None) -> Model:
    """The model called `wanted`, or the first that answers, as the server describes it. Raises ChatError."""
    try:
        async with aiohttp.ClientSession(headers=client_key.headers()) as session, session.get(url / "v1/models") as response:
            body = await response.read()
            if response.status == 401:
                raise ChatError(f"{url} needs an API key; put it into the variable {client_key.VARIABLE}")
            if response.status != 200:
                raise ChatError(f"{url} answered with status {response.status}; is it an engineshed server?")
            models = msgspec.json.decode(body, type=ModelList).data
            if not models:
                raise ChatError(f"{url} has no model; export one, see: engineshed export --help")
            if wanted is None:
                return next((model for model in models if model.task == "text-generation"), models[0])
            named = [model for model in models if model.id == wanted]
            if not named:
                raise ChatError(f"{url} has no model {wanted!r}; it has {', '.join(model.id for model in models)}")
            return named[0]
    except msgspec.DecodeError:
        raise ChatError(f"{url} does not list its models; is it an engineshed server?") from None
    except aiohttp.ClientError:
        raise ChatError(_unreachable(url)) from None


async def _chunks(url: URL, body: dict[str, Any]) -> AsyncIterator[ChatChunk]:
    """The events of a streamed chat completion."""
    timeout = aiohttp.ClientTimeout(total=None)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=client_key.headers()) as session,
            session.post(url, json=body) as response,
        ):
            if response.status != 200:
                raise ChatError(_message(await response.read()))
            failed = False
            async for line in response.content:
                failed = failed or line.startswith(b"event: error")
                data = line.removeprefix(b"data: ").strip() if line.startswith(b"data: ") else b""
                if failed and data:
                    raise ChatError(_message(data))
                if data and data != b"[DONE]":
                    yield msgspec.json.decode(data, type=ChatChunk)
    except aiohttp.ClientConnectorError:
        raise ChatError(_unreachable(url.origin())) from None
    except aiohttp.ClientError as error:
        raise ChatError(f"The connection broke: {error}") from None


def _message(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=ErrorBody).error.message
    except msgspec.DecodeError:
        return f"The server answered with: {body[:200].decode(errors='replace')}"


def _address(text: str) -> URL:
    url = URL(text)
    if not url.absolute:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give one as http://127.0.0.1:8000")
    return url


def _unreachable(url: URL) -> str:
    return f"no server answers at {url}; start one with: engineshed serve"
