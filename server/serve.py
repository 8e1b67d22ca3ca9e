"""`engineshed serve`: from the command line to a supervisor and its processes."""

import argparse
import asyncio
import functools
import os
import signal
import sys
from pathlib import Path

import msgspec

from runtime import devices, logs
from runtime.bundle import BundleError
from runtime.devices import DeviceError
from server import listen
from server.doors import Doors, Limits, Settings
from server.options import configure
from server.supervision import fronts
from server.supervision.catalog import Catalog, Entry
from server.supervision.launch import Common, ModelOptions, named, seats
from server.supervision.models import Rules
from server.supervision.process import ServeError
from server.supervision.supervisor import Plan, Supervisor

__all__ = ["common", "configure", "doors", "plan", "run"]


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; gives the exit code."""
    logs.setup(args.log_level, args.log_format)
    try:
        _serve(args)
    except (BundleError, DeviceError, ServeError) as error:
        print(f"engineshed serve: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(args: argparse.Namespace) -> None:
    stops: list[int] = []  # Signals that come before the event loop listens to them: they are to interrupt nothing half done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stops.append(number))
    with listen.reserve(args.host, args.port) as held:
        asyncio.run(Supervisor(plan(args, held.getsockname()[1])).run(stops))


def plan(args: argparse.Namespace, port: int) -> Plan:
    """What `args` has the supervisor keep, with the HTTP processes on `port`. Raises BundleError, DeviceError, ServeError."""
    catalog = Catalog(args.engines, named(args.model))
    preload = [_name(catalog, model) for model in args.model]
    if not preload:
        preload = [name for name, entry in catalog.entries.items() if isinstance(entry, Entry)][:1] or [""]
    for name in preload:
        catalog.find(name)  # whoever starts the server is to be told at once
    unknown = [name for name in args.models if name not in catalog.entries]
    if unknown:
        raise ServeError(f"{args.config} has options for a model {unknown[0]!r}, which is none of {', '.join(catalog.entries)}")
    inside = doors(args, port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    rules = Rules(
        catalog=catalog,
        seats=seats(args.device, args.memory, args.gpu_memory or devices.GPU_MEMORY),
        common=common(args),
        preload=preload,
        drain_seconds=args.drain_seconds,
        silence=args.watchdog_seconds,
    )
    url = f"{'http' if inside.certificate is None else 'https'}://{host}:{port}"
    return Plan(rules, args.http_processes, functools.partial(_front, args, inside), url)


def doors(args: argparse.Namespace, port: int) -> Doors:
    """Where `args` has the server listen, and whom it lets in. Raises ServeError."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ServeError("--tls-cert and --tls-key go together: a certificate, and the key that belongs to it")
    return Doors(
        host=args.host,
        port=port,
        keys=_text(args.keys),
        protect_metrics=args.protect_metrics,
        origins=tuple(origin.strip() for text in args.cors_origin for origin in text.split(",")),
        certificate=_text(args.tls_cert),
        certificate_key=_text(args.tls_key),
        admin_socket=_text(args.admin_socket),
    )


def _front(args: argparse.Namespace, inside: Doors, name: str, supervisor: str) -> list[str]:
    """The command line of an HTTP process."""
    alone = inside if name == "http-0" else msgspec.structs.replace(inside, admin_socket=None)
    settings = Settings(
        name=name,
        supervisor=supervisor,
        parent=os.getpid(),
        doors=alone,
        limits=Limits(args.queue_seconds, args.total_seconds),
        drain_seconds=args.drain_seconds,
        waiting=args.queue,
        log_level=args.log_level,
        log_format=args.log_format,
    )
    return fronts.command(msgspec.json.encode(settings).decode())


def common(args: argparse.Namespace) -> Common:
    """What `args` says of engines."""
    options = ModelOptions(
        replicas=args.replicas,
        variant=args.variant,
        slots=args.slots,
        context=args.context,
        draft=args.draft,
        draft_variant=args.draft_variant,
        generation_config=args.generation_config,
        sampling=args.override_generation_config,
    )
    worker: dict[str, str | float | bool | None] = {
        "queue": args.queue,
        "queue_tokens": args.queue_tokens,
        "no_speculation": args.no_speculation,
        "gpu_memory": args.gpu_memory,
        "build_on_load": args.build_on_load,
        "provider": args.provider,
        "log_level": args.log_level,
        "log_format": args.log_format,
    }
    return Common(options, worker, args.models)


def _name(catalog: Catalog, model: str) -> str:
    """What the catalog calls `model`, a name or a folder."""
    folder = Path(model)
    entries = [entry for entry in catalog.entries.values() if isinstance(entry, Entry)]
    return next((entry.name for entry in entries if entry.folder == folder), model)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
