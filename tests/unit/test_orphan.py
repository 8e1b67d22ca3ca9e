"""Processes whose parent is killed, whatever they are doing."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import HANGS_SECONDS

ROOT = Path(__file__).parents[2]
CHILD = (
    "import sys; from runtime import orphan; orphan.die_with(int(sys.argv[1])); print('watched', flush=True)\nwhile True: pass"
)
PARENT = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process at its parent's death")


def gone(process: psutil.Process, seconds: float = HANGS_SECONDS) -> bool:
    """The process ends within `seconds`; one that nobody has reaped yet has ended."""
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_process_that_never_listens_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
        assert gone(child)


def test_a_process_whose_parent_died_before_it_could_ask_dies_at_once() -> None:
    stranger = str(psutil.Process().ppid())
    ended = subprocess.run([sys.executable, "-c", CHILD, stranger], cwd=ROOT, timeout=HANGS_SECONDS)
    assert ended.returncode == -signal.SIGKILL
