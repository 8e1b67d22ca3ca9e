"""`engineshed keys`: the API keys that a server takes."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from server import keys
from server.keys import LEAST_PRIORITY, MOST_PRIORITY, Key, KeysError


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = "Add, list and remove the API keys of a server, which reads them at its start and on SIGHUP."
    actions = parser.add_subparsers(dest="action", required=True)
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--file", type=Path, default=Path("keys.toml"), help="the keys' file (default: %(default)s)")
    add = actions.add_parser("add", parents=[file], help="make a key and show it, this once")
    add.add_argument("name", help="whose key it is: shown in logs")
    add.add_argument(
        "--priority",
        type=int,
        default=0,
        help=f"from {LEAST_PRIORITY} to {MOST_PRIORITY}, a smaller one is served sooner (default: 0)",
    )
    add.add_argument("--admin", action="store_true", help="open /admin to it")
    actions.add_parser("list", parents=[file], help="show the names")
    remove = actions.add_parser("remove", parents=[file], help="make a key invalid")
    remove.add_argument("name")


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    try:
        match args.action:
            case "add":
                _add(args.file, args.name, args.priority, args.admin)
            case "remove":
                _remove(args.file, args.name)
            case _:
                _list(args.file)
    except KeysError as error:
        print(f"engineshed keys: {error}", file=sys.stderr)
        return 1
    return 0


def _add(path: Path, name: str, priority: int, admin: bool) -> None:
    entry, key = keys.new(name, priority=priority, admin=admin)

    def added(present: Sequence[Key]) -> Sequence[Key]:
        if name in {other.name for other in present}:
            raise KeysError(f"{path} has a key {name!r} already; run: engineshed keys remove {name} --file {path}")
        return [*present, entry]

    keys.update(path, added)
    print(key)  # alone on stdout, for a script to take
    print(f"This is the only time that the key is shown. {_reread(path)}", file=sys.stderr)


def _remove(path: Path, name: str) -> None:
    def removed(present: Sequence[Key]) -> Sequence[Key]:
        left = [key for key in present if key.name != name]
        if len(left) == len(present):
            names = ", ".join(key.name for key in present) or "none"
            raise KeysError(f"there is no key {name!r} in {path}, which has {names}")
        return left

    keys.update(path, removed)
    print(_reread(path), file=sys.stderr)


def _list(path: Path) -> None:
    present = keys.read(path)
    width = max([len("name"), *(len(key.name) for key in present)])
    print(f"{'name':<{width}}  priority  admin")
    for key in present:
        print(f"{key.name:<{width}}  {key.priority:>8}  {'yes' if key.admin else 'no'}")


def _reread(path: Path) -> str:
    return f"{path} is written; send SIGHUP to a server that runs."
