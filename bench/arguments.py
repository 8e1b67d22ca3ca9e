"""Types of the command line's arguments: each takes a text and refuses what cannot be meant."""

import argparse
from collections.abc import Callable
from pathlib import Path


def writable(text: str) -> Path:
    """A file that can be written, said before the time is spent on what goes into it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {path.parent} is no folder, or it is one itself")
    return path


def number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """A finite number, `least` or more."""

    def parse(text: str) -> float:
        try:
            value = kind(text) if kind is float or text.isdecimal() else kind(-1)
        except ValueError:
            value = kind(-1)
        if not least <= value < 1e9:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number of at least {least:g}")
        return value

    return parse
