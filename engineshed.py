"""The command: `engineshed export | serve | chat | top | bench | engines | keys | devices`.

Each subcommand lives in its own house and is imported when it is chosen, so that serving never waits for torch.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast


class House(Protocol):
    """The module behind a subcommand."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Describe the subcommand and its arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it; gives the exit code."""
        ...


@dataclass(frozen=True)
class Command:
    """A subcommand, before it is imported."""

    module: str
    help: str
    extra: str | None = None
    """The distribution's extra that brings what the module imports."""


COMMANDS = {
    "export": Command("export.cli", "compile a Hugging Face model into an engine bundle", extra="export"),
    "serve": Command("server.serve", "serve bundles over HTTP"),
    "chat": Command("server.chat", "chat with a running server in the terminal"),
    "bench": Command("bench.cli", "measure an engine's or a server's latency and throughput"),
    "engines": Command("server.engines", "list the bundles that have been built"),
    "keys": Command("server.keys_cli", "make, list and remove the server's API keys"),
    "top": Command("server.top", "show what a running server does, live"),
    "devices": Command("server.devices", "show the CPU, the GPUs, and what can run on them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; gives the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        _usage().parse_args(arguments or ["--help"])
    name, command = arguments[0], COMMANDS[arguments[0]]
    parser = argparse.ArgumentParser(prog=f"engineshed {name}")
    try:
        house = cast(House, importlib.import_module(command.module))
        house.configure(parser)
        return house.run(parser.parse_args(arguments[1:]))
    except ModuleNotFoundError as error:
        if command.extra is None:
            raise
        print(
            f"engineshed {name}: {error.name} is not installed; run: pip install 'engineshed[{command.extra}]'", file=sys.stderr
        )
        return 1


def _usage() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="engineshed",
        description="Compile Hugging Face language models into engines and serve them over HTTP.",
        epilog="\n".join(["commands:", *(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())])
        + "\n\nengineshed COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
