"""`engineshed bench`: an engine in this process, or a server at an address."""

import argparse
import asyncio
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench import engine, served
from bench.measure import Result
from runtime.bundle import BundleError
from runtime.engine import EngineError

DESCRIPTION = """\
Measure latency and throughput.

Without --url: the engines of a bundle, in this process. Variants take turns within every repeat, so that a drift of the
machine's speed meets all of them alike. With --url: a server that speaks OpenAI's completions, over HTTP.

TTFT is the time to the first token; ITL the time between two tokens of one stream; tok/s counts all streams. The limit is
the time that reading the weights once takes at the memory bandwidth measured in the same run.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the bundle's name (default: %(default)s)")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")
    parser.add_argument("--variant", nargs="+", help="variants to measure (default: every cpu variant of the bundle)")
    parser.add_argument("--url", help="measure the server at this address instead, as http://127.0.0.1:8000")
    parser.add_argument("--streams", type=_at_least(1), nargs="+", default=[1, 8], help="concurrent streams (default: 1 8)")
    parser.add_argument("--prompt-tokens", type=_at_least(1), default=128, help="length of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=_at_least(2), default=64, help="length of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=_at_least(1), default=3, help="runs of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")


def run(args: argparse.Namespace) -> int:
    """Measure and show; gives the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        if args.url is not None:
            results = asyncio.run(
                served.measure(args.url, args.model, args.streams, args.prompt_tokens, args.tokens, args.repeats)
            )
        else:
            bandwidth = engine.read_bandwidth()
            console.print(f"memory reads at {bandwidth / 1e9:.1f} GB/s with all cores")
            results = engine.measure(
                args.engines / args.model, args.variant, args.streams, args.prompt_tokens, args.tokens, args.repeats, bandwidth
            )
    except (BundleError, EngineError, served.ServerError) as error:
        print(f"engineshed bench: {error}", file=sys.stderr)
        return 1
    console.print(table(results))
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode({"machine": machine(), "results": results}), indent=2))
    return 0


def _at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number, `least` or more."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


def machine() -> str:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return f"{processor}, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def table(results: list[Result]) -> Table:
    """The figures, medians over the repeats."""
    shown = Table(title=machine())
    for column in ("what", "streams", "TTFT ms", "ITL p50 ms", "p90", "p99", "tok/s", "of the limit", "perplexity"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for result in results:
        p50, p90, p99 = (result.inter_token(share) * 1e3 for share in (0.5, 0.9, 0.99))
        limit = "" if result.limit is None else f"{result.limit * 1e3 / p50:.0%}"
        perplexity = "" if result.perplexity is None else f"{result.perplexity:.2f}"
        figures = (
            f"{result.first_token * 1e3:.1f}",
            f"{p50:.1f}",
            f"{p90:.1f}",
            f"{p99:.1f}",
            f"{result.tokens_per_second:.1f}",
        )
        shown.add_row(result.what, str(result.streams), *figures, limit, perplexity)
    return shown
