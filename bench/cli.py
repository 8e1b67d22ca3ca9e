"""`engineshed bench`: engines in processes of their own, in turns with their peers; or, with `serve`, servers over HTTP."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer

from bench import arguments, engine, machine, report, served
from bench.arguments import number
from bench.engine import DriverError, Load
from bench.measure import Report, Result
from bench.peers import catalog
from runtime import bundle
from runtime.bundle import Bundle, BundleError

DESCRIPTION = """\
Measure latency and throughput.

Every variant of a bundle, and every installed peer with the same model, is loaded in a process of its own. They get the same
prompts in turns within every repeat, so that a drift of the machine's speed meets all of them alike. `engineshed bench serve`
measures servers over HTTP.

TTFT is the time to the first token; ITL the time between two tokens of one stream; tok/s counts all streams, prefill
included. Shares are of the limits that this run measured: memory's bandwidth for the weights that a token reads, and the
cores' float32 speed for a prompt's products.
"""

TEXT = Path(__file__).parents[1] / "tests" / "data" / "perplexity.txt"
TEXT_TOKENS, WINDOW = 2048, 1024
"""As export measures perplexity, so that the figures compare with the manifest's."""

QUIET = 0.03
"""Share of all cores' time that others may take before a line warns of it."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="the bundle's name (default: %(default)s)")
    add("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")
    add("--variant", nargs="+", help="variants to measure (default: every cpu variant of the bundle)")
    add("--peers", nargs="+", metavar="NAME", help="llama, genai, openvino, transformers, all or none (default: the installed)")
    add("--url", help="measure the server at this address instead, as `engineshed bench serve` does")
    add("--streams", type=number(int, 1), nargs="+", default=[1, 8], help="concurrent streams (default: 1 8)")
    add("--prompt-tokens", type=number(int, 1), default=128, help="length of a prompt (default: %(default)s)")
    add("--tokens", type=number(int, 2), default=64, help="length of an answer (default: %(default)s)")
    add("--repeats", type=number(int, 1), default=3, help="runs of each measurement (default: %(default)s)")
    add("--json", type=arguments.writable, help="write the figures to this file, too")
    add("--page", type=arguments.writable, help="write a page with plots to this file, too")
    # `serve` has a command line of its own.
    served_parser = parser.add_subparsers(metavar="serve").add_parser("serve", help="measure servers over HTTP")
    served.configure(served_parser)
    served_parser.set_defaults(measure=served.run)
    parser.set_defaults(measure=_run_engines)


def run(args: argparse.Namespace) -> int:
    """Measure and show; gives the exit code."""
    measure: Callable[[argparse.Namespace], int] = args.measure
    return measure(args)


def _run_engines(args: argparse.Namespace) -> int:
    if args.url is not None:
        return served.run(_as_served(args))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    try:
        whole = _measured(args, lambda line: console.print(line, style="dim", markup=False))
    except (BundleError, DriverError, ValueError) as error:
        print(f"engineshed bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("engineshed bench: stopped before its end", file=sys.stderr)
        return 130
    report.give(whole, console, args.json, args.page)
    return 0


def _as_served(args: argparse.Namespace) -> argparse.Namespace:
    """The command line of `bench serve` that asks the server at --url the same."""
    parser = argparse.ArgumentParser()
    served.configure(parser)
    given = ["--url", args.url, "--model", args.model, "--streams", *map(str, args.streams)]
    given += ["--prompt-tokens", str(args.prompt_tokens), "--tokens", str(args.tokens), "--repeats", str(args.repeats)]
    for name in ("json", "page"):
        given += [f"--{name}", str(path)] if (path := getattr(args, name)) is not None else []
    return parser.parse_args(given)


def _measured(args: argparse.Namespace, say: Callable[[str], None]) -> Report:
    """Raises BundleError, DriverError, and ValueError at arguments that do not go together."""
    folder: Path = args.engines / args.model
    manifest = bundle.read(folder)
    own = [catalog.own(folder, variant.name) for variant in engine.variants(manifest, args.variant)]
    if not own:
        raise ValueError(f"bundle {manifest.name!r} has no variant for the cpu; build one with: engineshed export")
    if args.prompt_tokens + args.tokens > manifest.max_length:
        raise ValueError(f"{args.prompt_tokens} + {args.tokens} tokens are more than the model's {manifest.max_length}")
    peers, missing = catalog.chosen(args.peers or ["all"], manifest)
    for line in missing:
        say(line)
    load = Load(tuple(dict.fromkeys(args.streams)), args.prompt_tokens, args.tokens, args.repeats, machine.cores())
    here = machine.measure()
    results, ratios, here.others = engine.measure(own, peers, load, manifest.vocab_size, windows(folder, manifest), say)
    if here.others > QUIET:
        say(f"other processes took {here.others:.0%} of the cores meanwhile: the figures are worse than this machine's")
    _complete(results, folder, manifest)
    return Report(here, results, ratios, command=f"engineshed {shlex.join(sys.argv[1:])}")


def windows(folder: Path, manifest: Bundle) -> list[list[int]]:
    """The tokens that perplexity is measured on, cut as export cuts them; none where the text is not there."""
    if not TEXT.exists():
        return []
    tokenizer = Tokenizer.from_file(str(folder / bundle.TOKENIZER))
    tokens = [token for token in tokenizer.encode(TEXT.read_text()).ids if token < manifest.vocab_size][:TEXT_TOKENS]
    length = min(WINDOW, manifest.max_length)
    cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [window for window in cut if len(window) > 1]


def _complete(results: list[Result], folder: Path, manifest: Bundle) -> None:
    """Add what the bundle knows of the model: its products' size, and transformers' perplexity."""
    size = engine.parameters(folder, manifest)
    known = [v.perplexity for v in manifest.variants if v.perplexity and v.perplexity.text == TEXT.name]
    reference = next((perplexity.reference for perplexity in known if perplexity.tokens == TEXT_TOKENS), None)
    for result in results:
        result.parameters = size
        result.reference_perplexity = reference
