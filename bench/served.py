"""`engineshed bench serve`: servers that speak OpenAI's completions, over HTTP, in turns."""

import argparse
import asyncio
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp
import msgspec
import uvloop
from rich.console import Console
from rich.markup import escape
from yarl import URL

from bench import arguments, machine, report
from bench.arguments import number
from bench.client import Answer, FailedError, ask, refusal
from bench.launch import Launched, LaunchError
from bench.load import Lengths, Load, LoadError, Request, Shape
from bench.measure import Ratio, Report, Result, percentile

DESCRIPTION = """\
Measure servers over HTTP: any that streams OpenAI's /v1/completions with token ids or text as the prompt.

  engineshed bench serve --url http://127.0.0.1:8000
  engineshed bench serve --start engineshed='engineshed serve --port {port} --slots 32 --context 512' \\
                         --start llama.cpp='llama-server -m model.gguf --port {port} -np 32 -c 16384' --streams 1 8 32

Several servers take turns within every repeat, so that a drift of the machine's speed meets all of them alike; ratios
are of the first one to each other, repeat by repeat.

Closed loop (--streams): every stream asks for its next answer when it has got the last. Open loop (--rate): requests
arrive as a Poisson process whether the server keeps up or not, and times count from the arrival.
"""

EPILOG = """\
Lengths are a number (128), uniform:32-512, or lognormal:128,0.6 (median, sigma; a third number is the greatest).
Answers are greedy, without a repetition penalty and as long as asked where the server knows repetition_penalty and
ignore_eos, whatever the model's own defaults are; what came is counted by the server's own usage.
An event with several tokens counts as that many; where a server does not tell how many, each carries the answer's average.
Every request has a connection of its own, which its time includes.
Failed requests (429, 503, broken streams) are counted and shown; their times are in no figure.
"""

START_SECONDS = 300.0
"""What a started server gets until its first token."""

_NOT_YET = {"no connection", "broken", "503"}
"""Why a server that is starting fails to answer."""

