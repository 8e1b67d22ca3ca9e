"""No process outlives the one that started it, whatever it is doing."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def die_with(parent: int) -> None:
    """Have Linux kill this process when the process `parent`, which started it, ends; at once, if it has ended already.

    The end of a pipe tells a process the same, but only once it looks: one that hangs in a step never does.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
