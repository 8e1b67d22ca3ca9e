"""`engineshed serve`: the engines' processes, which load while this one imports what HTTP needs."""

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
from runtime.devices import Device
from server.doors import Doors, Limits
from server.options import CONTEXT, CPU_SLOTS, configure
from server.process import EngineProcess, ServeError, command

__all__ = ["choose", "commands", "configure", "doors", "run"]

log = logging.getLogger("engineshed")


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
        origins=frozenset(origin.strip() for text in args.cors_origin for origin in text.split(",")),
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
