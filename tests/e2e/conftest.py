"""A running `engineshed serve` over the real bundle."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.default_model import ENGINES, MODEL
from tests.waiting import HANGS_SECONDS

ROOT = Path(__file__).parents[2]
TOKENS = "engineshed_generated_tokens_total"


@dataclass(frozen=True)
class Server:
    """A server process and where it listens."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 while nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=HANGS_SECONDS) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return 0, ""

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.split()[-1]) for line in lines if all(each in line for each in wanted))

    def engines(self) -> list[int]:
        """The engines' processes."""
        pid = self.process.pid
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in children if b"runtime.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """While this lasts the engines stand still: an answer that has begun lasts as long as a test looks at it.

        Gives what lets them run until another token has come. What an engine has to tell, as that its queue is full, comes
        afterwards.
        """
        engines, seen = self.engines(), self.metric(TOKENS)

        def signal_all(number: signal.Signals) -> None:
            for engine in engines:
                with suppress(ProcessLookupError):  # The test has killed it.
                    os.kill(engine, number)

        def advance() -> None:
            nonlocal seen
            signal_all(signal.SIGCONT)
            try:
                self.until(lambda: self.metric(TOKENS) > seen)
                seen = self.metric(TOKENS)
            finally:
                signal_all(signal.SIGSTOP)

        signal_all(signal.SIGSTOP)
        try:
            yield advance
        finally:
            signal_all(signal.SIGCONT)

    def until(self, true: Callable[[], bool], seconds: float = HANGS_SECONDS) -> None:
        """Return once `true` gives True."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.005)

    def wait(self, name: str, value: float, seconds: float = HANGS_SECONDS, **labels: str) -> None:
        """Return once the metric has the value."""
        deadline = time.monotonic() + seconds
        while (now := self.metric(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}, after {seconds} s"
            time.sleep(0.05)

    def wait_ready(self, seconds: float = HANGS_SECONDS) -> None:
        """Return once the engine is loaded."""
        deadline = time.monotonic() + seconds
        while self.get("/readyz")[0] != 200:
            assert self.process.poll() is None, f"serve ended with code {self.process.returncode}"
            assert time.monotonic() < deadline, f"not ready after {seconds} s"
            time.sleep(0.05)


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    """`engineshed serve` with these options, from its readiness to its end."""
    if not (ENGINES / MODEL / "bundle.json").exists():
        pytest.fail(f"{ENGINES / MODEL} is missing: run make export")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "engineshed.py", "serve", f"--engines={ENGINES}", f"--model={MODEL}", f"--port={port}", *options]
    process = subprocess.Popen(command, cwd=ROOT)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        server.wait_ready()
        yield server
    finally:
        process.terminate()
        process.wait(HANGS_SECONDS)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
