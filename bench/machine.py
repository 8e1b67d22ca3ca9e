"""The machine's own limits, measured in the same run as what is compared with them."""

import os
import platform
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from bench.measure import Machine

_BUFFER = 1 << 30
"""Bytes read to measure bandwidth: several times the caches of today's servers, which hold hundreds of MiB."""
_SIDE = 2048
"""Of the square matrices whose product is timed."""
_PASSES = 5


def measure() -> Machine:
    """What this machine is and how fast it reads and multiplies; takes about a second."""
    return Machine(
        processor=_processor(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cores=cores(),
        read_bandwidth=read_bandwidth(),
        sgemm=sgemm(),
        date=datetime.now(UTC).date().isoformat(),
    )


class Others:
    """The share of the machine that processes other than some have taken since this was made."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._begun = self._seconds()

    def share(self) -> float:
        """Of all cores' time, in [0, 1]; time that a hypervisor gave to other machines counts too."""
        (all_then, busy_then, ours_then), (all_now, busy_now, ours_now) = self._begun, self._seconds()
        if all_now <= all_then:  # the kernel counts in hundredths of a second
            return 0.0
        return min(1.0, max(0.0, (busy_now - busy_then - (ours_now - ours_then)) / (all_now - all_then)))

    def _seconds(self) -> tuple[float, float, float]:
        """Of all cores: in all, busy, busy for the known processes."""
        times = psutil.cpu_times()
        ours = 0.0
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                ours += spent.user + spent.system
        counted = ("user", "system", "nice", "irq", "softirq", "steal")  # guests are in user already
        busy = sum(getattr(times, name, 0.0) for name in counted)
        return busy + times.idle + getattr(times, "iowait", 0.0), busy, ours


def cores() -> int:
    """Cores that this process, and so everything it starts, may use."""
    return len(os.sched_getaffinity(0))


def read_bandwidth() -> float:
    """Bytes a second that all cores together read from memory; the best of a few passes.

    Weights that stay in the cache between two tokens are read faster.
    """
    shares = np.array_split(np.ones(_BUFFER // 4, np.float32), cores())
    parts = [np.split(share[: share.size // 2 * 2], 2) for share in shares]
    times = []
    with ThreadPoolExecutor(cores()) as pool:
        for _ in range(_PASSES):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.dot(*pair), parts))  # of numpy's reductions the one that waits for memory alone
            times.append(time.perf_counter() - start)
    return _BUFFER / min(times)


def sgemm() -> float:
    """Float32 operations a second of numpy's matrix product on all cores, a multiply-add counted as two; the best of a few."""
    chance = np.random.default_rng(0)
    one, other = (chance.random((_SIDE, _SIDE), dtype=np.float32) for _ in range(2))
    product = np.empty_like(one)
    times = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        np.matmul(one, other, out=product)
        times.append(time.perf_counter() - start)
    return float(2 * _SIDE**3 / min(times))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
