"""The stages of an export, and who is told how far they are."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Who is told how far the export is."""

    def begin(self, stage: str) -> None:
        """A stage has begun."""

    def advance(self, stage: str, share: float) -> None:
        """So much of it is done, from 0 to 1; not every stage tells."""

    def end(self, stage: str, seconds: float, note: str) -> None:
        """It is over; `note` says what came of it."""

    def notice(self, sentence: str) -> None:
        """Tell whoever exports what they should know, whatever else is shown."""


@dataclass
class Stage:
    """A stage under way; what is put into `note` is shown at its end."""

    name: str
    progress: Progress
    note: str = ""

    done: float = 0.0
    """The largest share that was told."""

    def advance(self, share: float) -> None:
        """Tell how much of it is done, from 0 to 1; less than was told before is not passed on."""
        self.done = min(max(self.done, share), 1.0)
        self.progress.advance(self.name, self.done)

    def part(self, start: float, end: float) -> Callable[[float], None]:
        """Takes the share of a part of the stage, which begins and ends at these shares of the whole."""
        return lambda share: self.advance(start + (end - start) * share)

    def notice(self, sentence: str) -> None:
        """Tell whoever exports what they should know of it."""
        self.progress.notice(sentence)


Stages = Callable[[str], AbstractContextManager[Stage]]
"""Begins the stage of that name."""