_EXTENSIONS = {
    "ignore_eos": True,
    "repetition_penalty": 1,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
"""What servers know beyond OpenAI's fields: an answer goes on until it has max_tokens (vLLM, SGLang, llama.cpp), a model's own
penalty, which some apply to greedy answers and others do not know, is left out (vLLM, SGLang; llama.cpp, which has another name
for it and passes over this one, has none unless asked), and every event tells the tokens so far (vLLM)."""

_CHANCE = 0.05
"""Share of the prompts' tokens that may have been computed before without having been meant to."""

Body = dict[str, object]


class ServerError(Exception):
    """A server cannot be measured; the message says why."""


@dataclass(frozen=True)
class Target:
    """A server as the command line names it."""

    name: str
    url: URL | None = None
    command: str | None = None
    """Starts it, where it has no address yet."""

    @classmethod
    def at(cls, text: str) -> "Target":
        """From `URL` or `NAME=URL`. Raises ServerError."""
        bare = text.startswith(("http://", "https://"))
        name, _, address = ("", "", text) if bare else text.partition("=")
        try:
            url = URL(address)
        except ValueError:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise ServerError(f"{text} is no address; give one as http://127.0.0.1:8000 or NAME=http://127.0.0.1:8000")
        return cls(name or url.authority, url)

    @classmethod
    def by(cls, text: str) -> "Target":
        """From `NAME=COMMAND`. Raises ServerError."""
        name, _, command = text.partition("=")
        if not name or not command.strip():
            raise ServerError(f"{text!r} names no command; give one as NAME='command --port {{port}}'")
        return cls(name, command=command)


@dataclass
class Server:
    """A server that answers."""

    name: str
    completions: URL
    process: Launched | None = None
    model: str = ""
    as_text: bool = False
    extended: bool = True
    """Whether it takes the fields beyond OpenAI's, `_EXTENSIONS`."""
    start_seconds: float | None = None

    def body(self, request: Request) -> bytes:
        """What is sent for a request."""
        prompt: object = request.text if self.as_text else request.prompt
        body: Body = {"model": self.model, "prompt": prompt, "max_tokens": request.tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.extended:
            body |= _EXTENSIONS
        return msgspec.json.encode(body)


@dataclass
class Run:
    """One load, once, on one server."""

    seconds: float = 0.0
    """From the begin to the end of the last answer."""
    client_seconds: float = 0.0
    """Of a core, spent by this process meanwhile."""
    answers: list[Answer] = field(default_factory=list)
    failures: list[FailedError] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second of whole answers."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def figures(self) -> dict[str, float | None]:
        """What ratios are made of."""
        inter = [gap for answer in self.answers for gap in answer.gaps]
        return {
            "TTFT p50": percentile([answer.first for answer in self.answers], 0.5),
            "ITL p50": percentile(inter, 0.5),
            "ITL p99": percentile(inter, 0.99),
            "tokens/s": self.rate if self.answers else None,
        }


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    whole, positive = number(int, 1), number(float, 1e-3)
    add = parser.add_argument
    add("--url", action="append", default=[], metavar="[NAME=]URL", help="a running server; may be given again")
    add("--start", action="append", default=[], metavar="NAME=COMMAND", help="a server to start, measure and end")
    add("--model", help="the model to ask for (default: the first that the server lists)")
    add(
        "--streams",
        type=whole,
        nargs="+",
        metavar="N",
        help="concurrent streams of closed loops (default: 1 8, or none with --rate)",
    )
    add("--rate", type=positive, nargs="+", default=[], metavar="R", help="requests a second of open loops")
    add("--requests", type=whole, metavar="N", help="a stream, or in all of an open loop (default: 4 a stream)")
    add(
        "--duration",
        type=positive,
        default=30.0,
        metavar="S",
        help="seconds of arrivals in an open loop (default: %(default)g)",
    )
    add("--prompt-tokens", type=_lengths, default=_lengths("128"), metavar="LENGTHS", help="of a prompt (default: %(default)s)")
    add("--tokens", type=_lengths, default=_lengths("64"), metavar="LENGTHS", help="of an answer (default: %(default)s)")
    add(
        "--shared-prefix",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="tokens before them that all prompts begin with (default: 0)",
    )
    add("--text", action="store_true", help="send prompts as text, about a token a word, to servers that take no token ids")
    add(
        "--seed", type=int, default=0, metavar="N", help="another seed asks other prompts at other times (default: %(default)s)"
    )
    add("--repeats", type=whole, default=3, metavar="N", help="turns of each server and load (default: %(default)s)")
    add(
        "--timeout", type=positive, default=120.0, metavar="S", help="seconds until an answer has failed (default: %(default)g)"
    )
    add("--weights", action="append", default=[], metavar="NAME=PATH", help="a server's weights (bytes, file or folder)")
    add("--parameters", type=whole, metavar="N", help="the model's parameters, for prefill's share of the cores' speed")
    add("--json", type=arguments.writable, metavar="FILE", help="write the figures to this file, too")
    add("--page", type=arguments.writable, metavar="FILE", help="write a page with plots to this file, too")


def run(args: argparse.Namespace) -> int:
    """Measure and show; gives the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        targets, loads = _targets(args), _loads(args)
        weights = _weights(args.weights, [target.name for target in targets])
        here = machine.measure()
        with Console(stderr=True).status("starting") as status:
            results, ratios = uvloop.run(_measure(targets, loads, args, status.update))
    except (ServerError, LaunchError, LoadError) as error:
        print(f"engineshed bench serve: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("engineshed bench serve: stopped before its end", file=sys.stderr)
        return 130
    for result in results:
        result.weights = weights.get(result.what)
        # A prefix that is not computed again makes prefill look faster than the cores.
        result.parameters = args.parameters if not args.shared_prefix else None
    whole = Report(here, results, ratios, command=f"engineshed {shlex.join(sys.argv[1:])}  # {loads[0].shape}")
    report.give(whole, console, args.json, args.page)
    return 0


async def _measure(
    targets: list[Target], loads: list[Load], args: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[Result], list[Ratio]]:
    """Every load on every server, in turns; `say` takes what is done now.

    Started servers have ended when this returns, however it does. Raises asyncio.CancelledError where it was told to stop, even
    if something else failed meanwhile: a signal for the bench is often one for its servers, too.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def stop(*_: object) -> None:
        """As asyncio's own for Ctrl-C: at once, and not only when the event loop comes to it."""
        task.cancel()
        loop.call_soon_threadsafe(lambda: None)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return await _take_turns(targets, loads, args, say)
    except Exception:
        if task.cancelling():
            raise asyncio.CancelledError from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


async def _take_turns(
    targets: list[Target], loads: list[Load], args: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[Result], list[Ratio]]:
    """Every load on every server. Raises ServerError or LaunchError."""
    runs: dict[tuple[str, Load], list[Run]] = {}
    rss: dict[tuple[str, Load], int] = {}
    with ExitStack() as stack:
        async with aiohttp.ClientSession(
            # A connection a request: llama-server ends those that it promised to keep, with the next request on its way.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Accept-Encoding": "identity"},
        ) as session:
            servers = [await _reach(stack, session, target, args) for target in targets]
            for load in loads:
                for server in servers:
                    await _ask_all(session, server, load.warm_up(), args.timeout)
            for repeat in range(args.repeats):
                for load in loads:
                    plan = load.plan(args.seed, repeat)
                    # Who goes first changes, so that nobody always follows the same neighbour.
                    for server in [*servers[repeat % len(servers) :], *servers[: repeat % len(servers)]]:
                        key = server.name, load
                        say(f"repeat {repeat + 1} of {args.repeats}: {escape(server.name)}, {load}")
                        runs.setdefault(key, []).append(await _ask_all(session, server, plan, args.timeout))
                        if server.process is not None:
                            server.process.check()
                            rss[key] = server.process.rss
    results = [
        _result(server, load, runs[server.name, load], rss.get((server.name, load))) for load in loads for server in servers
    ]
    first, *others = servers
    return results, [
        ratio
        for load in loads
        for other in others
        for ratio in _ratios(first.name, other.name, load, runs[first.name, load], runs[other.name, load])
    ]


async def _reach(stack: ExitStack, session: aiohttp.ClientSession, target: Target, args: argparse.Namespace) -> Server:
    """A server that has answered once. Raises ServerError or LaunchError."""
    process = stack.enter_context(Launched(target.name, target.command)) if target.command is not None else None
    url = process.url if process is not None else target.url
    assert url is not None
    base = url if url.path.rstrip("/").endswith("/v1") else url / "v1"
    server = Server(target.name, base / "completions", process, as_text=args.text)
    since = process.begun if process is not None else time.perf_counter()
    while True:
        try:
            server.model = args.model or await _first_model(session, base)
            answer = await _first_answer(session, server, since)
        except FailedError as error:
            if process is None or error.cause not in _NOT_YET:
                raise ServerError(f"{target.name} at {url}: {error}") from error
            process.check()
            if time.perf_counter() - since > START_SECONDS:
                raise ServerError(f"{target.name} gave no token within {START_SECONDS:.0f} s: {error}") from error
            await asyncio.sleep(0.02)
            continue
        server.start_seconds = answer.first if process is not None else None
        return server


async def _first_model(session: aiohttp.ClientSession, base: URL) -> str:
    """The id of the first model that a server lists; raises FailedError."""
    try:
        async with asyncio.timeout(30), session.get(base / "models", allow_redirects=False) as response:
            words = await response.text(errors="replace")
            if response.status != 200:
                raise FailedError(str(response.status), f"GET {base / 'models'} gave {response.status}; name a --model")
            return str(msgspec.json.decode(words)["data"][0]["id"])
    except TimeoutError:
        raise FailedError("timed out", "it lists no models within 30 s; name a --model") from None
    except aiohttp.ClientConnectorError as error:
        raise FailedError("no connection", refusal(error)) from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise FailedError("broken", f"the connection broke: {error!r}") from error
    except (msgspec.DecodeError, KeyError, IndexError, TypeError):
        raise FailedError("no model", "it lists no models; name a --model") from None


async def _first_answer(session: aiohttp.ClientSession, server: Server, since: float) -> Answer:
    """Of a short prompt, asked as `server` takes it; raises FailedError."""
    ((request,),) = Load(Shape(Lengths(8, 8), Lengths(2, 2)), 1, streams=1).warm_up()
    try:
        return await ask(session, server.completions, server.body(request), since, START_SECONDS)
    except FailedError as error:
        if error.cause not in ("400", "422"):
            raise
        refused = error
    server.extended = False
    try:
        return await ask(session, server.completions, server.body(request), since, START_SECONDS)
    except FailedError:
        advice = "" if server.as_text else "; if it takes no token ids, add --text"
        raise FailedError(refused.cause, f"{refused}{advice}") from None


async def _ask_all(session: aiohttp.ClientSession, server: Server, plan: list[list[Request]], seconds: float) -> Run:
    """Run a plan's sequences side by side; an answer may take `seconds`."""
    bodies = [[(server.body(request), request.due) for request in sequence] for sequence in plan]
    run = Run()
    begin, used = time.perf_counter(), time.process_time()

    async def work(sequence: list[tuple[bytes, float | None]]) -> None:
        for body, due in sequence:
            since = time.perf_counter() if due is None else begin + due
            if (early := since - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            try:
                run.answers.append(await ask(session, server.completions, body, since, seconds))
            except FailedError as error:
                run.failures.append(error)
            run.seconds = time.perf_counter() - begin

    await asyncio.gather(*map(work, bodies))
    run.client_seconds = time.process_time() - used
    return run


def _result(server: Server, load: Load, runs: list[Run], rss: int | None) -> Result:
    """The figures of a server under a load; raises ServerError if no request of it was answered."""
    answers = [answer for run in runs for answer in run.answers]
    failures = [failure for run in runs for failure in run.failures]
    if not answers:
        raise ServerError(f"{server.name} answered none of {len(failures)} requests at {load}: {failures[0]}")
    return Result(
        server.name,
        load.streams,
        first_tokens=[answer.first for answer in answers],
        inter_tokens=[gap for answer in answers for gap in answer.gaps],
        rates=[run.rate for run in runs if run.answers],
        prompt_tokens=round(median(answer.prompt_tokens for answer in answers)),
        tokens=round(median(answer.tokens for answer in answers)),
        arrivals=load.rate,
        start_seconds=server.start_seconds,
        rss=rss,
        latencies=[answer.whole for answer in answers],
        errors=len(failures),
        cached_share=_cached_share(answers),
        note=_note(load.shape, runs, answers, failures),
    )


def _note(shape: Shape, runs: list[Run], answers: list[Answer], failures: list[FailedError]) -> str:
    """What a reader of the figures must know of how they came about."""
    tokens, events = sum(answer.tokens for answer in answers), sum(answer.events for answer in answers)
    busy, seconds = sum(run.client_seconds for run in runs), sum(run.seconds for run in runs)
    parts = [
        f"{len(answers)} answers of {tokens / len(answers):.0f} tokens, {tokens / events:.2f} an event",
        f"the client used {busy:.2f} s of a core in {seconds:.0f} s",
    ]
    cached = _cached_share(answers)
    if not shape.shared_prefix and cached is not None and cached > _CHANCE:
        parts.append(f"{cached:.0%} of the prompts' tokens had been computed before: ask with another --seed")
    if failures:
        causes = ", ".join(
            f"{count} x {cause}" for cause, count in Counter(failure.cause for failure in failures).most_common()
        )
        parts.append(f"{len(failures)} of {len(failures) + len(answers)} failed: {causes}")
    return "; ".join(parts)


def _cached_share(answers: list[Answer]) -> float | None:
    """Of the prompts' tokens, those computed before; None if the server does not tell."""
    prompted = sum(answer.prompt_tokens for answer in answers)
    cached = [answer.cached_tokens for answer in answers if answer.cached_tokens is not None]
    return sum(cached) / prompted if cached and prompted else None


def _ratios(what: str, against: str, load: Load, ours: Sequence[Run], theirs: Sequence[Run]) -> list[Ratio]:
    """Each figure of one server divided by the other's in the same repeat; repeats in which one has none are left out."""
    ratios = []
    for figure in Run().figures:
        pairs = [(mine.figures[figure], other.figures[figure]) for mine, other in zip(ours, theirs, strict=True)]
        values = [a / b for a, b in pairs if a and b]
        if values:
            ratios.append(Ratio(what, against, load.streams, figure, values, arrivals=load.rate))
    return ratios


def _targets(args: argparse.Namespace) -> list[Target]:
    targets = [*map(Target.by, args.start), *map(Target.at, args.url)]
    if not targets:
        raise ServerError(
            "there is nothing to measure; add --url http://127.0.0.1:8000 or --start NAME='command --port {port}'"
        )
    twice = [name for name, count in Counter(target.name for target in targets).items() if count > 1]
    if twice:
        raise ServerError(f"two servers are called {twice[0]}; give them names as NAME=URL")
    return targets


def _loads(args: argparse.Namespace) -> list[Load]:
    """What is asked for, in order; raises LoadError."""
    shape = Shape(args.prompt_tokens, args.tokens, args.shared_prefix)
    streams = args.streams or ([] if args.rate else [1, 8])
    closed = [Load(shape, args.requests or 4, streams=count) for count in streams]
    open_ = [Load(shape, args.requests or max(1, round(rate * args.duration)), rate=rate) for rate in args.rate]
    return list(dict.fromkeys(closed + open_))


def _weights(given: list[str], names: list[str]) -> dict[str, int]:
    """Bytes by server, from `NAME=BYTES` or `NAME=PATH`; raises ServerError."""
    found = {}
    for text in given:
        name, _, size = text.partition("=")
        path = Path(size)
        if name not in names or not size:
            raise ServerError(
                f"--weights {text} names no server; give it as NAME=PATH, where NAME is one of {', '.join(names)}"
            )
        if size.isdecimal():
            found[name] = int(size)
        elif path.exists():
            files = [path] if path.is_file() else path.rglob("*")
            found[name] = sum(file.stat().st_size for file in files if file.is_file())
        else:
            raise ServerError(f"--weights {text}: there is no {path}")
    return found


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except LoadError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
