"""An engine's process, as the server starts and ends it.

This imports little: the engine loads while the server still imports what HTTP needs.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import runtime

CODE = Path(runtime.__file__).parent.parent
"""Where this process has its code from, so that a worker has the same, whatever the working directory."""
_LONGEST_PATH = 107
"""Bytes of a socket's path: `sun_path` of unix(7) without its final null."""


class ServeError(Exception):
    """The server cannot start, or not go on; the message says what to do."""


def command(folder: Path, variant: str, **options: Path | str | float | bool | None) -> list[str]:
    """The command line of a worker for a bundle's variant, without its socket; see `runtime.worker` for the options.

    Underscores stand for hyphens, True for an option without a value; what is None or False is left out.
    """
    line = [sys.executable, "-P", "-m", "runtime.worker", f"--bundle={folder}", f"--variant={variant}"]
    for name, value in options.items():
        if value is not None and value is not False:
            line.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return line


class EngineProcess:
    """A running `command`, given `--socket=ADDRESS` and a stdin whose end says that this process is gone.

    A context, at whose end nothing is left of it. Raises ServeError where no socket can be had.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="engineshed-")  # which only its owner can enter
        path = f"{self._folder.name}/engine"
        if len(os.fsencode(path)) > _LONGEST_PATH:
            self._folder.cleanup()
            raise ServeError(f"no engine can be reached at {path}: the path is too long; try a shorter TMPDIR")
        self.command = command
        """What it runs, for another process to take its place."""
        self.address = f"ipc://{path}"
        """Of the ZeroMQ socket that the process binds once it has loaded its engine."""
        self._process = subprocess.Popen(
            [*command, f"--socket={self.address}"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])])},
            start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends that one in good order.
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hang_up()
        self.kill()
        self.wait()
        self._folder.cleanup()

    def wait(self) -> int:
        """Block until the process has ended; gives its exit code."""
        return self._process.wait()

    def hang_up(self) -> None:
        """Ask the process to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
