"""A command's options from a TOML file: its keys are the options' names, and the options' own checks hold for its values."""

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runtime.bundle import SamplingDefaults
from server.supervision.launch import ModelOptions

SAMPLING = "override_generation_config"
"""The one option whose value is a table."""
T = TypeVar("T")


class FromToml(argparse.Action):
    """Takes a file and acts as if what is in it stood in its place on the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Read the file; ends the program with a sentence that names the key where something is wrong."""
        path = Path(str(values))
        parser.allow_abbrev = False  # A key is the option's whole name.
        content = _read(parser, path)
        namespace.models = _checked(parser, path, "models", content.pop("models", {}), dict[str, ModelOptions])
        if isinstance(table := content.get(SAMPLING), dict):  # On a command line it is JSON, which has no infinity.
            _checked(parser, path, SAMPLING, table, SamplingDefaults)
        for key, value in content.items():
            unknown = _is_key(key) and parser.parse_known_args(_option(key, value), namespace)[1]
            if unknown or not _is_key(key):
                parser.error(f"{path} has a key {key!r} that is no option; see --help")
        parser.allow_abbrev = True
        setattr(namespace, self.dest, path)


def _read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        parser.error(f"{path} is no TOML: {error}")


def _checked(parser: argparse.ArgumentParser, path: Path, key: str, table: Any, type: type[T]) -> T:
    """What stands under `key`, as `type` has it."""
    try:
        return msgspec.convert(table, type)
    except msgspec.ValidationError as error:
        parser.error(f"{path}: {key}: {error}")


def _is_key(key: str) -> bool:
    return key.replace("_", "").isalnum() and key not in ("config", "help")


def _option(key: str, value: Any) -> list[str]:
    """The option on a command line: true stands for an option without a value, a list for one with commas."""
    name = f"--{key.replace('_', '-')}"
    match value:
        case True:
            return [name]
        case False:
            return []
        case dict():
            return [f"{name}={msgspec.json.encode(value).decode()}"]
        case list():
            return [f"{name}={','.join(map(str, value))}"]
        case _:
            return [f"{name}={value}"]
