"""Servers that the bench starts have ended when it is done, whatever they or it did."""

import shlex
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import launch
from bench.launch import Launched, LaunchError
from tests.waiting import HANGS_SECONDS

LISTENING = "import socket; s = socket.create_server(('127.0.0.1', {port})); s.accept()"
"""A server, as far as launching is concerned."""


def python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def with_a_child(code: str) -> str:
    return python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}]) # {{port}}")


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; nobody may have asked an orphan how."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def told(launched: Launched) -> str:
    """What is said once the process has ended."""
    deadline = time.monotonic() + HANGS_SECONDS
    while time.monotonic() < deadline:
        try:
            launched.check()
        except LaunchError as error:
            return str(error)
        time.sleep(0.02)
    pytest.fail("it has not ended")


def family(launched: Launched, count: int) -> list[psutil.Process]:
    """The processes of a command line once there are `count` of them."""
    deadline = time.monotonic() + HANGS_SECONDS
    while True:
        found = [psutil.Process(launched.pid), *psutil.Process(launched.pid).children(recursive=True)]
        if len(found) == count:
            return found
        assert time.monotonic() < deadline, f"{len(found)} processes, not {count}"
        time.sleep(0.02)


def test_the_port_is_free_and_in_the_command_and_the_address() -> None:
    with Launched("it", python(LISTENING)) as launched:
        assert launched.url.port is not None
        deadline = time.monotonic() + HANGS_SECONDS
        while True:
            launched.check()
            try:
                socket.create_connection(("127.0.0.1", launched.url.port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_a_process_and_what_it_started_are_gone_afterwards() -> None:
    with Launched("it", with_a_child("import time; time.sleep(600)")) as launched:
        processes = family(launched, 2)
        one = processes[0].memory_info().rss
        assert launched.rss > one
    assert all(map(gone, processes))


def test_they_are_gone_when_the_bench_fails() -> None:
    def fail() -> None:
        with Launched("it", python("import time; time.sleep(600) # {port}")) as launched:
            processes.extend(family(launched, 1))
            raise RuntimeError("the bench failed")

    processes: list[psutil.Process] = []
    with pytest.raises(RuntimeError, match="the bench failed"):
        fail()
    assert all(map(gone, processes))
    assert len(processes) == 1


def test_who_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.3)
    deaf = tmp_path / "deaf"
    code = (
        "import pathlib, signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(deaf)!r}).touch(); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)']) # {port}"
    )
    with Launched("it", python(code)) as launched:
        processes = family(launched, 2)
        assert deaf.exists(), "its child was started afterwards"
        begin = time.monotonic()
    assert all(map(gone, processes))
    assert time.monotonic() - begin >= 0.3, "it has listened"


def test_the_children_of_a_process_that_died_are_gone_too() -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(child.pid) # {port}"
    )
    with Launched("it", python(code)) as launched:
        child = psutil.Process(int(told(launched).split()[-1]))
        assert not gone(child)
    assert gone(child)


def test_an_early_end_is_told_with_the_last_words() -> None:
    with Launched("it", python("import sys; print('no such model'); sys.exit(3) # {port}")) as launched:
        words = told(launched)
    assert "it ended with code 3" in words
    assert "no such model" in words


def test_a_command_without_a_port_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"no \{port\}"):
        Launched("it", "sleep 600")


@pytest.mark.parametrize("command", ["no-such-program-here --port {port}", "unclosed ' {port}"])
def test_a_command_that_cannot_run_is_refused(command: str) -> None:
    with pytest.raises(LaunchError, match="cannot be started"):
        Launched("it", command)
