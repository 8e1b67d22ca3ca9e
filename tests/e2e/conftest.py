"""A running `engineshed serve` over the real bundle."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Server:
    """A server process and where it listens."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 while nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
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

    def wait(self, name: str, value: float, seconds: float = 10, **labels: str) -> None:
        """Return once the metric has the value."""
        deadline = time.monotonic() + seconds
        while (now := self.metric(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}, after {seconds} s"
            time.sleep(0.05)

    def wait_ready(self, seconds: float = 120) -> None:
        """Return once the engine is loaded."""
        deadline = time.monotonic() + seconds
        while self.get("/readyz")[0] != 200:
            assert self.process.poll() is None, f"serve ended with code {self.process.returncode}"
            assert time.monotonic() < deadline, f"not ready after {seconds} s"
            time.sleep(0.05)


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    """`engineshed serve` with these options, from its readiness to its end."""
    if not (ROOT / "engines" / MODEL / "bundle.json").exists():
        pytest.fail(f"engines/{MODEL} is missing: run make export")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "engineshed.py", "serve", f"--model={MODEL}", f"--port={port}", *options]
    process = subprocess.Popen(command, cwd=ROOT)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        server.wait_ready()
        yield server
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
