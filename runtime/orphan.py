"""No process outlives its parent, whatever it is doing and however the parent ended."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""


def die_with(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent, process `parent`, has ended; only on Linux.

    What the kernel takes for the parent is the thread that started this process: one that ends takes this process with it.
    Where the parent has ended already, this process is killed at once.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not watch this process's parent")
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)
