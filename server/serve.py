"""`engineshed serve`: its command line, and the engine's process, which loads while this one imports what HTTP needs."""

import argparse
import logging
import signal
import sys
from pathlib import Path

from runtime import bundle as bundles
from runtime.bundle import MANIFEST, Bundle, BundleError
from server.process import EngineProcess, ServeError, command

CONTEXT = 4096
"""Tokens a slot holds unless the model has fewer or the command line says otherwise: memory grows with it."""

log = logging.getLogger("engineshed")


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = "Serve an engine bundle over HTTP, with OpenAI's API and a plainer one of its own."
    parser.epilog = "Stop it with Ctrl-C or SIGTERM: running answers get 10 seconds to finish, a second signal ends them."
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 takes a free one (default: %(default)s)")
    parser.add_argument("--model", help="a bundle's name, or its folder (default: the first in --engines)")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")
    parser.add_argument("--variant", help="engine to run, e.g. cpu-int4 (default: the smallest for this machine's CPU)")
    parser.add_argument("--slots", type=_positive, default=8, help="requests that run at once (default: %(default)s)")
    parser.add_argument(
        "--context", type=_positive, help=f"tokens of prompt and answer together (default: the model's own, at most {CONTEXT})"
    )
    parser.add_argument(
        "--queue",
        type=_not_negative,
        default=64,
        help="requests that may wait for a slot; more get status 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--no-speculation", action="store_true", help="never guess tokens to verify several at a time, whatever a request says"
    )
    parser.add_argument("--draft", metavar="BUNDLE", help="a smaller model with the same tokenizer, to guess tokens with")
    parser.add_argument("--draft-variant", metavar="VARIANT", help="its engine (default: the smallest for this machine's CPU)")
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="least important line to log (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; gives the exit code."""
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        _serve(args)
    except (BundleError, ServeError) as error:
        print(f"engineshed serve: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(args: argparse.Namespace) -> None:
    stops: list[int] = []  # Signals that come before the event loop listens to them: they are to interrupt nothing half done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stops.append(number))
    folder, bundle = choose(args.engines, args.model)
    variant = bundle.variant(args.variant)
    context = args.context or min(CONTEXT, bundle.max_length)
    if context > bundle.max_length:
        raise BundleError(f"bundle {bundle.name!r} is made for {bundle.max_length} tokens; --context {context} is more")
    log.info("loading %s (%s)", bundle.name, variant.name)
    draft = None if args.draft is None else choose(args.engines, args.draft)[0]
    worker = command(
        folder,
        variant.name,
        slots=args.slots,
        context=context,
        queue=args.queue,
        no_speculation=args.no_speculation,
        draft=draft,
        draft_variant=args.draft_variant,
        log_level=args.log_level,
    )
    with EngineProcess(worker) as first:
        from server import listening  # which imports aiohttp, tokenizers and more

        listening.run(args.host, args.port, folder, bundle, variant, worker, first, stops)


def choose(engines: Path, model: str | None) -> tuple[Path, Bundle]:
    """The bundle that is meant by `model`, a folder or a name in `engines`; None takes the first. Raises BundleError."""
    if model is not None and (Path(model) / MANIFEST).is_file():
        folder = Path(model)
    else:
        found = bundles.scan(engines)
        if not found:
            raise BundleError(f"there is no engine bundle in {engines}; build one with: engineshed export")
        name = next(iter(found)) if model is None else model
        if name not in found:
            raise BundleError(
                f"there is no bundle {name!r} in {engines}, which has {', '.join(found)}; see: engineshed engines"
            )
        folder = engines / name
    return folder, bundles.read(folder)


def _positive(text: str) -> int:
    return _between(text, 1)


def _not_negative(text: str) -> int:
    return _between(text, 0)


def _port(text: str) -> int:
    return _between(text, 0, 65535)


def _between(text: str, least: int, most: int | None = None) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    if most is not None and number > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}")
    return number
