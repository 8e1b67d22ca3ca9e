"""A child process, as the server starts and ends it.

This imports little: the engines load while the other processes still import what they need.
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
"""Where this process has its code from, so that its children have the same, whatever the working directory."""
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


class SocketFolder:
    """A folder that only its owner can enter, with room for a ZeroMQ socket. Raises ServeError where none can be had."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="engineshed-")
        path = f"{self._folder.name}/socket"
        if len(os.fsencode(path)) > _LONGEST_PATH:
            self._folder.cleanup()
            raise ServeError(f"no socket can be made at {path}: the path is too long; try a shorter TMPDIR")
        self.address = f"ipc://{path}"

    def cleanup(self) -> None:
        """Remove it and what is in it."""
        self._folder.cleanup()


class ChildProcess:
    """A running `command` with a stdin whose end says that this process is gone.

    A context, at whose end nothing is left of it. Raises ServeError where the system starts none.
    """

    def __init__(self, command: Sequence[str]) -> None:
        path = os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends that one in good order.
            )
        except OSError as error:  # too little memory, too many processes
            raise ServeError(f"no process can be started ({error.strerror})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hang_up()
        self.kill()
        self.wait()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def wait(self) -> int:
        """Block until the process has ended; gives its exit code."""
        return self._process.wait()

    def hang_up(self) -> None:
        """Ask the process to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()


class EngineProcess(ChildProcess):
    """A running worker, given `--socket=ADDRESS`. Raises ServeError where no socket can be had."""

    def __init__(self, command: Sequence[str]) -> None:
        self._folder = SocketFolder()
        self.address = self._folder.address
        """Of the ZeroMQ socket that the process binds once it has loaded its engine."""
        super().__init__([*command, f"--socket={self.address}", f"--parent={os.getpid()}"])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._folder.cleanup()
