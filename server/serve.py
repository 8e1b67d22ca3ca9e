"""`engineshed serve`: its command line, and the engines' processes, which load while this one imports what HTTP needs."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from runtime import bundle as bundles
from runtime import devices, logs
from runtime.bundle import MANIFEST, Bundle, BundleError, Variant
from runtime.devices import Device, DeviceError
from server import settings
from server.doors import Doors, Limits
from server.process import EngineProcess, ServeError, command

CONTEXT = 4096
"""Tokens a slot holds unless the model has fewer or the command line says otherwise: memory grows with it."""
CPU_SLOTS = 8
"""Slots of a worker on the CPU unless the command line says otherwise; on a GPU its free memory decides."""

log = logging.getLogger("engineshed")


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = "Serve an engine bundle over HTTP, with OpenAI's API and a plainer one of its own."
    parser.epilog = "Stop it with Ctrl-C or SIGTERM: running answers get 10 seconds to finish, a second signal ends them."
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        action=settings.FromToml,
        help="a TOML file with these options as its keys; what stands after it on the command line has the last word",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 takes a free one (default: %(default)s)")
    parser.add_argument("--model", help="a bundle's name, or its folder (default: the first in --engines)")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")
    parser.add_argument(
        "--device",
        metavar="LIST",
        type=_devices,
        default="cpu",
        help="cpu or cuda:N; several, as cuda:0,cuda:1, run an engine each and share the load (default: %(default)s)",
    )
    parser.add_argument("--variant", help="engine to run, e.g. cpu-int4 (default: the best that --device runs)")
    parser.add_argument(
        "--slots",
        type=_positive,
        help=f"requests that run at once on each device (default: {CPU_SLOTS} on a CPU, what its memory has room for on a GPU)",
    )
    parser.add_argument(
        "--context", type=_positive, help=f"tokens of prompt and answer together (default: the model's own, at most {CONTEXT})"
    )
    parser.add_argument(
        "--queue",
        type=_not_negative,
        default=64,
        help="requests that may wait for a slot of each device; more get status 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--queue-tokens",
        type=_not_negative,
        help="tokens, of prompts and of answers at their longest, that may wait likewise (default: 8 x what the slots hold)",
    )
    parser.add_argument(
        "--queue-seconds",
        type=_seconds,
        default=0,
        help="how long a request may wait for a slot; then it gets status 504 (default: as long as its client)",
    )
    parser.add_argument(
        "--total-seconds",
        type=_seconds,
        default=0,
        help="how long a request may take altogether (default: as long as its client)",
    )
    parser.add_argument(
        "--no-speculation", action="store_true", help="never guess tokens to verify several at a time, whatever a request says"
    )
    parser.add_argument("--draft", metavar="BUNDLE", help="a smaller model with the same tokenizer, to guess tokens with")
    parser.add_argument("--draft-variant", metavar="VARIANT", help="its engine (default: the best that --device runs)")
    parser.add_argument(
        "--gpu-memory", metavar="SHARE", type=_share, help="most of a GPU's memory that an engine takes, up to 1 (default: 0.9)"
    )
    parser.add_argument("--build-on-load", action="store_true", help="build a TensorRT engine for this GPU where there is none")
    parser.add_argument(
        "--provider",
        choices=["cuda", "tensorrt", "tensorrt-rtx"],
        help="ONNX Runtime's provider that runs a cuda variant (default: cuda)",
    )
    parser.add_argument(
        "--keys", metavar="FILE", type=Path, help="API keys that are taken, see: engineshed keys (default: none needed)"
    )
    parser.add_argument("--protect-metrics", action="store_true", help="/metrics needs a key as well")
    parser.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="let web pages of https://example.org, or of * any, read answers; may be repeated (default: none)",
    )
    parser.add_argument("--tls-cert", metavar="FILE", type=Path, help="PEM certificate with its chain; HTTPS instead of HTTP")
    parser.add_argument("--tls-key", metavar="FILE", type=Path, help="its PEM key")
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="of each line (default: %(default)s)")
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="least important line to log (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; gives the exit code."""
    logs.setup(args.log_level, args.log_format)
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
    variant = bundle.for_device(args.device[0].kind, args.variant)
    workers = commands(args, folder, bundle, variant)
    log.info("loading %s (%s) on %s", bundle.name, variant.name, ", ".join(workers))
    with ExitStack() as stack:
        processes = {name: stack.enter_context(EngineProcess(worker)) for name, worker in workers.items()}
        from server import listening  # which imports aiohttp, tokenizers and more

        limits = Limits(args.queue_seconds, args.total_seconds)
        listening.run(doors(args), limits, folder, bundle, variant, processes, stops)


def doors(args: argparse.Namespace) -> Doors:
    """Where `args` has the server listen, and whom it lets in. Raises ServeError."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ServeError("--tls-cert and --tls-key go together: a certificate, and the key that belongs to it")
    return Doors(
        host=args.host,
        port=args.port,
        keys=args.keys,
        protect_metrics=args.protect_metrics,
        origins=frozenset(args.cors_origin),
        certificate=args.tls_cert,
        certificate_key=args.tls_key,
    )


def commands(args: argparse.Namespace, folder: Path, bundle: Bundle, variant: Variant) -> dict[str, list[str]]:
    """The worker's command line for each device in `args`, by what log and metrics call it. Raises BundleError."""
    longest = bundle.longest(variant)
    context = args.context or min(CONTEXT, longest)
    if context > longest:
        raise BundleError(f"{variant.name} of bundle {bundle.name!r} is made for {longest} tokens; --context {context} is more")
    on_cpu, threads = variant.target == "cpu", None
    if on_cpu and len(args.device) > 1:  # Workers with as many threads as cores each would wait for each other in every step.
        threads = max(1, devices.cpu().cores // len(args.device))
    shared = command(
        folder,
        variant.name,
        slots=args.slots or (CPU_SLOTS if on_cpu else None),
        context=context,
        queue=args.queue,
        queue_tokens=args.queue_tokens,
        threads=threads,
        no_speculation=args.no_speculation,
        draft=None if args.draft is None else choose(args.engines, args.draft)[0],
        draft_variant=args.draft_variant,
        gpu_memory=args.gpu_memory,
        build_on_load=args.build_on_load,
        provider=args.provider,
        log_level=args.log_level,
        log_format=args.log_format,
    )
    return {name: [*shared, f"--device={device}"] for name, device in zip(_names(args.device), args.device, strict=True)}


def _names(wanted: Sequence[Device]) -> list[str]:
    """Each device, with a number where it has several workers: cpu#1, cpu#2."""
    names = [str(device) for device in wanted]
    return [
        name if names.count(name) == 1 else f"{name}#{names[:place].count(name)}" for place, name in enumerate(names, start=1)
    ]


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


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return share


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no length of time; give seconds from 0 on, 0 for no limit")
    return seconds


def _devices(text: str) -> tuple[Device, ...]:
    try:
        found = devices.parse_list(text)
    except DeviceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len({device.kind for device in found}) > 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} mixes CPU and GPU: they run different variants, which answer differently and at very different speeds; "
            "name devices of one kind, or start a second server with another --port"
        )
    return found


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
