"""What the engines ask of a GPU: one stream, memory within a limit, copies, recorded work.

All work goes to the one stream, so it happens in the order in which it was asked for.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.engine import EngineError

UInt8 = npt.NDArray[np.uint8]

ALIGNMENT = 256
"""Bytes: what CUDA's allocations are aligned to, and what TensorRT wants of every tensor's address."""


class Event(Protocol):
    """A place in the stream."""

    def record(self) -> None:
        """Put the event behind all that has been asked for so far."""
        ...

    def wait(self) -> None:
        """Return once the GPU has come to where the event was recorded last; at once if it never was. Raises DeviceLost."""
        ...


class Graph(Protocol):
    """Recorded work."""

    def launch(self) -> None:
        """Ask for all of it again, with the shapes and addresses that it was recorded with."""
        ...


class Accelerator(Protocol):
    """One GPU with one stream. Addresses are integers; sizes are bytes."""

    compute_capability: str
    """As `8.9`."""
    stream: int
    """The stream's handle, for libraries that put work on it themselves."""
    limit: int
    """What this process may take of the GPU's memory."""
    taken: int
    """What it has taken, `account`ed memory included."""

    @property
    def free(self) -> int:
        """What the driver could still give, whoever takes it."""
        ...

    def allocate(self, size: int, purpose: str, advice: str = "start with fewer slots or a shorter context") -> int:
        """Memory on the GPU, aligned to `ALIGNMENT`, with anything in it.

        Raises EngineError, which says what `purpose` would have taken and gives `advice`, where it is more than the limit
        leaves or the driver has.
        """
        ...

    def account(self, size: int) -> None:
        """Count memory that a library took by itself."""
        ...

    def pinned(self, size: int) -> UInt8:
        """Zeroed host memory [size] that the GPU copies from and to on its own. Valid until `close`."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Fill GPU memory with zeros."""
        ...

    def upload(self, target: int, source: UInt8) -> None:
        """Copy pinned host memory to the GPU. It must stay as it is until the copy has happened."""
        ...

    def download(self, target: UInt8, source: int) -> None:
        """Copy to pinned host memory, which holds it once an event that is recorded later has been waited for."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy within the GPU's memory."""
        ...

    def copy_rows(self, target: int, source: int, *, width: int, height: int, target_pitch: int, source_pitch: int) -> None:
        """Copy `height` rows of `width` bytes that begin `pitch` bytes after one another."""
        ...

    def event(self) -> Event:
        """A new event."""
        ...

    def record(self, work: Callable[[], None]) -> Graph:
        """What `work` asks of the stream, recorded and not done. Raises EngineError where it cannot be recorded."""
        ...

    def synchronize(self) -> None:
        """Return once everything asked for has happened. Raises DeviceLost."""
        ...

    def close(self) -> None:
        """Give all memory back."""
        ...


def check_room(cuda: Accelerator, size: int, purpose: str, advice: str) -> None:
    """Raise EngineError, with the whole sum, where `size` bytes for `purpose` are more than the limit leaves."""
    if cuda.taken + size > cuda.limit:
        raise EngineError(
            f"{purpose} needs {size >> 20} MiB; of the {cuda.limit >> 20} MiB of GPU memory that this engine may take, "
            f"{cuda.taken >> 20} MiB are taken, so {max(cuda.limit - cuda.taken, 0) >> 20} MiB are left; {advice}"
        )
