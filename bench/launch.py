"""A server that the bench starts, watches and ends."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import psutil
from yarl import URL

STOP_SECONDS = 20.0
"""What a server gets to end by itself before it is killed."""

ORPHAN_SECONDS = 2.0
"""What the processes that it started get once it has ended."""


class LaunchError(Exception):
    """A server cannot be started, or ended too early; the message says why."""


class Launched:
    """The processes behind one command line. Use as a context manager: they have ended when it is left, however it is left."""

    def __init__(self, name: str, command: str) -> None:
        """Start `command`, in which `{port}` becomes a free port. Raises LaunchError."""
        if "{port}" not in command:
            raise LaunchError(f"the command of {name} has no {{port}}; write it where its port belongs, as --port {{port}}")
        port = _free_port()
        self.name = name
        self.url = URL.build(scheme="http", host="127.0.0.1", port=port)
        self.begun = time.perf_counter()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        try:
            self._process = subprocess.Popen(
                shlex.split(command.replace("{port}", str(port))),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"},
                # A group of its own: Ctrl-C in the terminal reaches the bench alone, which then ends its servers in order.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._output.close()
            raise LaunchError(f"{name} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """Of the process that the command line is."""
        return self._process.pid

    def check(self) -> None:
        """Raise LaunchError if the process has ended."""
        if (code := self._process.poll()) is not None:
            raise LaunchError(f"{self.name} ended with code {code}; the last it said:\n{self._last_words()}")

    @property
    def rss(self) -> int:
        """Bytes resident of the process and all that it started; what several of them share counts in each."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def stop(self) -> None:
        """Ask the process to end, kill what is left of it and of what it started, and return when all have ended."""
        family = self._family()
        try:
            self._process.terminate()
            _wait([process for process in family if process.pid == self.pid], STOP_SECONDS)
            _wait(family, ORPHAN_SECONDS)
        finally:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _wait(family, STOP_SECONDS)
            self._process.wait()

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._output.close()

    def _family(self) -> list[psutil.Process]:
        """The process, all below it, and those of its group whose parents have ended before them."""
        found = [process for process in psutil.process_iter() if _group(process) == self.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process for process in psutil.Process(self.pid).children(recursive=True) if process not in found]
        return found

    def _last_words(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 2000))
        return self._output.read().decode(errors="replace").strip()


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def _wait(processes: list[psutil.Process], seconds: float) -> None:
    """Return when all have ended, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not all(map(_ended, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
